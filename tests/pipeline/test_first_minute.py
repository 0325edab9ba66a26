"""What a run would find out in its last hour is found out before it begins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reapkit.core.errors import UnusableError
from reapkit.pipeline import first_minute as minute
from reapkit.pipeline.first_minute import CLASS, LAYERS, MATRIX, PRUNED, first_minute
from reapkit.pipeline.planned import make_plan
from reapkit.planning.plan import Plan
from reapkit.pruning import checkpoint as surgery
from reapkit.quantization import formats
from reapkit.recipe.loading import load
from tests.support import tiny
from tests.support.command import command

RECIPE = """version: 1
name: t
model: {{source: model}}
calibration: {{samples: 60, max_length: 64, packing: none, mix: [{{name: ids, source: ids.jsonl, format: tokens}}]}}
prune: {{ratio: 0.25{prune}}}
evaluate: {{packs: {{samples: 12, lengths: [64]}}, gates: {{kl_mean: {{max: 9}}}}, generation: null, throughput: null}}
quantize: {{scheme: W4A16, method: rtn, group_size: 16}}
output: {{directory: run}}
runtime: {{store: store, device: cpu}}
"""
MANY = ("mixtral", "gpt_oss", "llama4_text", "qwen3_next", "granitemoe", "minimax_m2", "nemotron_h", "qwen3_5_moe")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"input_ids": [(7 * row + 3 * i) % 200 + 5 for i in range(40)]} for row in range(120)]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def planned(home: Path, model_type: str = "qwen3_moe", prune: str = "") -> Plan:
    if not (home / "model").is_dir():
        tiny.save_hub_layout(tiny.build(model_type), home / "model")
    (home / "r.yaml").write_text(RECIPE.format(prune=prune))
    return make_plan(load(home / "r.yaml"))


def changed(home: Path, change: Any) -> None:
    """The model's only shard, with a changed dictionary of tensors."""
    [shard] = (home / "model").glob("*.safetensors")
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "model_type", ["qwen3_moe", "deepseek_v3", *(pytest.param(name, marks=pytest.mark.long) for name in MANY)]
)
@pytest.mark.parametrize("prune", ["", ", layout: ragged"])
def test_what_runs_is_not_refused(model_type: str, prune: str, home: Path) -> None:
    plan = planned(home, model_type, prune)
    tried = first_minute(plan)
    assert [each.name for each in tried] == [CLASS, LAYERS, MATRIX, PRUNED] and all(each.ran for each in tried)
    first = min(plan.layout.layers)
    assert f"0 to {first} run" in tried[1].detail and f"of layer {first}" in tried[2].detail
    if prune and plan.checkpoint.architecture.n_group == 1 and len(plan.layout.layers) > 1:
        [kept] = {*plan.kept(plan.candidates[0]).values()}
        assert f"({kept - 1} to {kept + 1} each)" in tried[3].detail


def test_only_what_the_wanted_stages_need_is_tried(home: Path) -> None:
    plan = planned(home)
    assert [each.name for each in first_minute(plan, "observe")] == [CLASS, LAYERS]
    assert [each.name for each in first_minute(plan, "prune")] == [CLASS, LAYERS, PRUNED]


def test_of_a_model_on_the_hub_the_class_is_tried(home: Path) -> None:
    plan = planned(home)
    away = replace(plan, checkpoint=replace(plan.checkpoint, shard_hashes={"model.safetensors": "0" * 64}))
    assert [(each.name, each.ran) for each in first_minute(away)] == [(CLASS, True), (LAYERS, False), (PRUNED, False)]


def test_a_tensor_that_the_class_has_no_place_for(home: Path) -> None:
    planned(home)
    name = "model.layers.1.mlp.experts.0.down_proj.weight_scale_2"
    changed(home, lambda tensors: tensors.update({name: torch.ones(1)}))
    with pytest.raises(UnusableError, match=f"the model's class: .*no place for 1 tensors: {name}"):
        first_minute(planned(home))


def test_a_layer_that_gives_no_numbers(home: Path) -> None:
    planned(home)

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.o_proj.weight"][0, 0] = torch.nan

    changed(home, damage)
    with pytest.raises(UnusableError, match=r"the first layers: .*layer 0 computes of 16 tokens is not finite"):
        first_minute(planned(home))


def test_a_scheme_that_does_not_come_back(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = formats.round_to_nearest
    monkeypatch.setattr(formats, "round_to_nearest", lambda matrix, scheme: right(-matrix, scheme))
    with pytest.raises(UnusableError, match=r"W4A16 with a relative error of (1\.9|2)"):
        first_minute(planned(home))


def test_a_pruned_config_that_the_class_does_not_take(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config still counts the experts that are gone."""
    monkeypatch.setattr(surgery, "config_edits", lambda *_: {})
    with pytest.raises(UnusableError, match="the pruned model: ") as refused:
        first_minute(planned(home))
    assert "the first layers" not in str(refused.value), "only what failed is told"


def test_everything_that_fails_is_told_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery, "config_edits", lambda *_: {})
    monkeypatch.setattr(minute, "LARGEST_ERROR", {4: 1e-9})
    with pytest.raises(UnusableError) as refused:
        first_minute(planned(home))
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()][:2] == [LAYERS, PRUNED]


def test_a_run_ends_before_it_observes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(home)
    done = command("plan", "r.yaml", "--check", "--json")
    assert [each["name"] for each in done.json()["checks"]] == [CLASS, LAYERS, MATRIX, PRUNED]
    assert "a quantized expert" in command("plan", "r.yaml", "--check").stdout
    assert "checks" not in command("plan", "r.yaml", "--json").json() and not (home / "store").exists()
    monkeypatch.setattr(surgery, "config_edits", lambda *_: {})
    done = command("plan", "r.yaml", "--check", "--json")
    assert done.code == 3 and done.json()["error"].startswith("the pruned model: ")
    done = command("apply", "r.yaml")
    assert done.code == 3 and "the pruned model: " in done.stderr
    assert not list(home.glob("store/calibrate-*")), "nothing ran"


def test_what_was_observed_is_not_tried_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(home)
    assert "checked in" in command("apply", "r.yaml", "--until", "observe").stderr
    monkeypatch.setattr(minute, "first_minute", None)
    assert command("apply", "r.yaml", "--until", "select").code == 0
