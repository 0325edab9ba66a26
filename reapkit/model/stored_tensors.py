"""Reads a checkpoint's tensors as a plain model has them, without mapped pages: quantized ones are dequantized one by
one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.shard_reader import ShardReader
from reapkit.checkpoint.stored_matrices import StoredMatrix
from reapkit.core.dtypes import torch_dtypes
from reapkit.core.safetensors_header import TensorInfo
from reapkit.model.dequantizing import dequantized
from reapkit.model.streaming.layer_memory import ALIGNMENT

TORCH_DTYPES = torch_dtypes()
CAST_BYTES = 1 << 24  # tensors of another dtype than the model's go through a buffer of this size
DEQUANTIZE_BYTES = 1 << 25  # stacked experts are dequantized as many at a time as give this


class StoredTensor:
    """A tensor of a plain model on disk; indexing reads it, as with safetensors' slices. transformers' own conversion
    takes these.

    `info`: its name, dtype and shape, and where it lies. `matrix`: the tensors that stand for it, where it is
    quantized.
    """

    def __init__(self, reader: ShardReader, info: TensorInfo, matrix: StoredMatrix | None = None):
        self._reader, self.info, self.matrix = reader, info, matrix

    def __getitem__(self, index: Any) -> Tensor:
        if self.matrix is None:
            return _stored(self._reader, self.info)[index]
        if len(self.info.shape) == 2:
            return self._dequantized()[index]
        runs = list(self._runs(self.info.shape))
        first = self.entries(*runs[0])
        whole = torch.empty(self.info.shape, dtype=first.dtype)
        whole[: len(first)].copy_(first)
        for begin, end in runs[1:]:
            whole[begin:end].copy_(self.entries(begin, end))
        return whole[index]

    def entries(self, begin: int, end: int) -> Tensor:
        """Entries `begin` to `end` of the first axis, [end - begin, ...] in the stored dtype; of what is quantized, in
        the dtype that it is computed in."""
        if self.matrix is None:
            return _entries(self._reader, self.info, begin, end)
        parts = {suffix: _entries(self._reader, part, begin, end) for suffix, part in self.matrix.parts.items()}
        return dequantized(self.matrix, parts)

    def read_into(self, place: Tensor) -> None:
        """Fills contiguous `place`, of any shape that the tensor has, rounded to its dtype as `Tensor.to` rounds."""
        if self.matrix is None:
            _read_into(place, self._reader, self.info)
        elif place.dim() == 2:
            place.copy_(self._dequantized())
        else:
            for begin, end in self._runs(place.shape):
                place[begin:end].copy_(self.entries(begin, end))

    @staticmethod
    def _runs(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
        """As many entries of the first axis as are dequantized at a time."""
        at_once = max(1, DEQUANTIZE_BYTES * shape[0] // max(1, 2 * prod(shape)))
        for begin in range(0, shape[0], at_once):
            yield begin, min(begin + at_once, shape[0])

    def _dequantized(self) -> Tensor:
        assert self.matrix is not None, "only what is quantized is dequantized"
        return dequantized(
            self.matrix, {suffix: _stored(self._reader, part) for suffix, part in self.matrix.parts.items()}
        )

    def get_shape(self) -> list[int]:
        return list(self.info.shape)

    def get_dtype(self) -> str:
        return self.info.dtype


class CheckpointTensors(Mapping[str, TensorInfo]):
    """The tensors of a plain model by name, whatever a checkpoint stores: see `Checkpoint.plain`."""

    def __init__(self, checkpoint: Checkpoint):
        self._infos, self._matrices, self._tensors = checkpoint.plain.tensors, checkpoint.matrices, checkpoint.tensors

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def is_quantized(self, name: str) -> bool:
        return name in self._matrices

    def stored(self, name: str, reader: ShardReader) -> StoredTensor:
        """The tensor, to be read by `reader`."""
        return StoredTensor(reader, self._infos[name], self._matrices.get(name))

    def on_disk(self, name: str) -> list[TensorInfo]:
        """The checkpoint's own tensors that `name` is read from."""
        matrix = self._matrices.get(name)
        return [self._tensors[name]] if matrix is None else list(matrix.parts.values())


class PlainTensors:
    """Reads the tensors of a plain model by name, one at a time, in the shape and dtype that it would store; a context
    manager."""

    def __init__(self, checkpoint: Checkpoint):
        self._tensors, self._reader = CheckpointTensors(checkpoint), ShardReader(checkpoint.path)

    def __enter__(self) -> PlainTensors:
        self._reader.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.__exit__(*error)

    def __call__(self, name: str) -> Tensor:
        return self._tensors.stored(name, self._reader)[...].to(TORCH_DTYPES[self._tensors[name].dtype])


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor of any shape and dtype."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _stored(reader: ShardReader, info: TensorInfo) -> Tensor:
    """The whole tensor in its stored dtype, placed as in a mapped file, see `Filling.phase`."""
    dtype = TORCH_DTYPES[info.dtype]
    phase = info.begin % ALIGNMENT if info.begin % dtype.itemsize == 0 else 0
    whole = torch.empty(phase + info.nbytes, dtype=torch.uint8)[phase:].view(dtype).view(info.shape)
    reader.read_into(info.shard, info.begin, bytes_of(whole))
    return whole


def _entries(reader: ShardReader, info: TensorInfo, begin: int, end: int) -> Tensor:
    part = torch.empty((end - begin, *info.shape[1:]), dtype=TORCH_DTYPES[info.dtype])
    reader.read_into(info.shard, info.begin + begin * (info.nbytes // info.shape[0]), bytes_of(part))
    return part


def _read_into(place: Tensor, reader: ShardReader, info: TensorInfo) -> None:
    stored = TORCH_DTYPES[info.dtype]
    if stored == place.dtype:
        return reader.read_into(info.shard, info.begin, bytes_of(place))
    flat, step = place.view(-1), CAST_BYTES // stored.itemsize
    buffer = torch.empty(min(step, len(flat)), dtype=stored)
    for begin in range(0, len(flat), step):
        part = buffer[: len(flat) - begin]
        reader.read_into(info.shard, info.begin + begin * stored.itemsize, bytes_of(part))
        flat[begin : begin + len(part)].copy_(part)
