"""Knock-outs on the packaged model: a run measures them, decides by them and says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from reapkit import apply, plan
from reapkit.observation.observation import Observation
from reapkit.recipe.loading import load
from reapkit.selection.selection import Selection
from tests.support.paths import ROOT

SMALL = (
    "calibration.samples=40",
    "calibration.max_length=256",
    "saliency.criterion=knockout",
    "observe.knockout_tokens=200",
    "observe.eaft=false",
    "prune.protect.super_experts=false",
    "evaluate.controls=[]",
    "runtime.batch_tokens=512",
)


@pytest.mark.long
def test_a_run_decides_by_knock_outs_and_another_ratio_measures_nothing(tmp_path: Path) -> None:
    where = (f"runtime.store={tmp_path / 'store'}", f"output.directory={tmp_path / 'run'}")
    recipe = load(ROOT / "recipes" / "demo.yaml", (*SMALL, *where))
    run = apply(recipe, until="select")
    assert run.executed == ["calibrate", "observe", "knockout", "select"]
    observation = Observation.load(run.directory / "observation")
    found = observation.knockout
    assert found is not None and found.layers == (0, 1, 2, 3) and found.kl.shape == (4, 4, 32)
    assert 200 <= found.positions.sum() == run.summary("knockout")["positions"] and (found.rows > 0).all()
    expected = found.kl.sum(1) / found.positions.sum()
    chosen = Selection.load(run.directory / "selection")
    routed = observation.statistics["count"].sum(1) > 0
    for row, layer in enumerate(chosen.layers.values()):
        order = np.argsort(np.where(routed[row], expected[row], -np.inf), kind="stable")
        assert set(layer.drop) == set(order[:16].tolist())
    assert json.loads((run.directory / "selection/selection.json").read_text())["details"]["knockout"]["rows"] > 0
    again = apply(load(ROOT / "recipes" / "demo.yaml", (*SMALL, *where, "prune.ratio=0.25")), until="select")
    assert again.executed == ["select"]
    estimated = plan(recipe).estimates.knockout
    assert estimated is not None and estimated.hours is not None and estimated.hours > 0
