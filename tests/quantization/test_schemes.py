"""Schemes as data: what is quantized, what is not, and how large the result will be, from headers alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import RecipeError
from reapkit.quantization.schemes import (
    SCHEMES,
    check_quantize,
    matches,
    quantized_bytes,
    quantized_widths,
    scheme_of,
    targets,
)
from reapkit.recipe.schema import QuantizeSpec
from tests.support.tiny import build, save_hub_layout

W3 = QuantizeSpec(scheme="W3A16", group_size=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """`checkpoint(model_type)`: the tiny model's checkpoint, saved once."""
    saved: dict[str, Checkpoint] = {}

    def of(model_type: str) -> Checkpoint:
        if model_type not in saved:
            saved[model_type] = Checkpoint.open(save_hub_layout(build(model_type), tmp_path_factory.mktemp(model_type)))
        return saved[model_type]

    return of


@pytest.mark.parametrize(
    ("name", "bits"),
    [("W3A16", 3.125), ("W4A16", 4.125), ("W8A16", 8.125), ("NVFP4A16", 4.5), ("MXFP4A16", 4.25), ("MXFP8A16", 8.25)],
)
def test_bits_per_weight_of_a_large_matrix(name: str, bits: float) -> None:
    scheme, rows, columns = SCHEMES[name], 4096, 8192
    assert (scheme.nbytes(rows, columns, 128) * 8 - scheme.constant_bits) / (rows * columns) == bits


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
def test_what_is_never_quantized_is_found_by_what_it_is(checkpoint, model_type: str, left: dict[str, str]) -> None:
    plan = targets(checkpoint(model_type), W3)
    assert {module: plan.left.get(module) for module in left} == left
    assert "model.embed_tokens" in plan.left
    assert any(matrix.routed for matrix in plan.matrices.values())
    assert not {name for name in plan.matrices if "norm" in name or "embed" in name}


def test_multi_token_prediction_is_left_alone(tmp_path: Path) -> None:
    source = Checkpoint.open(save_hub_layout(build("deepseek_v3"), tmp_path, mtp=True))
    plan = targets(source, W3)
    assert plan.left["model.layers.3.mlp.experts.0.up_proj"] == "multi-token prediction"
    assert not [name for name in plan.matrices if name.startswith("model.layers.3.")]


def test_the_recipe_may_leave_more(checkpoint) -> None:
    plan = targets(
        checkpoint("qwen3_moe"),
        W3.model_copy(update={"ignore": ("re:.*self_attn.*", "model.layers.1.mlp.experts.3.up_proj")}),
    )
    assert (
        plan.left["model.layers.1.mlp.experts.3.up_proj"]
        == plan.left["model.layers.0.self_attn.q_proj"]
        == "the recipe ignores it"
    )
    assert all(".experts." in name for name in plan.matrices)


def test_stacked_experts_count_by_projection(checkpoint) -> None:
    plan = targets(checkpoint("gpt_oss"), W3)
    up, down = (plan.matrices[f"model.layers.0.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    assert (up.count, up.rows, up.columns) == (32, 32, 64)
    assert (down.count, down.rows, down.columns) == (16, 64, 32)
    assert plan.has_stacked_experts


def test_group_size_must_divide_every_width(checkpoint) -> None:
    (problem,) = check_quantize(checkpoint("qwen3_moe"), QuantizeSpec(scheme="W3A16", group_size=64))
    assert problem.path == "quantize.group_size"
    assert problem.message == (
        "64 does not divide the input width 32 (48 matrices, such as model.layers.0.mlp.experts.0.down_proj). "
        "Choose 32, 16, or add these modules to quantize.ignore."
    )
    assert set(quantized_widths(checkpoint("qwen3_moe"), W3)) == {32, 64}
    assert not check_quantize(checkpoint("qwen3_moe"), W3)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("W3A61", "'W3A61' is no known scheme. Did you mean W3A16?"),
        ("W4A16_ASYM", "stores zero points, which transformers loses"),
        ("W4A8", "quantizes activations too"),
        ("NVFP4", "quantizes activations too"),
    ],
)
def test_schemes_that_are_refused(checkpoint, scheme: str, message: str) -> None:
    spec = QuantizeSpec(scheme=scheme)
    (problem,) = check_quantize(checkpoint("qwen3_moe"), spec)
    assert problem.path == "quantize.scheme" and message in problem.message
    with pytest.raises(RecipeError):
        scheme_of(spec)


def test_a_method_that_cannot_do_a_scheme_and_a_group_that_is_fixed(checkpoint) -> None:
    problems = check_quantize(checkpoint("qwen3_moe"), QuantizeSpec(scheme="MXFP4A16", method="awq", group_size=64))
    assert [problem.path for problem in problems] == ["quantize.method", "quantize.group_size"]
    assert "always shares a scale by 32" in problems[1].message


def test_a_quantized_source_is_refused_unless_it_can_be_dequantized(checkpoint) -> None:
    source = checkpoint("qwen3_moe")

    def quantized(method: str) -> Checkpoint:
        return Checkpoint(
            source.path, {**source.config, "quantization_config": {"quant_method": method}}, source.tensors
        )

    (problem,) = check_quantize(quantized("mxfp4"), W3)
    assert "quantized already (mxfp4)" in problem.message
    assert not check_quantize(quantized("fp8"), W3)


def test_pruning_first_shrinks_the_prediction_by_the_experts(checkpoint) -> None:
    source = checkpoint("qwen3_moe")
    whole, half = quantized_bytes(source, W3), quantized_bytes(source, W3, kept=dict.fromkeys(range(3), 8))
    matrices = targets(source, W3).matrices.values()
    experts = sum(SCHEMES["W3A16"].nbytes(m.rows, m.columns, 32, 32) for m in matrices if m.routed)
    routers = 3 * 16 * 64 * 4
    assert whole - half == (experts + routers) // 2


def test_one_expert_may_be_left_out_of_the_prediction(checkpoint) -> None:
    source, left = checkpoint("qwen3_moe"), "model.layers.1.mlp.experts.3.up_proj"
    matrix = targets(source, W3).matrices[f"{left}.weight"]
    more = quantized_bytes(source, W3.model_copy(update={"ignore": (left,)})) - quantized_bytes(source, W3)
    assert more == matrix.tensor.nbytes - SCHEMES["W3A16"].nbytes(matrix.rows, matrix.columns, 32, 32)


def test_patterns() -> None:
    assert (
        matches("model.layers.0.mlp", ["re:.*mlp"])
        and matches("lm_head", ["lm_head"])
        and not matches("lm_heads", ["lm_head"])
    )


def test_it_needs_no_torch() -> None:
    assert (
        subprocess.run(
            [sys.executable, "-c", "import sys, reapkit.quantization.schemes; sys.exit('torch' in sys.modules)"]
        ).returncode
        == 0
    )
