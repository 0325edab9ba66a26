"""A `quantize:` section that does not fit its checkpoint is told so, with what would fit."""

from __future__ import annotations

from reapkit.quantization.checks import check_quantize
from reapkit.quantization.sizes import quantized_widths
from reapkit.recipe.schema import QuantizeSpec

W3 = QuantizeSpec(scheme="W3A16", group_size=32)


def test_group_size_must_divide_every_width(tiny_checkpoint) -> None:
    (problem,) = check_quantize(tiny_checkpoint("qwen3_moe"), QuantizeSpec(scheme="W3A16", group_size=64))
    assert problem.path == "quantize.group_size"
    assert problem.message == (
        "64 does not divide the input width 32 (48 matrices, such as model.layers.0.mlp.experts.0.down_proj). "
        "Choose 32, 16, or add these modules to quantize.ignore."
    )
    assert set(quantized_widths(tiny_checkpoint("qwen3_moe"), W3)) == {32, 64}
    assert not check_quantize(tiny_checkpoint("qwen3_moe"), W3)


def test_a_method_that_cannot_do_a_scheme_and_a_group_that_is_fixed(tiny_checkpoint) -> None:
    problems = check_quantize(
        tiny_checkpoint("qwen3_moe"), QuantizeSpec(scheme="MXFP4A16", method="awq", group_size=64)
    )
    assert [problem.path for problem in problems] == ["quantize.method", "quantize.group_size"]
    assert "always shares a scale by 32" in problems[1].message


def test_stacks_that_cannot_be_taken_apart_are_refused(tiny_checkpoint) -> None:
    source = tiny_checkpoint("step3p7")
    (problem,) = check_quantize(source, W3)
    assert str(problem) == (
        "quantize.scheme: llm-compressor cannot take apart the stacked experts of step3p5, so the model cannot be"
        " quantized here. Set quantize.scheme: null."
    )
    assert check_quantize(source, QuantizeSpec(recipe="x.yaml"))[0].path == "quantize.recipe"
    assert not check_quantize(source, QuantizeSpec(scheme=None))
