"""What quantizing takes in memory, counted by hand from a checkpoint's shapes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reapkit.pipeline.planned import plan
from reapkit.planning.estimates import HOST_BASE_BYTES, Machine, activation_bytes
from reapkit.planning.quantization_memory import quantize_memory
from reapkit.recipe.loading import load
from reapkit.report.tables import plan_as_json
from tests.support.tiny import build, save_hub_layout

RECIPE = """
version: 1
name: small
model: {source: %s}
calibration: {samples: 10, max_length: 64, score: all, mix: [{name: prose, source: "builtin:prose"}]}
prune: {ratio: 0.5}
evaluate: {packs: {samples: 4, lengths: [64]}, gates: {kl_mean: {max: 10}}}
quantize: {scheme: W4A16, method: gptq, group_size: 32}
output: {max_shard_bytes: 1_000_000}
runtime: {batch_tokens: 128, store: %s}
"""
SMALL = Machine(None, HOST_BASE_BYTES)
LARGE = Machine(None, 10**12)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    save_hub_layout(build("qwen3_moe", dtype=torch.bfloat16), root / "model")
    (root / "recipe.yaml").write_text(RECIPE % (root / "model", root / "store"))
    return root / "recipe.yaml"


def test_a_layer_its_hessians_and_what_waits(recipe: Path) -> None:
    found = quantize_memory(plan(load(recipe)), LARGE)
    attention, experts = 64 * 64 + 2 * 32 * 64 + 64 * 64, 8 * 3 * 64 * 32
    layer = 2 * (
        attention + experts + 8 * 64 + 2 * 64 + 2 * 16
    )  # with 8 of 16 experts, their router rows and the norms
    rest = 2 * (2 * 256 * 64 + 64)
    hessians = 4 * (8 * (2 * 64**2 + 32**2) + 4 * 64**2)
    work = 4 * (3 * 64**2 + 4 * 64 * 64)
    scores = 128 * 64 * 4 * 8
    text = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts_per_tok": 4}
    device = hessians + work + activation_bytes(text, 128) + scores
    hidden, written = 10 * 64 * 64 * 2, found.in_memory.host - HOST_BASE_BYTES - rest - 3 * layer
    assert found.method == "gptq" and not found.offloads and found.disk == 3 * layer
    assert found.in_memory.device == device and found.on_disk.device == layer + device
    assert written == max(hidden, plan(load(recipe)).quantized_nbytes(plan(load(recipe)).candidates[0]))
    assert found.on_disk.host == HOST_BASE_BYTES + rest + max(2 * layer, written)
    assert found.chosen == found.in_memory


@pytest.mark.parametrize(
    ("overrides", "machine", "offloads"),
    [
        ((), LARGE, False),
        ((), SMALL, True),
        (("runtime.placement=streaming",), LARGE, True),
        (("runtime.placement=resident",), SMALL, False),
        (("quantize.method=rtn",), SMALL, False),
    ],
)
def test_layers_go_to_disk_where_the_model_does_not_fit_or_the_recipe_says_so(
    recipe: Path, overrides, machine: Machine, offloads: bool
) -> None:
    found = quantize_memory(plan(load(recipe, overrides)), machine)
    assert found.offloads == offloads and found.chosen == (found.on_disk if offloads else found.in_memory)


def test_with_an_accelerator_the_layer_is_there_too(recipe: Path) -> None:
    found, alone = (quantize_memory(plan(load(recipe)), machine) for machine in (Machine(10**10, 10**12), LARGE))
    assert (
        found.in_memory.device == found.on_disk.device == alone.on_disk.device
        and found.in_memory.host == alone.in_memory.host
    )


def test_rounding_to_nearest_holds_no_model_and_nothing_takes_nothing(recipe: Path) -> None:
    found = quantize_memory(plan(load(recipe, ("quantize.method=rtn",))), SMALL)
    assert (
        found.on_disk is None
        and found.in_memory.device < 1_000_001
        and found.in_memory.host < HOST_BASE_BYTES + 1_000_001
    )
    assert quantize_memory(plan(load(recipe, ("quantize.scheme=null",))), SMALL) is None


def test_the_plan_shows_it(recipe: Path) -> None:
    made = plan(load(recipe))
    assert plan_as_json(made)["quantize_memory"]["method"] == "gptq"
    shown = subprocess.run(
        [sys.executable, "-m", "reapkit", "plan", str(recipe), "--set", "runtime.placement=streaming"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "quantize (gptq)" in shown and "layers on disk" in shown
