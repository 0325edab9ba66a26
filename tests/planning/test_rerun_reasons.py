"""A stage that runs says what differs from the nearest result that there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from reapkit.core.artifact_store import Artifact
from reapkit.planning.rerun_reasons import why_new

SPEC = {
    "prune": {"ratio": "0.5", "caps": []},
    "calibration.mix": [{"name": "code", "weight": "1"}, {"name": "prose", "weight": "1"}],
    "sources": ["a" * 64],
    "seed": 1,
}


def artifact(spec: object, **inputs: str) -> Artifact:
    return Artifact("select", "k", Path("/nowhere"), {"spec": spec, "inputs": inputs})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prune": {"ratio": "0.25", "caps": []}}, "prune.ratio: 0.5 → 0.25"),
        (
            {"calibration.mix": [{"name": "code", "weight": "3"}, {"name": "prose", "weight": "1"}]},
            "calibration.mix[code].weight: 1 → 3",
        ),
        ({"calibration.mix": []}, "calibration.mix: 2 values → 0 values"),
        ({"sources": ["b" * 64]}, "sources[0] has other content"),
        ({"seed": None}, "seed: 1 → null"),
        ({"new": True}, "new: not there → true"),
        ({"seed": 2, "new": "x" * 60}, f"seed: 1 → 2; new: not there → {'x' * 39}…"),
        (
            {"prune": {"ratio": "0.1", "caps": [1]}, "seed": 2, "new": 1},
            "prune.ratio: 0.5 → 0.1; prune.caps: 0 values → 1 values; seed: 1 → 2; and 1 more",
        ),
        ({}, "made by another version of this stage"),
    ],
)
def test_the_field_and_both_values_are_named(changed: dict, said: str) -> None:
    assert why_new(SPEC | changed, {"observe": "o"}, [artifact(SPEC, observe="o")]) == said


def test_the_nearest_of_several_is_compared_with() -> None:
    far = artifact({**SPEC, "seed": 7, "prune": {"ratio": "0.9", "caps": [1]}}, observe="o")
    near = artifact({**SPEC, "seed": 5}, observe="o")
    assert why_new(SPEC, {"observe": "o"}, [far, near]) == "seed: 5 → 1"


def test_inputs_and_first_runs() -> None:
    assert why_new(SPEC, {"observe": "new", "packs": "p"}, [artifact(SPEC, observe="o", packs="p")]) == (
        "reads another observe"
    )
    assert why_new(SPEC, {}, []) == "first run of this stage"


@pytest.mark.parametrize("spec", [None, [], "x", {"prune": 3}])
def test_records_of_any_shape_are_only_compared(spec: object) -> None:
    assert why_new(SPEC, {}, [Artifact("select", "k", Path("/nowhere"), {"spec": spec, "inputs": 4})])
