"""--observation: a decision by an observation made elsewhere, of this model only, under a key of its content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reapkit.api import Observation
from reapkit.observation.observation import Reroute
from reapkit.pipeline.planned import make_plan
from reapkit.recipe.loading import load
from reapkit.selection.selection import Selection
from tests.support.command import Finished, command
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


def decide(tmp_path: Path, observation: Path, *overrides: str, name: str = "select") -> Finished:
    where = (f"runtime.store={tmp_path / 'store'}", f"output.directory={tmp_path / 'run'}", *overrides)
    return command(name, DEMO, *(f"--set={text}" for text in where), "--observation", observation, "--json")


def test_it_decides_without_reading_a_token(observed: Path, tmp_path: Path) -> None:
    done = decide(tmp_path, observed, "prune.ratio=0.25")
    assert done.code == 0, done.stderr
    found = done.json()
    assert found["executed"] == ["observe", "select"]  # neither calibrate nor packs
    assert (
        "warning: observe: the observation was imported from" in done.stderr
        and "scored tokens of code, tools, while calibration.mix names" in done.stderr
    )
    recorded = found["stages"]["observe"]["summary"]["imported"]
    assert recorded["directory"] == str(observed) and recorded["sources"].keys() == {"code", "tools"}
    expected = np.argsort(-Observation.load(observed).saliency("reap"), axis=1, kind="stable")[:, :24]
    chosen = Selection.load(tmp_path / "run" / "selection")
    assert [sorted(row) for row in expected.tolist()] == [list(kept) for kept in chosen.keep.values()]
    done = decide(tmp_path, observed, "prune.ratio=0.25", "calibration.samples=9")
    assert done.code == 0 and done.json()["executed"] == []  # the recipe's calibration does not enter
    done = decide(tmp_path, tmp_path / "run", "prune.ratio=0.5")
    assert done.code == 0 and done.json()["executed"] == ["select"]  # the same content, from another place


def test_what_it_holds_of_re_routing_counts_not_what_the_recipe_would_collect(observed: Path, tmp_path: Path) -> None:
    done = decide(tmp_path, observed, "saliency.criterion=reroute")
    assert done.code == 3 and "reroute needs removal paths, but this observation has none" in done.stderr
    order, error = (np.tile(row, (4, 4, 1)) for row in (np.arange(32)[::-1], np.linspace(0, 1, 32)))
    measured = Reroute(np.array([9, 9]), order, error, np.ones((4, 2, 32)))
    replace(Observation.load(observed), reroute=measured).save(tmp_path / "observation")
    wanted = ("saliency.criterion=reroute", "prune.ratio=0.25", "prune.protect={super_experts: false}")
    assert decide(tmp_path, tmp_path / "observation", *wanted).code == 0
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
        ({"meta": {"model": "0" * 64}}, "the observation is of model 000000000000, but the recipe's model is "),
        (
            {"layers": (0, 1, 2, 7)},
            "the observation has 4 MoE layers of 32 experts, but the recipe's model has 4 of 32. Give an observation"
            " of this model.",
        ),
    ],
)
def test_another_model_is_refused(observed: Path, tmp_path: Path, change: dict, said: str) -> None:
    replace(Observation.load(observed), **change).save(tmp_path / "observation")
    done = decide(tmp_path, tmp_path / "observation")
    assert done.code == 3 and said in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_is_no_observation_is_refused(tmp_path: Path) -> None:
    assert decide(tmp_path, DEMO.parent / "nowhere", name="apply").code == 2
    done = decide(tmp_path, DEMO)
    assert done.code == 3 and "found no observation. Give an observation's directory" in done.stderr


def test_only_what_the_end_needs_is_run() -> None:
    plan = make_plan(load(DEMO))
    assert plan.leading_to("observe") == ("calibrate", "observe") and plan.leading_to("select") == (
        "calibrate",
        "observe",
        "select",
    )
    assert plan.leading_to("packs") == ("calibrate", "packs") and "packs" in plan.leading_to("prune")
    assert plan.leading_to(None) == tuple(stage.name for stage in plan.stages)
