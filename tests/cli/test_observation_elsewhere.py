"""--observation: a decision by an observation made elsewhere, of this model only, under a key of its content."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reapkit.api import Observation
from reapkit.cli.main import _run
from reapkit.observation.observation import Reroute
from reapkit.pipeline.planned import make_plan
from reapkit.recipe.loading import load
from reapkit.selection.selection import Selection
from tests.support.observations import observe_routing, random_routing
from tests.support.paths import ROOT

DEMO = ROOT / "recipes" / "demo.yaml"


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An observation with the shape and the identity of the packaged model."""
    directory = tmp_path_factory.mktemp("elsewhere") / "observation"
    made = observe_routing(
        random_routing(3, layers=4, experts=32, tokens=200), experts=32, trace=False, coactivation=False
    )
    replace(made, model_type="qwen3_moe", meta={"model": make_plan(load(DEMO)).checkpoint.identity}).save(directory)
    return directory


def decide(tmp_path: Path, observation: Path, *overrides: str, command: str = "select") -> int:
    where = (f"runtime.store={tmp_path / 'store'}", f"output.directory={tmp_path / 'run'}", *overrides)
    return _run(
        [command, str(DEMO), *(f"--set={text}" for text in where), "--observation", str(observation), "--json"],
        debug=False,
    )


def test_it_decides_without_reading_a_token(observed: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert decide(tmp_path, observed, "prune.ratio=0.25") == 0
    said = capfd.readouterr()
    found = json.loads(said.out)
    assert found["executed"] == ["observe", "select"]  # neither calibrate nor packs
    assert (
        "warning: observe: the observation was imported from" in said.err
        and "scored tokens of code, tools, while calibration.mix names" in said.err
    )
    recorded = found["stages"]["observe"]["summary"]["imported"]
    assert recorded["directory"] == str(observed) and recorded["sources"].keys() == {"code", "tools"}
    expected = np.argsort(-Observation.load(observed).saliency("reap"), axis=1, kind="stable")[:, :24]
    chosen = Selection.load(tmp_path / "run" / "selection")
    assert [sorted(row) for row in expected.tolist()] == [list(kept) for kept in chosen.keep.values()]
    assert decide(tmp_path, observed, "prune.ratio=0.25", "calibration.samples=9") == 0
    assert json.loads(capfd.readouterr().out)["executed"] == []  # the recipe's calibration does not enter
    assert decide(tmp_path, tmp_path / "run", "prune.ratio=0.5") == 0
    assert json.loads(capfd.readouterr().out)["executed"] == ["select"]  # the same content, from another place


def test_what_it_holds_of_re_routing_counts_not_what_the_recipe_would_collect(
    observed: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert decide(tmp_path, observed, "saliency.criterion=reroute") == 3
    assert "reroute needs removal paths, and this observation holds none" in capsys.readouterr().err
    order, error = (np.tile(row, (4, 4, 1)) for row in (np.arange(32)[::-1], np.linspace(0, 1, 32)))
    measured = Reroute(np.array([9, 9]), order, error, np.ones((4, 2, 32)))
    replace(Observation.load(observed), reroute=measured).save(tmp_path / "observation")
    assert (
        decide(
            tmp_path,
            tmp_path / "observation",
            "saliency.criterion=reroute",
            "prune.ratio=0.25",
            "prune.protect={super_experts: false}",
        )
        == 0
    )
    assert all(kept == tuple(range(24)) for kept in Selection.load(tmp_path / "run" / "selection").keep.values())


def test_other_content_is_another_key(observed: Path, tmp_path: Path) -> None:
    def keys(place: Path, *overrides: str) -> dict[str, str]:
        recipe = load(DEMO, [f"runtime.store={tmp_path / 'store'}", *overrides])
        return {stage.name: stage.key for stage in make_plan(recipe, observation=place).stages}

    other = observe_routing(
        random_routing(4, layers=4, experts=32, tokens=200), experts=32, trace=False, coactivation=False
    )
    replace(other, meta={"model": Observation.load(observed).meta["model"]}).save(tmp_path / "other")
    first, second = keys(observed), keys(tmp_path / "other")
    assert {name for name in first if first[name] != second[name]} >= {"observe", "select", "evaluate"}
    assert (
        first == keys(observed, "observe.eaft=false")
        and first["calibrate"] == keys(None)["calibrate"]
        and first["observe"] != keys(None)["observe"]
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"meta": {"model": "0" * 64}}, "was made of model 000000000000, the recipe's is "),
        (
            {"layers": (0, 1, 2, 7)},
            "has 4 MoE layers of 32 experts, the recipe's model 4 of 32. Give an observation of this model.",
        ),
    ],
)
def test_another_model_is_refused(
    observed: Path, tmp_path: Path, change: dict, said: str, capsys: pytest.CaptureFixture
) -> None:
    replace(Observation.load(observed), **change).save(tmp_path / "observation")
    assert decide(tmp_path, tmp_path / "observation") == 3
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_no_observation_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert decide(tmp_path, DEMO.parent / "nowhere", command="apply") == 2
    assert decide(tmp_path, DEMO) == 3
    assert "no observation there. Give an observation's directory" in capsys.readouterr().err


def test_only_what_the_end_needs_is_run() -> None:
    plan = make_plan(load(DEMO))
    assert plan.leading_to("observe") == ("calibrate", "observe") and plan.leading_to("select") == (
        "calibrate",
        "observe",
        "select",
    )
    assert plan.leading_to("packs") == ("calibrate", "packs") and "packs" in plan.leading_to("prune")
    assert plan.leading_to(None) == tuple(stage.name for stage in plan.stages)
