"""Finds the matrices of a quantized checkpoint and the tensors that each is stored in, from config and headers alone.
Torch-free.

A quantized matrix lies in several tensors: packed weights, scales, zero points, ... Who reads the checkpoint wants one
tensor under the name that the model's class knows. `Packing` says how the tensors of one matrix are named and which
shape they stand for; `quantization_methods` says which packings a method uses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from reapkit.checkpoint.projection_names import QUANTIZER_STATE, Part, part_of
from reapkit.core.dtypes import BITS, FLOATS
from reapkit.core.safetensors_header import TensorInfo

Parts = Mapping[str, TensorInfo]
ACTIVATION_PARTS = re.compile(
    r"[._](?:input|output|activation|k|v|q)_(?:global_)?(?:scale|zero_point)$|\.(?:k|v|q|kv)_(?:bmm|proj)?_?(?:amax|quantizer)$"
)
"""Tensors that say how an engine rounds activations and caches, which nobody does while a model is observed."""


@dataclass(frozen=True)
class Packing:
    """How the tensors of one matrix are named: what they share, followed by a suffix each.

    `mark`: the suffix by which a matrix is recognised. `needed` and `optional`: the suffixes of its tensors, the mark
    aside; `root`: the one that holds the weights. `dense`: the suffix of the name that the model's class knows.
    `shape`: of the matrix, from its tensors by suffix and the settings of its quantization. `fits`: whether tensors so
    named are a matrix of this packing. `scale`: the suffix of the scales whose dtype the weights had; None where scales
    say nothing of it, and bfloat16 is meant.
    """

    name: str
    mark: str
    root: str
    dense: str
    shape: Callable[[Parts, Mapping[str, Any]], tuple[int, ...]]
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    fits: Callable[[Parts], bool] = lambda parts: True
    scale: str | None = None


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix, or stack of matrices, and the tensors that stand for it.

    `dense`: the matrix as it would be stored without quantization, name, dtype, shape and length; its place begins
    where its weights do. `parts`: by suffix. `settings`: what the checkpoint says of how it was quantized.
    """

    dense: TensorInfo
    packing: Packing
    parts: Parts
    settings: Mapping[str, Any] = field(default_factory=dict)


def stored_matrices(
    tensors: Mapping[str, TensorInfo],
    packings: Iterable[Packing],
    settings_of: Callable[[str], Mapping[str, Any]],
    dtype: str | None = None,
) -> dict[str, StoredMatrix]:
    """The matrices by the name that the model's class knows; a tensor belongs to one at most.

    `settings_of`: a matrix' module -> what the quantization config says of it. `dtype`: in which the model computes,
    and stores what is plain; None where that is not known, then the scales' tell.
    """
    found: dict[str, StoredMatrix] = {}
    taken: set[str] = set()
    for packing in packings:
        for name in tensors:
            if name.endswith(packing.mark) and name not in taken:
                matrix = _matrix(tensors, packing, name[: len(name) - len(packing.mark)], settings_of, dtype)
                if matrix is not None and matrix.dense.name not in found:
                    found[matrix.dense.name] = matrix
                    taken.update(part.name for part in matrix.parts.values())
    return found


def _matrix(
    tensors: Mapping[str, TensorInfo],
    packing: Packing,
    stem: str,
    settings_of: Callable[[str], Mapping[str, Any]],
    dtype: str | None,
) -> StoredMatrix | None:
    suffixes = dict.fromkeys((packing.mark, packing.root, *packing.needed, *packing.optional))
    parts = {suffix: tensors[stem + suffix] for suffix in suffixes if stem + suffix in tensors}
    if any(suffix not in parts for suffix in (packing.root, *packing.needed)) or not packing.fits(parts):
        return None
    settings, root = settings_of(stem), parts[packing.root]
    scale = parts[packing.scale].dtype if packing.scale is not None else "BF16"
    dtype = dtype or (scale if scale in FLOATS else "BF16")
    shape = packing.shape(parts, settings)
    end = root.begin + prod(shape) * BITS[dtype] // 8
    return StoredMatrix(
        TensorInfo(stem + packing.dense, dtype, shape, root.shard, root.begin, end), packing, parts, settings
    )


def dense_tensors(tensors: Mapping[str, TensorInfo], matrices: Mapping[str, StoredMatrix]) -> dict[str, TensorInfo]:
    """Every tensor as it would be without quantization: `matrices` in the place of their tensors, all others as they
    are, except those that only say how activations are rounded. In the checkpoint's own order."""
    taken = {part.name: name for name, matrix in matrices.items() for part in matrix.parts.values()}
    dense: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        if name in taken:
            dense.setdefault(taken[name], matrices[taken[name]].dense)
        elif not (matrices and ACTIVATION_PARTS.search(name)):
            dense[name] = tensor
    return dense


def orphans(dense: Mapping[str, TensorInfo], apart: Collection[str] = ()) -> list[str]:
    """Names of scales, zero points and packed weights that no matrix was found for; those in `apart` are not asked
    for."""
    states = (*QUANTIZER_STATE, Part.PACKED)
    return sorted(name for name in dense if name not in apart and part_of(name) in states)


# ---------------------------------------------------------------------------------------------- shapes


def as_stored(parts: Parts, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """One element holds one weight."""
    return next(part.shape for suffix, part in parts.items() if suffix in ("", ".weight"))


def two_in_a_byte(suffix: str) -> Callable[[Parts, Mapping[str, Any]], tuple[int, ...]]:
    """The tensor of that suffix holds two weights in each element, along its last axis."""
    return lambda parts, settings: (*parts[suffix].shape[:-1], 2 * parts[suffix].shape[-1])


def packed_integers(parts: Parts, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """compressed-tensors' int32 words [rows, words], whose columns the groups of the scales count where there are
    groups."""
    packed, scale = parts[".weight_packed"].shape, parts[".weight_scale"].shape
    weights = settings.get("weights") or {}
    group = weights.get("group_size")
    if type(group) is int and group > 0 and len(scale) == len(packed):
        return (*packed[:-1], scale[-1] * group)
    return (*packed[:-1], packed[-1] * 32 // int(weights.get("num_bits") or 4))


def awq_words(parts: Parts, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """AWQ's int32 words [inputs, outputs / 8], outputs first once unpacked."""
    inputs, words = parts[".qweight"].shape
    return words * 32 // int(settings.get("bits") or 4), inputs


def mxfp4_stack(parts: Parts, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """gpt-oss' stacks of experts [experts, outputs, blocks, 16 bytes of two weights], inputs first once unpacked."""
    experts, outputs, blocks, width = parts["_blocks"].shape
    return experts, blocks * width * 2, outputs
