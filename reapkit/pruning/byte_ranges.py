"""Plans which source bytes make up each tensor of the pruned checkpoint, and how the tensors are laid out in shards.
Torch-free."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.expert_layout import Layout, MoeLayer
from reapkit.core.dtypes import BITS
from reapkit.core.errors import UnusableError
from reapkit.core.safetensors_header import TensorInfo

Run = tuple[str, int, int]  # shard, first byte, number of bytes


@dataclass(frozen=True)
class Cut:
    """One tensor of the result: its name and shape there, and the byte ranges of one file it is made of, in order: a
    shard of the source, or another file by its absolute path.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    ranges: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(length for _, length in self.ranges)


@dataclass(frozen=True)
class Shard:
    """One file of the result. `whole` names a source shard that it equals byte for byte."""

    name: str
    header: bytes
    cuts: tuple[Cut, ...]
    whole: str | None = None

    @property
    def payload_bytes(self) -> int:
        return sum(cut.nbytes for cut in self.cuts)

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.payload_bytes

    def runs(self) -> Iterator[Run]:
        """The payload as source ranges, neighbours joined."""
        pending: Run | None = None
        for cut in self.cuts:
            for begin, length in cut.ranges:
                if pending and pending[0] == cut.shard and pending[1] + pending[2] == begin:
                    pending = (cut.shard, pending[1], pending[2] + length)
                else:
                    if pending:
                        yield pending
                    pending = (cut.shard, begin, length)
        if pending:
            yield pending


def cut_tensors(
    source: Checkpoint,
    layout: Layout,
    keep: Mapping[int, Sequence[int]],
    *,
    drop_mtp: bool,
    replaced: Mapping[str, tuple[Path, TensorInfo]] | None = None,
) -> list[Cut]:
    """The tensors of the result in the source's order: kept experts renumbered from 0, stacked axes sliced, the rest
    whole.

    `keep`: layer -> its kept experts, ascending numbers below the layer's; a stack [experts, ...] becomes [kept, ...]
    (entries behind the layer's experts stay), in the dtype that it has. `replaced`: source tensor name -> the file that
    holds its new bytes, as they are to be written, and where in it. Raises UnusableError where an entry of a stack does
    not end at a whole byte.
    """
    layers = {**layout.layers, **({} if drop_mtp else layout.mtp)}
    dropped = set(layout.mtp_tensors) if drop_mtp else set()
    renamed: dict[str, str] = {}
    sliced: dict[str, tuple[MoeLayer, int]] = {}
    for index, layer in layers.items():
        places = {expert: new for new, expert in enumerate(keep[index])}
        for expert, names in layer.per_expert.items():
            if expert not in places:
                dropped.update(names)
            elif places[expert] != expert:
                renamed.update((name, layer.spelling.renumbered(name, expert, places[expert])) for name in names)
        if len(keep[index]) < layer.num_experts:
            sliced.update((name, (layer, axis)) for name, axis in layer.stacked.items())
    cuts = []
    for tensor in sorted(source.tensors.values(), key=lambda tensor: (tensor.shard, tensor.begin, tensor.end)):
        if tensor.name in dropped:
            continue
        if replaced and tensor.name in replaced:
            file, info = replaced[tensor.name]
            cuts.append(
                Cut(
                    renamed.get(tensor.name, tensor.name),
                    info.dtype,
                    info.shape,
                    str(file.absolute()),
                    ((info.begin, info.nbytes),),
                )
            )
        elif tensor.name in sliced:
            layer, axis = sliced[tensor.name]
            cuts.append(_slice(tensor, axis, layer.num_experts, keep[layer.index]))
        else:
            whole = ((tensor.begin, tensor.nbytes),)
            cuts.append(Cut(renamed.get(tensor.name, tensor.name), tensor.dtype, tensor.shape, tensor.shard, whole))
    return cuts


def _slice(tensor: TensorInfo, axis: int, num_experts: int, keep: Sequence[int]) -> Cut:
    length = tensor.shape[axis]
    entries = [*keep, *range(num_experts, length)]
    bits = prod(tensor.shape[axis + 1 :]) * BITS[tensor.dtype]
    if bits % 8:
        raise UnusableError(
            f"tensor {tensor.name} packs entries of axis {axis} within one byte, so it cannot be sliced by expert."
        )
    inner, outer = bits // 8, prod(tensor.shape[:axis])
    ranges: list[tuple[int, int]] = []
    for block in range(outer):
        base = tensor.begin + block * length * inner
        for entry in entries:
            begin = base + entry * inner
            if ranges and sum(ranges[-1]) == begin:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + inner)
            else:
                ranges.append((begin, inner))
    shape = (*tensor.shape[:axis], len(entries), *tensor.shape[axis + 1 :])
    return Cut(tensor.name, tensor.dtype, shape, tensor.shard, tuple(ranges))


def lay_out(source: Checkpoint, cuts: Sequence[Cut], max_shard_bytes: int) -> list[Shard]:
    """The files of the result: filled in the source's order up to `max_shard_bytes` of tensors, large unchanged shards
    kept whole.

    A tensor larger than `max_shard_bytes` gets a file of its own.
    """
    unchanged = _unchanged(source, cuts, max_shard_bytes)
    groups: list[tuple[str | None, list[Cut]]] = []
    filling: list[Cut] | None = None
    filled = 0
    copied: set[str] = set()
    for cut in cuts:
        if cut.shard in unchanged:
            if cut.shard not in copied:
                copied.add(cut.shard)
                groups.append((cut.shard, []))
            groups[[whole for whole, _ in groups].index(cut.shard)][1].append(cut)
            continue
        if filling is None or filled + cut.nbytes > max_shard_bytes:
            filling, filled = [], 0
            groups.append((None, filling))
        filling.append(cut)
        filled += cut.nbytes
    names = (
        ["model.safetensors"]
        if len(groups) == 1
        else [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    )
    shards = []
    for name, (whole, members) in zip(names, groups, strict=True):
        if whole:
            shards.append(Shard(name, _raw_header(source, whole), tuple(members), whole))
        else:
            ordered = _aligned(members)
            shards.append(Shard(name, encode_header(ordered, _metadata(source, ordered[0].shard)), ordered))
    return shards


def _unchanged(source: Checkpoint, cuts: Sequence[Cut], max_shard_bytes: int) -> set[str]:
    """Source shards that lose nothing and rename nothing, of a size that a shard of the result may have."""
    changed: set[str] = set()
    sizes: dict[str, int] = {}
    for tensor in source.tensors.values():
        sizes[tensor.shard] = sizes.get(tensor.shard, 0) + tensor.nbytes
    left = dict(sizes)
    for cut in cuts:
        info = source.tensors.get(cut.name)
        if info is None or info.shard != cut.shard or cut.ranges != ((info.begin, info.nbytes),):
            changed.add(cut.shard)
        if cut.shard in left:
            left[cut.shard] -= cut.nbytes
    candidates = {
        shard
        for shard, size in sizes.items()
        if shard not in changed and left[shard] == 0 and max_shard_bytes // 2 <= size <= max_shard_bytes
    }
    # a shard may hold more than is in use: a tensor that the index finds elsewhere
    return {
        shard
        for shard in candidates
        if len(_raw_header(source, shard)) + sizes[shard] == (source.path / shard).stat().st_size
    }


def _aligned(cuts: Sequence[Cut]) -> tuple[Cut, ...]:
    """In the given order where every tensor then starts at a multiple of its item size, else larger items first
    (readers map them)."""
    position = 0
    for cut in cuts:
        item = max(1, BITS[cut.dtype] // 8)
        if position % item:
            return tuple(sorted(cuts, key=lambda cut: -BITS[cut.dtype]))
        position += cut.nbytes
    return tuple(cuts)


def encode_header(cuts: Sequence[Cut], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header with its length in front (8 bytes, little-endian), padded with spaces so that the payload
    starts at a multiple of 8 bytes; offsets count from the payload's start, in the order of `cuts`."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for cut in cuts:
        entries[cut.name] = {
            "dtype": cut.dtype,
            "shape": list(cut.shape),
            "data_offsets": [position, position + cut.nbytes],
        }
        position += cut.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def encode_index(shards: Sequence[Shard]) -> bytes:
    """The index file, UTF-8: bytes of all tensors (headers aside), and each tensor's file."""
    where = {cut.name: shard.name for shard in shards for cut in shard.cuts}
    total = sum(shard.payload_bytes for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def _raw_header(source: Checkpoint, shard: str) -> bytes:
    with (source.path / shard).open("rb") as stream:
        prefix = stream.read(8)
        return prefix + stream.read(struct.unpack("<Q", prefix)[0])


def _metadata(source: Checkpoint, shard: str) -> dict[str, str]:
    """The source's own metadata; loaders want to read `format` there."""
    found = json.loads(_raw_header(source, shard)[8:]).get("__metadata__")
    said = found if isinstance(found, dict) else {}
    return {"format": "pt", **{str(key): str(value) for key, value in said.items()}}
