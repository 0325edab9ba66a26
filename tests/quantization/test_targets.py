"""What is quantized and what is left alone, by what a tensor is, from headers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.model.loaded_names import LoadedNames
from reapkit.model.loading import load_config, model_class
from reapkit.quantization.formats import preset
from reapkit.quantization.targets import matches, targets
from reapkit.quantization.writing import finish_directory
from reapkit.recipe.schema import QuantizeSpec
from tests.support.tiny import WRAPPERS, build, save_hub_layout

W3 = QuantizeSpec(scheme="W3A16", group_size=32)


@pytest.mark.parametrize(
    ("model_type", "left"),
    [
        ("qwen3_moe", {"model.layers.0.mlp.gate": "router", "lm_head": "outside the decoder layers"}),
        ("qwen2_moe", {"model.layers.1.mlp.shared_expert_gate": "a gate with one output"}),
        ("mixtral", {"model.layers.2.block_sparse_moe.gate": "router"}),
        ("granitemoe", {"model.layers.0.block_sparse_moe.router.layer": "router"}),
        (
            "gemma4_text",
            {"model.layers.0.router.proj": "router", "model.per_layer_model_projection": "outside the decoder layers"},
        ),
        ("deepseek_v32", {"model.layers.0.self_attn.indexer.wq_b": "indexer"}),
    ],
)
def test_what_is_never_quantized_is_found_by_what_it_is(tiny_checkpoint, model_type: str, left: dict[str, str]) -> None:
    plan = targets(tiny_checkpoint(model_type), W3)
    assert {module: plan.left.get(module) for module in left} == left
    assert "model.embed_tokens" in plan.left
    assert any(matrix.routed for matrix in plan.matrices.values())
    assert not {name for name in plan.matrices if "norm" in name or "embed" in name}


def test_multi_token_prediction_is_left_alone(tmp_path: Path) -> None:
    source = Checkpoint.open(save_hub_layout(build("deepseek_v3"), tmp_path, mtp=True))
    plan = targets(source, W3)
    assert plan.left["model.layers.3.mlp.experts.0.up_proj"] == "multi-token prediction"
    assert not [name for name in plan.matrices if name.startswith("model.layers.3.")]


def test_the_recipe_may_leave_more(tiny_checkpoint) -> None:
    plan = targets(
        tiny_checkpoint("qwen3_moe"),
        W3.model_copy(update={"ignore": ("re:.*self_attn.*", "model.layers.1.mlp.experts.3.up_proj")}),
    )
    assert (
        plan.left["model.layers.1.mlp.experts.3.up_proj"]
        == plan.left["model.layers.0.self_attn.q_proj"]
        == "the recipe ignores it"
    )
    assert all(".experts." in name for name in plan.matrices)


def test_stacked_experts_count_by_projection(tiny_checkpoint) -> None:
    plan = targets(tiny_checkpoint("gpt_oss"), W3)
    up, down = (plan.matrices[f"model.layers.0.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    assert (up.count, up.rows, up.columns) == (32, 32, 64)
    assert (down.count, down.rows, down.columns) == (16, 64, 32)
    assert plan.has_stacked_experts


def test_patterns() -> None:
    assert (
        matches("model.layers.0.mlp", ["re:.*mlp"])
        and matches("lm_head", ["lm_head"])
        and not matches("lm_heads", ["lm_head"])
    )


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ignore_names_every_linear_that_the_loader_makes_beside_the_quantized_ones(
    wrapper: str, tmp_path: Path
) -> None:
    """step's fused vision matrices, which end in no `.weight`, are split while they are loaded."""
    source = save_hub_layout(build(wrapper, dtype=torch.bfloat16), tmp_path / "source")
    checkpoint = Checkpoint.open(source)
    plan = targets(checkpoint, W3)
    (tmp_path / "out").mkdir()
    finish_directory(checkpoint, tmp_path / "out", preset(W3), plan, trust_remote_code=False)
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    config = load_config(source)
    names = LoadedNames.of_class(model_class(config), config)
    made = {target.removesuffix(".weight") for name in plan.matrices for target in names.targets(name)}
    assert names.linears - made and not names.linears - made - set(ignore)
    assert not made & set(ignore) and not {matrix.module for matrix in plan.matrices.values()} & set(ignore)
    if wrapper == "step3p7":
        assert "model.vision_model.layers.0.self_attn.q_proj" in ignore
