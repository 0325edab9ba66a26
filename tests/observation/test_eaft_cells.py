"""A calibration whose trace would be too large: its table holds what the trace would, in every placement, killed or
not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reapkit.model.loading import load_model
from reapkit.observation.eaft_table import EaftTable, cells_of
from reapkit.observation.observation import Observation
from reapkit.observation.resident import observe
from reapkit.observation.streamed import observe_streaming
from reapkit.recipe.schema import ObserveSpec
from reapkit.selection.saliency import saliency
from tests.support import tiny
from tests.support.specs import saliency_spec
from tests.support.tiny_tokens import tiny_tokens


class Rig:
    def __init__(self, root: Path):
        self.root = root
        tiny.save_hub_layout(tiny.build("qwen3_moe"), root / "model")
        self.tokens = tiny_tokens(root / "calibration")

    def resident(self, trace_bytes: int, work: str) -> Observation:
        return observe(
            load_model(self.root / "model", dtype="float32"),
            self.tokens,
            ObserveSpec(trace_bytes=trace_bytes),
            batch_tokens=48,
            work_directory=self.root / work,
        )

    def streaming(self, trace_bytes: int, work: str, **more) -> Observation:
        return observe_streaming(
            self.root / "model",
            self.tokens,
            ObserveSpec(trace_bytes=trace_bytes),
            batch_tokens=48,
            dtype="float32",
            work_directory=self.root / work,
            **more,
        )


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def assert_sums_of(table: EaftTable, exact: Observation) -> None:
    """Every cell against the exact trace's positions that belong to it."""
    trace = exact.eaft
    cell = cells_of(trace.p, trace.h, trace.source, table.p_edges, table.h_edges)
    assert np.array_equal(np.bincount(cell, minlength=table.positions.size), table.positions.ravel())
    for row, layer in enumerate(exact.layers):
        expert, gate_norm = trace.routed(layer)
        expected = np.zeros((table.positions.size, exact.num_experts))
        for slot in range(expert.shape[1]):
            np.add.at(expected, (cell, expert[:, slot]), gate_norm[:, slot])
        np.testing.assert_allclose(table.gate_norm_sum[row].reshape(expected.shape), expected, rtol=1e-12, atol=1e-12)


def test_its_sums_are_the_traces_in_every_placement(rig: Rig) -> None:
    exact, resident, streamed = rig.resident(10**9, "a"), rig.resident(0, "b"), rig.streaming(0, "c")
    waves = rig.streaming(0, "d", hidden_bytes=6000)
    for found in (resident, streamed, waves):
        assert isinstance(found.eaft, EaftTable) and np.array_equal(
            found.statistics["gate_norm_sum"], exact.statistics["gate_norm_sum"]
        )
        assert_sums_of(found.eaft, exact)
    assert np.array_equal(resident.eaft.gate_norm_sum, streamed.eaft.gate_norm_sum), (
        "edges from all positions, groups added in order"
    )
    assert len(list((rig.root / "d").rglob("wave-*/done"))) > 1
    spec = saliency_spec("eaft-reap")
    np.testing.assert_allclose(saliency(streamed, spec), saliency(exact, spec), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("placement", ["resident", "streaming"])
def test_killed_and_run_again_gives_the_same_bytes(rig: Rig, placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = getattr(rig, placement)
    run(0, "undisturbed").save(rig.root / "first")
    from reapkit.observation import session

    calls, finish = [], session.BatchWatch.finish

    def dies(self, *args) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        finish(self, *args)

    monkeypatch.setattr(session.BatchWatch, "finish", dies)
    with pytest.raises(KeyboardInterrupt):
        run(0, "killed")
    monkeypatch.setattr(session.BatchWatch, "finish", finish)
    run(0, "killed").save(rig.root / "second")
    assert (rig.root / "first" / "observation.safetensors").read_bytes() == (
        rig.root / "second" / "observation.safetensors"
    ).read_bytes()
    assert not list(rig.root.rglob("trace-*.part"))
