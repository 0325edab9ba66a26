"""Bytes of a quantized checkpoint, predicted from headers alone."""

from __future__ import annotations

from reapkit.quantization.schemes import SCHEMES
from reapkit.quantization.sizes import quantized_bytes
from reapkit.quantization.targets import targets
from reapkit.recipe.schema import QuantizeSpec

W3 = QuantizeSpec(scheme="W3A16", group_size=32)


def test_pruning_first_shrinks_the_prediction_by_the_experts(tiny_checkpoint) -> None:
    source = tiny_checkpoint("qwen3_moe")
    whole, half = quantized_bytes(source, W3), quantized_bytes(source, W3, kept=dict.fromkeys(range(3), 8))
    matrices = targets(source, W3).matrices.values()
    experts = sum(SCHEMES["W3A16"].nbytes(m.rows, m.columns, 32, 32) for m in matrices if m.routed)
    routers = 3 * 16 * 64 * 4
    assert whole - half == (experts + routers) // 2


def test_one_expert_may_be_left_out_of_the_prediction(tiny_checkpoint) -> None:
    source, left = tiny_checkpoint("qwen3_moe"), "model.layers.1.mlp.experts.3.up_proj"
    matrix = targets(source, W3).matrices[f"{left}.weight"]
    more = quantized_bytes(source, W3.model_copy(update={"ignore": (left,)})) - quantized_bytes(source, W3)
    assert more == matrix.tensor.nbytes - SCHEMES["W3A16"].nbytes(matrix.rows, matrix.columns, 32, 32)
