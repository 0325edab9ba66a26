"""Counts the bytes of model directories before they are written: tensors, headers, the files that travel with them.
Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING

from reapkit.checkpoint.weight_files import INDEX
from reapkit.core.dtypes import BITS
from reapkit.planning.disk_use import STORE, DiskUse, in_blocks, on_disk
from reapkit.planning.estimates import layer_weights
from reapkit.pruning.checkpoint import companions
from reapkit.quantization.sizes import kept_share
from reapkit.quantization.targets import decided_kinds

if TYPE_CHECKING:
    from reapkit.planning.plan import Plan
    from reapkit.selection.candidates import Candidate

ENTRY_BYTES = len('"":{"dtype":"BF16","shape":[],"data_offsets":[,]},')
PACKED_PARTS, PACKED_NAME = 3, len("_packed") + len(".gate_proj") + 4
"""Tensors that stand for a quantized matrix, and what their names are longer by."""
PACKED_SHAPE = (1 << 20, 1 << 20)
CONFIG_GROWTH = 8192
"""What the config gains by its edits, and what the record says beside shards and experts."""


def largest(plan: Plan) -> Candidate:
    """The candidate that takes most room."""
    return max(plan.candidates, key=lambda each: plan.pruned(each).nbytes)


def pruned_directory(plan: Plan) -> DiskUse:
    """The pruned checkpoint, as the largest candidate makes it."""
    kept, nbytes = plan.kept(largest(plan)), plan.pruned(largest(plan)).nbytes
    dropped = frozenset[str]() if all(index in kept for index in plan.layout.mtp) else plan.layout.mtp_tensors
    header = 0.0
    for kind in plan.layout.kinds:
        if kind.tensor.name not in dropped:
            left = kept_share(kind, kept) if kind.axis is None else 1
            header += float(kind.count * _entry(kind.tensor.name, kind.tensor.shape, nbytes) * left)
    return _directory(plan, nbytes, ceil(header), kept)


def quantized_directory(plan: Plan) -> DiskUse:
    """The quantized one; of a raw recipe from above."""
    kept, spec = plan.kept(largest(plan)), plan.recipe.quantize
    nbytes = plan.quantized_nbytes(largest(plan)) or 0
    header = 0.0
    for kind, matrix in decided_kinds(plan.checkpoint, spec):
        name, pieces = kind.tensor.name, 1 if matrix is None else matrix.count
        if matrix is not None or spec.recipe is not None:
            entry = pieces * PACKED_PARTS * _entry(name, PACKED_SHAPE, nbytes, PACKED_NAME)
        else:
            entry = _entry(name, kind.tensor.shape, nbytes)
        header += float(kind.count * entry * kept_share(kind, kept))
    made = _directory(plan, nbytes, ceil(header), kept)
    meanwhile = companion_bytes(plan)  # they are there twice for a moment
    return DiskUse(STORE, made.kept, meanwhile, made.linked, made.copied, spec.recipe is None)


def plain_bytes(plan: Plan, kept: Mapping[int, int] | None = None) -> int:
    """A model's weights in the dtype that it computes in; its multi-token-prediction blocks whole."""
    mtp = sum(
        kind.count * kind.tensor.numel * max(2, BITS[kind.tensor.dtype] // 8)
        for kind in plan.checkpoint.plain.layout.kinds
        if kind.tensor.name in plan.checkpoint.plain.layout.mtp_tensors
    )
    return sum(layer_weights(plan.checkpoint, plan.layout, kept).values()) + mtp


def companion_bytes(plan: Plan) -> int:
    """What travels with the weights: tokenizer, templates, the model's own code."""
    names, _ = companions(plan.checkpoint)
    return sum(in_blocks((plan.checkpoint.path / name).stat().st_size) for name in names if name != INDEX)


def _entry(name: str, shape: tuple[int, ...], file_bytes: int, longer: int = 0) -> int:
    """Bytes of a tensor's entry in a safetensors header."""
    digits = len(str(file_bytes))
    return ENTRY_BYTES + len(name) + longer + len(",".join(map(str, shape))) + 2 * digits


def _directory(plan: Plan, tensors: int, header: int, kept: Mapping[int, int]) -> DiskUse:
    shards = len(plan.checkpoint.shards)
    if shards > 1 or tensors > plan.recipe.output.max_shard_bytes:  # a tensor that does not fit begins a new one
        shards += ceil(2 * tensors / plan.recipe.output.max_shard_bytes)
    linked = tensors + header + shards * (on_disk(8) if shards > 1 else in_blocks(8))
    index = in_blocks(header) if shards > 1 else 0
    sizes = companion_bytes(plan)
    record = sum(kept.values()) * 8 + shards * 160
    config = (plan.checkpoint.path / "config.json").stat().st_size
    copied = sizes + in_blocks(config + CONFIG_GROWTH) + in_blocks(record + CONFIG_GROWTH) + index
    return DiskUse(STORE, linked + copied, linked=linked, copied=copied, is_exact=True)
