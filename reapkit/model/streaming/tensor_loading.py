"""Reads checkpoint tensors straight into the model's parameters, without mapped pages and without stacking lists of
experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers.core_model_loading import Transpose, WeightConverter, dot_natural_key

from reapkit.checkpoint.shard_reader import ShardReader
from reapkit.model.stored_tensors import TORCH_DTYPES, CheckpointTensors, StoredTensor
from reapkit.model.streaming.layer_memory import ALIGNMENT, Arena, aligned


@dataclass(frozen=True)
class Filling:
    """How one parameter or buffer comes from disk: `fill(place, reader)` writes it, `keys` are the tensors that it uses
    up.

    `phase`: where a resident model has it, in bytes behind a multiple of the arenas' alignment. transformers leaves a
    weight that needs no conversion in the mapped file, at whatever address that gives, and a CPU's matrix products
    round by alignment.
    """

    target: str
    shape: torch.Size
    dtype: torch.dtype
    keys: tuple[str, ...]
    fill: Callable[[Tensor, ShardReader], None]
    phase: int = 0

    @property
    def nbytes(self) -> int:
        return aligned(self.phase + self.shape.numel() * self.dtype.itemsize)


class Fillings:
    """Plans a layer's fillings; what it does not know (interleaved, transposed, permuted weights) is left to
    transformers.

    `tensors`: the checkpoint's, as a plain model has them. `targets`: parameter and conversion pattern by tensor.
    `expected`: the model's parameters and buffers. Values are those of transformers' own conversion, bit for bit.
    `mapped`: a resident model would have unconverted weights in mapped files.
    """

    def __init__(
        self,
        tensors: CheckpointTensors,
        targets: Mapping[str, tuple[str, str | None]],
        expected: Mapping[str, Tensor],
        converters: Iterable[WeightConverter],
        dtype_of: Callable[[str], torch.dtype],
        *,
        mapped: bool,
    ):
        self._tensors, self._targets, self._expected, self._dtype_of = tensors, targets, expected, dtype_of
        self._converters = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        self._mapped = mapped

    def of(self, keys: Iterable[str]) -> list[Filling]:
        """In the order of the first tensor's place on disk."""
        parts: dict[str, dict[str | None, list[str]]] = {}
        for key in sorted(keys, key=dot_natural_key):
            target, pattern = self._targets[key]
            if target in self._expected:
                parts.setdefault(target, {}).setdefault(pattern, []).append(key)
        found = [
            filling
            for target, by_pattern in parts.items()
            if (filling := self._filling(target, by_pattern)) is not None
        ]
        return sorted(
            found, key=lambda filling: min((self._tensors[key].shard, self._tensors[key].begin) for key in filling.keys)
        )

    def _filling(self, target: str, by_pattern: Mapping[str | None, list[str]]) -> Filling | None:
        first = next(iter(by_pattern))
        if first is None:
            return (
                None if len(by_pattern) > 1 or len(by_pattern[None]) > 1 else self._copied(target, by_pattern[None][0])
            )
        converter, operation = self._converters[first], self._converters[first].operations[0]
        if (
            any(pattern not in converter.source_patterns for pattern in by_pattern)
            or len(converter.target_patterns) != 1
        ):
            return None
        kinds = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
        ordered = {pattern: by_pattern[pattern] for pattern in converter.source_patterns if pattern in by_pattern}
        if kinds in STACKINGS:
            return self._stacked(target, ordered)
        if kinds == [("Transpose", None)] and sum(map(len, ordered.values())) == 1:
            return self._transposed(target, ordered[first][0], cast(Transpose, operation))
        return None

    def _copied(self, target: str, key: str) -> Filling | None:
        info, shape = self._tensors[key], self._expected[target].shape
        if info.shape != tuple(shape) or not self._reads(key):
            return None
        dtype = self._dtype_of(target)
        stays = (
            self._mapped
            and not self._tensors.is_quantized(key)
            and TORCH_DTYPES[info.dtype] == dtype
            and info.begin % dtype.itemsize == 0
        )
        return Filling(
            target,
            shape,
            dtype,
            (key,),
            lambda place, reader: self._stored(key, reader).read_into(place),
            info.begin % ALIGNMENT if stays else 0,
        )

    def _reads(self, key: str) -> bool:
        return self._tensors.is_quantized(key) or self._tensors[key].dtype in TORCH_DTYPES

    def _stored(self, key: str, reader: ShardReader) -> StoredTensor:
        return self._tensors.stored(key, reader)

    def _transposed(self, target: str, key: str, operation: Transpose) -> Filling | None:
        """Stacked experts whose matrices lie the other way round on disk, one by one."""
        info, shape = self._tensors[key], self._expected[target].shape
        if operation.check_dims and info.shape == tuple(shape):
            return self._copied(target, key)
        turned = (
            len(shape) == 3
            and {operation.dim0 % 3, operation.dim1 % 3} == {1, 2}
            and info.shape == (shape[0], shape[2], shape[1])
        )
        if not turned or not self._reads(key):
            return None

        def fill(place: Tensor, reader: ShardReader) -> None:
            for expert, matrix in enumerate(place):
                matrix.copy_(self._stored(key, reader).entries(expert, expert + 1)[0].T)

        return Filling(target, shape, self._dtype_of(target), (key,), fill)

    def _stacked(self, target: str, weights: Mapping[str, list[str]]) -> Filling | None:
        """Per-expert matrices along a new first axis, gate's rows above up's."""
        shape, infos = self._expected[target].shape, self._tensors
        rows = [infos[keys[0]].shape[0] for keys in weights.values() if infos[keys[0]].shape]
        fits = (
            len(shape) == 3
            and len(rows) == len(weights)
            and sum(rows) == shape[1]
            and all(len(keys) == shape[0] for keys in weights.values())
            and all(
                infos[key].shape == (count, shape[2]) and self._reads(key)
                for count, keys in zip(rows, weights.values(), strict=True)
                for key in keys
            )
        )
        if not fits:
            return None

        def fill(place: Tensor, reader: ShardReader) -> None:
            for keys, part in zip(weights.values(), place.split(rows, dim=1), strict=True):
                for expert, key in enumerate(keys):
                    self._stored(key, reader).read_into(part[expert])

        keys = tuple(key for keys in weights.values() for key in keys)
        return Filling(target, shape, self._dtype_of(target), keys, fill)


STACKINGS = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def place_all(fillings: Iterable[Filling], arena: Arena, reader: ShardReader) -> dict[str, Tensor]:
    """The tensors by target, in `arena`'s memory: of any shape, each in its filling's dtype."""
    placed = {}
    for filling in fillings:
        placed[filling.target] = arena.tensor(filling.shape, filling.dtype, filling.phase)
        filling.fill(placed[filling.target], reader)
    return placed
