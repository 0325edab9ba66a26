"""Reads checkpoint tensors straight into the model's parameters, without mapped pages and without stacking lists of
experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, Transpose, WeightConverter, dot_natural_key

from reapkit.checkpoint.projection_names import BLOCK_SCALE
from reapkit.checkpoint.shard_reader import ShardReader
from reapkit.core.dtypes import torch_dtypes
from reapkit.core.safetensors_header import TensorInfo
from reapkit.model.streaming.layer_memory import ALIGNMENT, Arena, aligned

TORCH_DTYPES = torch_dtypes()
CAST_BYTES = 1 << 24  # tensors of another dtype than the model's go through a buffer of this size
DEQUANTIZE_BYTES = 1 << 25  # stacked experts are dequantized as many at a time as give this


class Stored:
    """A tensor on disk; indexing reads it, as with safetensors' slices. transformers' own conversion takes these."""

    def __init__(self, reader: ShardReader, info: TensorInfo):
        self._reader, self.info = reader, info

    def __getitem__(self, index: Any) -> Tensor:
        info, dtype = self.info, TORCH_DTYPES[self.info.dtype]
        phase = (
            info.begin % ALIGNMENT if info.begin % dtype.itemsize == 0 else 0
        )  # as in a mapped file, see `Filling.phase`
        whole = torch.empty(phase + info.nbytes, dtype=torch.uint8)[phase:].view(dtype).view(info.shape)
        self._reader.read_into(info.shard, info.begin, bytes_of(whole))
        return whole[index]

    def entries(self, begin: int, end: int) -> Tensor:
        """Entries `begin` to `end` of the first axis, [end - begin, ...] in the stored dtype."""
        part = torch.empty((end - begin, *self.info.shape[1:]), dtype=TORCH_DTYPES[self.info.dtype])
        self._reader.read_into(
            self.info.shard, self.info.begin + begin * (self.info.nbytes // self.info.shape[0]), bytes_of(part)
        )
        return part

    def get_shape(self) -> list[int]:
        return list(self.info.shape)

    def get_dtype(self) -> str:
        return self.info.dtype


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

    `targets`: parameter and conversion pattern by checkpoint tensor. `expected`: the model's parameters and buffers.
    Values are those of transformers' own conversion, bit for bit. `mapped`: a resident model would have unconverted
    weights in mapped files.
    """

    def __init__(
        self,
        infos: Mapping[str, TensorInfo],
        targets: Mapping[str, tuple[str, str | None]],
        expected: Mapping[str, Tensor],
        converters: Iterable[WeightConverter],
        dtype_of: Callable[[str], torch.dtype],
        *,
        model: torch.nn.Module,
        quantized: bool,
        mapped: bool,
    ):
        self._infos, self._targets, self._expected, self._dtype_of = infos, targets, expected, dtype_of
        self._converters = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        self._model, self._quantized, self._mapped = model, quantized, mapped

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
            found, key=lambda filling: min((self._infos[key].shard, self._infos[key].begin) for key in filling.keys)
        )

    def _filling(self, target: str, by_pattern: Mapping[str | None, list[str]]) -> Filling | None:
        first = next(iter(by_pattern))
        if first is None:
            return (
                None
                if self._quantized or len(by_pattern) > 1 or len(by_pattern[None]) > 1
                else self._copied(target, by_pattern[None][0])
            )
        converter, operation = self._converters[first], self._converters[first].operations[0]
        if (
            any(pattern not in converter.source_patterns for pattern in by_pattern)
            or len(converter.target_patterns) != 1
        ):
            return None
        kinds = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
        ordered = {pattern: by_pattern[pattern] for pattern in converter.source_patterns if pattern in by_pattern}
        if kinds in STACKINGS and not self._quantized:
            return self._stacked(target, ordered, {})
        if kinds == [("Transpose", None)] and not self._quantized and sum(map(len, ordered.values())) == 1:
            return self._transposed(target, ordered[first][0], cast(Transpose, operation))
        if kinds[:1] == [("Fp8Dequantize", None)] and kinds[1:] in STACKINGS:
            scales = {pattern: found for pattern, found in ordered.items() if f"weight{BLOCK_SCALE}" in pattern}
            weights = {pattern: found for pattern, found in ordered.items() if pattern not in scales}
            return self._stacked(target, weights, scales, operation if scales else None)
        if kinds == [("Mxfp4Dequantize", None)]:
            return self._unpacked(target, ordered, operation)
        return None

    def _copied(self, target: str, key: str) -> Filling | None:
        info, shape = self._infos[key], self._expected[target].shape
        if info.shape != tuple(shape) or info.dtype not in TORCH_DTYPES:
            return None
        dtype = self._dtype_of(target)
        stays = self._mapped and TORCH_DTYPES[info.dtype] == dtype and info.begin % dtype.itemsize == 0
        return Filling(
            target,
            shape,
            dtype,
            (key,),
            lambda place, reader: read_into(place, reader, info),
            info.begin % ALIGNMENT if stays else 0,
        )

    def _transposed(self, target: str, key: str, operation: Transpose) -> Filling | None:
        """Stacked experts whose matrices lie the other way round on disk, one by one."""
        info, shape = self._infos[key], self._expected[target].shape
        if operation.check_dims and info.shape == tuple(shape):
            return self._copied(target, key)
        turned = (
            len(shape) == 3
            and {operation.dim0 % 3, operation.dim1 % 3} == {1, 2}
            and info.shape == (shape[0], shape[2], shape[1])
        )
        if not turned or info.dtype not in TORCH_DTYPES:
            return None

        def fill(place: Tensor, reader: ShardReader) -> None:
            for expert, matrix in enumerate(place):
                matrix.copy_(Stored(reader, info).entries(expert, expert + 1)[0].T)

        return Filling(target, shape, self._dtype_of(target), (key,), fill)

    def _stacked(
        self,
        target: str,
        weights: Mapping[str, list[str]],
        scales: Mapping[str, list[str]],
        dequantizing: ConversionOps | None = None,
    ) -> Filling | None:
        """Per-expert matrices along a new first axis, gate's rows above up's; where there are scales, dequantized one
        by one."""
        shape, infos = self._expected[target].shape, self._infos
        rows = [infos[keys[0]].shape[0] for keys in weights.values() if infos[keys[0]].shape]
        fits = (
            len(shape) == 3
            and len(rows) == len(weights)
            and sum(rows) == shape[1]
            and (not scales or len(scales) == len(weights))
            and all(len(keys) == shape[0] for keys in (*weights.values(), *scales.values()))
            and all(
                infos[key].shape == (count, shape[2]) and infos[key].dtype in TORCH_DTYPES
                for count, keys in zip(rows, weights.values(), strict=True)
                for key in keys
            )
        )
        if not fits:
            return None
        model = self._model

        def fill(place: Tensor, reader: ShardReader) -> None:
            for (pattern, keys), part in zip(weights.items(), place.split(rows, dim=1), strict=True):
                with_scales = [(pattern, keys), *_scales_of(pattern, scales)]
                for expert, key in enumerate(keys):
                    if dequantizing is None:
                        read_into(part[expert], reader, infos[key])
                        continue
                    pair = {name: [Stored(reader, infos[found[expert]])[...]] for name, found in with_scales}
                    part[expert].copy_(_dequantized(dequantizing, pair, target, model)[pattern][0])

        if scales and any(len(_scales_of(pattern, scales)) != 1 for pattern in weights):
            return None
        dtype = self._expected[target].dtype if scales else self._dtype_of(target)
        return Filling(
            target, shape, dtype, tuple(key for keys in (*weights.values(), *scales.values()) for key in keys), fill
        )

    def _unpacked(self, target: str, parts: Mapping[str, list[str]], unpacking: ConversionOps) -> Filling | None:
        """MXFP4 blocks with their scales, a few experts at a time: they unpack to bfloat16 whatever the model's dtype
        is."""
        shape, infos = self._expected[target].shape, self._infos
        if len(parts) != 2 or any(len(keys) != 1 or infos[keys[0]].shape[:1] != shape[:1] for keys in parts.values()):
            return None
        at_once = max(1, DEQUANTIZE_BYTES * shape[0] // max(1, 2 * shape.numel()))
        model = self._model

        def fill(place: Tensor, reader: ShardReader) -> None:
            for begin in range(0, shape[0], at_once):
                end = min(begin + at_once, shape[0])
                few = {
                    pattern.removesuffix("$"): [Stored(reader, infos[keys[0]]).entries(begin, end)]
                    for pattern, keys in parts.items()
                }
                place[begin:end].copy_(_dequantized(unpacking, few, target, model)[target])

        wide = max(torch.bfloat16, self._dtype_of(target), key=lambda dtype: dtype.itemsize)
        return Filling(target, shape, wide, tuple(key for keys in parts.values() for key in keys), fill)


STACKINGS = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def place_all(fillings: Iterable[Filling], arena: Arena, reader: ShardReader) -> dict[str, Tensor]:
    """The tensors by target, in `arena`'s memory: of any shape, each in its filling's dtype."""
    placed = {}
    for filling in fillings:
        placed[filling.target] = arena.tensor(filling.shape, filling.dtype, filling.phase)
        filling.fill(placed[filling.target], reader)
    return placed


def read_into(place: Tensor, reader: ShardReader, info: TensorInfo) -> None:
    """Reads a tensor of any shape into contiguous `place` of the same shape, rounded to its dtype as `Tensor.to`
    rounds."""
    stored = TORCH_DTYPES[info.dtype]
    if stored == place.dtype:
        return reader.read_into(info.shard, info.begin, bytes_of(place))
    flat, step = place.view(-1), CAST_BYTES // stored.itemsize
    buffer = torch.empty(min(step, len(flat)), dtype=stored)
    for begin in range(0, len(flat), step):
        part = buffer[: len(flat) - begin]
        reader.read_into(info.shard, info.begin + begin * stored.itemsize, bytes_of(part))
        flat[begin : begin + len(part)].copy_(part)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor of any shape and dtype."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _dequantized(
    operation: ConversionOps, parts: dict[str, list[Tensor]], target: str, model: torch.nn.Module
) -> dict[str, Any]:
    """What transformers' operation makes of `parts`; those that dequantize need no patterns, as others of their base
    class do."""
    convert = cast(Callable[..., dict[str, Any]], operation.convert)
    return convert(parts, full_layer_name=target, model=model)


def _scales_of(pattern: str, scales: Mapping[str, list[str]]) -> list[tuple[str, list[str]]]:
    wanted = pattern.removesuffix("$") + BLOCK_SCALE
    return [(name, keys) for name, keys in scales.items() if name.removesuffix("$") == wanted]
