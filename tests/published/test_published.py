"""Checkpoints as they are published: planned in their full size from config and headers, and a tiny copy in its real
layout observed, pruned and loaded again; or refused by the plan, with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import UnusableError
from reapkit.model.loaded_names import LoadedNames
from reapkit.model.loading import load_config, load_model, model_class
from reapkit.model.masking import masked
from reapkit.observation.streamed import observe_streaming
from reapkit.pipeline.first_minute import CLASS, LAYERS, PRUNED, first_minute
from reapkit.pipeline.planned import make_plan
from reapkit.pruning.checkpoint import prune_checkpoint
from reapkit.recipe.loading import load
from reapkit.recipe.schema import ObserveSpec
from reapkit.selection.decide import select
from tests.support import published_copies as copies
from tests.support.published_models import expand, write_checkpoint
from tests.support.specs import prune, saliency_spec
from tests.support.tiny_tokens import tiny_tokens

PLANNED = {  # layers that route, experts in each, kept of them at half, layers that keep all
    "deepseek-v4-flash-bf16": (43, 256, 128, (0, 1, 2)),
    "ernie-4.5-21b-a3b": (27, 64, 32, ()),
    "gemma-4-26b-a4b": (30, 128, 64, ()),
    "glm-4.5v": (45, 128, 64, ()),
    "granite-3.1-3b-a800m": (32, 40, 20, ()),
    "kimi-k2.5": (60, 384, 192, ()),
    "llama-4-scout-17b-16e": (48, 16, 8, ()),
    "minimax-m2": (62, 256, 128, ()),
    "mistral-small-4-119b-bf16": (36, 128, 64, ()),
    "mixtral-8x7b": (32, 8, 4, ()),
    "olmoe-1b-7b": (16, 64, 32, ()),
    "phi-3.5-moe": (32, 16, 8, ()),
    "qwen3-next-80b-a3b": (48, 512, 256, ()),
    "qwen3-vl-30b-a3b": (48, 128, 64, ()),
    "step-3.7-flash": (42, 288, 144, ()),
}
REFUSED = tuple(name for name in copies.NAMES if "refused" in copies.facts(name))
RUN = tuple(name for name in copies.NAMES if name not in REFUSED)
IDS = torch.randint(3, 240, (2, 18), generator=torch.Generator().manual_seed(1))


def planned(model: Path, directory: Path, *, layout: str = "uniform"):
    recipe = directory / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nname: t\nmodel: {{source: {model}}}\nprune: {{ratio: 0.5, layout: {layout}}}\n"
        'calibration: {samples: 4, mix: [{name: d, source: "builtin:code"}]}\n'
        f"quantize: {{scheme: null}}\nruntime: {{store: {directory / 'store'}}}\n"
    )
    return make_plan(load(recipe))


def full_size(name: str, directory: Path) -> Path:
    """Headers and holes: nothing of the weights."""
    found = copies.facts(name)
    return write_checkpoint(directory, found["config"], expand(found["tensors"]), max_shard_bytes=50_000_000_000)


def test_every_model_is_planned_or_refused() -> None:
    assert set(PLANNED) == set(RUN) and set(copies.NAMES) == {*RUN, *REFUSED}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name == "kimi-k2.5" else name for name in RUN]
)
def test_the_published_model_is_planned(name: str, tmp_path: Path) -> None:
    layers, experts, kept, whole = PLANNED[name]
    plan = planned(full_size(name, tmp_path / "model"), tmp_path, layout="ragged" if whole else "uniform")
    assert (len(plan.layout.layers), plan.checkpoint.architecture.num_experts) == (layers, experts)
    counts = plan.kept(plan.candidates[0])
    assert {layer for layer, count in counts.items() if count == experts} == set(whole)
    assert {count for layer, count in counts.items() if layer not in whole} == {kept}
    assert any("a fixed table says" in note for note in plan.notes) == bool(whole)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_by_the_plan_with_the_reason(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnusableError) as caught:
        planned(full_size(name, tmp_path / "model"), tmp_path)
    assert copies.facts(name)["refused"] in str(caught.value) and "Choose" in str(caught.value)


@pytest.mark.parametrize("name", RUN)
def test_the_facts_fill_every_parameter_of_the_class(name: str, tmp_path: Path) -> None:
    """Names that transformers does not know would be facts of another model."""
    found = copies.facts(name)
    (tmp_path / "config.json").write_text(json.dumps(found["config"]))
    config = load_config(tmp_path)
    few = [
        tensor
        for tensor, *_ in expand(found["tensors"])
        if int((re.search(r"experts\.(\d+)\.", tensor) or [0, 0])[1]) < 2
    ]
    assert not LoadedNames.of_class(model_class(config), config).unfilled(few)


@pytest.mark.parametrize("name", RUN)
def test_a_tiny_copy_is_observed_pruned_and_loaded_again(name: str, tmp_path: Path) -> None:
    path = copies.tiny_copy(name, tmp_path / "model")
    source = Checkpoint.open(path)
    assert copies.patterns(source.tensors) == copies.published_patterns(name), "laid out as it is published"
    whole = PLANNED[name][3]
    layout = "ragged" if whole else "uniform"
    plan = planned(path, tmp_path, layout=layout)
    assert plan.layout.layers.keys() == source.layout.layers.keys()
    assert [each.name for each in first_minute(plan) if each.ran] == [CLASS, LAYERS, PRUNED]
    observation = observe_streaming(
        path,
        tiny_tokens(tmp_path / "tokens"),
        ObserveSpec(eaft=False),
        batch_tokens=64,
        work_directory=tmp_path / "work",
    )
    chosen = select(observation, saliency_spec(), prune(ratio=0.5, layout=layout), source.architecture)
    assert {len(layer.keep) for layer in chosen.layers.values()} == ({4, 8} if whole else {4})
    prune_checkpoint(source, chosen, tmp_path / "out", layout=layout)
    with torch.no_grad():
        model = load_model(path)
        before = model(input_ids=IDS, use_cache=False).logits
        with masked(model, chosen.keep):
            expected = model(input_ids=IDS, use_cache=False).logits
        got = load_model(tmp_path / "out")(input_ids=IDS, use_cache=False).logits
    assert not torch.equal(expected, before), "what was dropped mattered"
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
