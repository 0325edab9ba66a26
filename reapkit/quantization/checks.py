"""Finds contradictions between a recipe's `quantize:` section and a checkpoint before anything runs. Torch-free."""

from __future__ import annotations

from math import gcd

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import Problem
from reapkit.quantization.schemes import Scheme, scheme_of, scheme_problem
from reapkit.quantization.sizes import quantized_widths
from reapkit.quantization.targets import decided_kinds
from reapkit.recipe.schema import QuantizeSpec


def check_quantize(checkpoint: Checkpoint, spec: QuantizeSpec) -> list[Problem]:
    """Everything that contradicts between `quantize:` and the checkpoint, as problems of the recipe."""
    if spec.recipe is not None:
        return _stack_problems(checkpoint, spec)
    if spec.scheme is None:
        return []
    if problem := scheme_problem(spec):
        return [problem]
    scheme = scheme_of(spec)
    problems = _method_problems(spec, scheme) + _stack_problems(checkpoint, spec)
    return problems or _group_problems(checkpoint, spec, scheme)


def _method_problems(spec: QuantizeSpec, scheme: Scheme) -> list[Problem]:
    problems = []
    if reason := scheme.refused_by(spec.method):
        problems.append(
            Problem("quantize.method", f"{spec.method} cannot do {scheme.name}: {reason}. Choose rtn or gptq.")
        )
    if scheme.fixed and "group_size" in spec.model_fields_set and spec.group_size != scheme.group:
        has = f"always shares a scale by {scheme.group}" if scheme.group else "has one scale per row"
        problems.append(
            Problem(
                "quantize.group_size",
                f"found {spec.group_size}, but {scheme.name} {has}. Remove group_size, or choose W4A16.",
            )
        )
    return problems


def _stack_problems(checkpoint: Checkpoint, spec: QuantizeSpec) -> list[Problem]:
    """Stacks of experts that llm-compressor cannot take apart, so that no method runs on the model."""
    if all(layer.spelling.taken_apart for layer in checkpoint.layout.layers.values()):
        return []
    return [
        Problem(
            "quantize.scheme" if spec.recipe is None else "quantize.recipe",
            f"llm-compressor cannot take apart the stacked experts of {checkpoint.architecture.model_type}, so the"
            " model cannot be quantized here. Set quantize.scheme: null.",
        )
    ]


def _group_problems(checkpoint: Checkpoint, spec: QuantizeSpec, scheme: Scheme) -> list[Problem]:
    group = scheme.group if scheme.fixed else spec.group_size
    if group is None or scheme.rows_per_scale > 1:
        return []
    if not any(matrix and matrix.columns % group for _, matrix in decided_kinds(checkpoint, spec)):
        return []
    widths = quantized_widths(checkpoint, spec)
    misfits = {width: modules for width, modules in widths.items() if width % group}
    where = "; ".join(f"{width} ({len(modules)} matrices, such as {modules[0]})" for width, modules in misfits.items())
    if scheme.fixed:
        return [
            Problem(
                "quantize.scheme",
                f"{scheme.name} shares a scale by {group} input columns, which does not divide {where}. Add "
                "these modules to quantize.ignore, or choose FP8_DYNAMIC.",
            )
        ]
    common = gcd(*widths)
    allowed = [size for size in (256, 128, 64, 32, 16) if common % size == 0]
    choice = f"Choose {', '.join(map(str, allowed))}" if allowed else f"Choose a divisor of {common}"
    return [
        Problem(
            "quantize.group_size",
            f"{group} does not divide the input width {where}. {choice}, or add these modules to quantize.ignore.",
        )
    ]
