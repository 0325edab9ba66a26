"""Re-routing on the packaged model: a whole run decides by it, and what it costs against REAP."""

from __future__ import annotations

import json
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reapkit import apply, plan
from reapkit.model.routed_experts import find_experts
from reapkit.observation.observation import Observation
from reapkit.observation.reroute_layer import measure_layer
from reapkit.observation.reroute_sample import Capture
from reapkit.recipe.loading import load
from reapkit.recipe.schema import ObserveSpec
from reapkit.report.inspection.inspect import inspect
from reapkit.selection.selection import Selection
from tests.support.paths import ROOT

SMALL = (
    "calibration.samples=48",
    "calibration.max_length=256",
    "evaluate.packs={samples: 24, lengths: [256]}",
    "evaluate.generation=null",
    "saliency.criterion=reroute",
    "observe.reroute_tokens=512",
    "evaluate.controls=[reroute-single]",
    "observe.eaft=false",
)


@pytest.mark.long
def test_a_run_decides_by_removal_paths(tmp_path: Path) -> None:
    recipe = load(
        ROOT / "recipes" / "demo.yaml",
        (*SMALL, f"runtime.store={tmp_path / 'store'}", f"output.directory={tmp_path / 'run'}"),
    )
    planned = plan(recipe)
    from reapkit.planning.estimates import estimate

    cost = estimate(planned).reroute
    assert cost.tokens == 512 and cost.flops == 2 * 4 * 512 * 32 * 128 * (3 * 64 + 32)
    run = apply(recipe, until="select")
    observation = Observation.load(run.directory / "observation")
    assert int(observation.reroute.tokens.sum()) == 512
    chosen = Selection.load(run.directory / "selection")
    for row, layer in enumerate(chosen.layers.values()):
        assert set(layer.drop) == set(observation.reroute.order[row, -1, :16].tolist())
    found = inspect(run.directory / "observation").to_json()
    assert found["reroute"]["tokens"] == dict(
        zip(observation.sources, observation.reroute.tokens.tolist(), strict=True)
    )
    assert len(found["reroute"]["error"]["0"]) == 3 and json.dumps(found)


@pytest.mark.long
def test_uniform_reroute_loses_at_most_six_tenths_of_what_reap_loses(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    from pruning_study import Cost, Noise, Study

    study = Study(tmp_path, samples=320, held_out=96, spec=ObserveSpec(eaft=False, reroute_tokens=8192))
    draws = [study.calibrated(seed) for seed in (42, 43)]
    noise = Noise.of(study.base, len(draws))
    for ratio in (Decimal("0.25"), Decimal("0.5")):
        costs = {
            name: Cost.of(
                study.base, [study.pruned(study.select(draw, ratio, criterion=name)) for draw in draws], noise
            )
            for name in ("reap", "reroute")
        }
        assert costs["reroute"].value <= 0.6 * costs["reap"].value, {
            name: (cost.value, cost.interval) for name, cost in costs.items()
        }


@pytest.mark.long
def test_projected_outputs_hardly_change_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's hidden size is 128, so half of that stands in for 256 of several thousand dimensions."""
    sys.path.insert(0, str(ROOT / "examples"))
    from pruning_study import BATCH_TOKENS, Study

    from reapkit.observation import reroute_layer

    study = Study(tmp_path, samples=160, held_out=16)
    found: dict[bool, list[list[int]]] = {True: [], False: []}

    def both(self: Capture, site: object) -> None:
        files = sorted(self.directory.glob(f"reroute-{site.layer:04d}-*.safetensors"))
        parts = [load_file(file) for file in files]
        inputs, residual = (torch.cat([part[name] for part in parts]) for name in ("inputs", "residual"))
        for projected in found:
            paths = measure_layer(
                self.model,
                site,
                inputs,
                residual,
                torch.zeros(len(inputs), dtype=torch.int64),
                torch.tensor([1]),
                projected=projected,
            )
            found[projected].append(paths["order"][-1, :16].tolist())
        finish(self, site)

    finish = Capture.finish
    monkeypatch.setattr(Capture, "finish", both)
    plain = reroute_layer.projection
    monkeypatch.setattr(reroute_layer, "projection", lambda width: plain(width, 64))
    reroute_spec = ObserveSpec(eaft=False, reroute_tokens=4096)
    reroute_tokens = study.tokens()
    from reapkit.observation.resident import observe

    observe(study.model, reroute_tokens, reroute_spec, batch_tokens=BATCH_TOKENS, work_directory=tmp_path / "observed")
    assert len(find_experts(study.model)) == len(found[True])
    same = [len(set(a) & set(b)) for a, b in zip(found[True], found[False], strict=True)]
    assert min(same) >= 14 and sum(same) / len(same) >= 15, same
