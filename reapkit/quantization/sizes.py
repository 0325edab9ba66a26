"""Computes the exact size of a quantized checkpoint in bytes, from its headers alone. Torch-free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from fractions import Fraction

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.expert_layout import Kind
from reapkit.core.dtypes import BITS
from reapkit.quantization.schemes import scheme_of
from reapkit.quantization.targets import Matrix, decided_kinds, targets
from reapkit.recipe.schema import QuantizeSpec


def quantized_widths(checkpoint: Checkpoint, spec: QuantizeSpec) -> dict[int, list[str]]:
    """Input width -> the modules that have it, over everything that would be quantized."""
    widths: dict[int, list[str]] = defaultdict(list)
    for matrix in targets(checkpoint, spec).matrices.values():
        widths[matrix.columns].append(matrix.module)
    return dict(sorted(widths.items()))


def quantized_bytes(checkpoint: Checkpoint, spec: QuantizeSpec, kept: Mapping[int, int] | None = None) -> int:
    """Bytes of all tensors after quantization, where MoE layer `l` holds `kept[l]` experts (those it omits stay whole).

    Multi-token-prediction blocks that route stay only where `kept` names them, as in `layout.pruned_sizes`; without
    `kept` all stay. What is not quantized is as the checkpoint's plain form has it. A raw llm-compressor recipe is not
    predicted: the bytes as they are.
    """
    layout = checkpoint.plain.layout
    kept = (
        {index: layer.num_experts for index, layer in {**layout.layers, **layout.mtp}.items()} if kept is None else kept
    )
    dropped = frozenset() if all(index in kept for index in layout.mtp) else layout.mtp_tensors
    total = Fraction(0)
    for kind, matrix in decided_kinds(checkpoint, spec):
        tensor = kind.tensor
        if tensor.name in dropped:
            continue
        if matrix is not None:
            bits = BITS[tensor.dtype]
            nbytes = matrix.count * scheme_of(spec).nbytes(matrix.rows, matrix.columns, spec.group_size, bits)
        else:
            nbytes = tensor.nbytes
        total += kind.count * nbytes * kept_share(kind, kept)
    return round(total)


def matrices_by_layer(
    checkpoint: Checkpoint, spec: QuantizeSpec, kept: Mapping[int, int]
) -> dict[int, list[tuple[Matrix, int]]]:
    """Decoder layer -> (a matrix that is quantized, how many of its shape stay), where MoE layer `l` keeps `kept[l]`
    experts.

    A raw llm-compressor recipe is not predicted: every matrix that could be quantized counts.
    """
    found: dict[int, list[tuple[Matrix, int]]] = defaultdict(list)
    possible = (
        spec if spec.recipe is None else spec.model_copy(update={"recipe": None, "scheme": spec.scheme or "W4A16"})
    )
    for kind, matrix in decided_kinds(checkpoint, possible):
        if matrix is not None:
            found[matrix.layer].append((matrix, round(kind.count * matrix.count * kept_share(kind, kept))))
    return dict(found)


def kept_share(kind: Kind, kept: Mapping[int, int]) -> Fraction:
    """The share of a kind's numbers that stay when its layer keeps `kept` experts; all of what has no expert axis."""
    if kind.layer is None:
        return Fraction(1)
    removed = kind.layer.num_experts - kept.get(kind.layer.index, kind.layer.num_experts)
    return 1 - Fraction(removed, kind.experts)
