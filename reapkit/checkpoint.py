"""A checkpoint on disk as its config and safetensors headers describe it; no weight is read. Torch-free."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from reapkit.architecture import Architecture
from reapkit.errors import UnusableError
from reapkit.hashing import digest, digest_file

DTYPE_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
              "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4, "C64": 64}
HASHED_SHARD_BYTES = 64_000_000  # a tenth of a second; larger shards are hashed while observe first reads them
MAX_HEADER_BYTES = 100_000_000  # the format's own limit: a forged length must not make us allocate the file's size


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a shard: safetensors dtype code, shape, and its bytes [begin, end) as absolute offsets in the shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def numel(self) -> int:
        return prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, header distrusted: offsets must tile the file and match dtype and shape.

    Raises UnusableError naming the file where it is truncated or inconsistent.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise UnusableError(f"{path}: not a safetensors file, or cut short ({size} bytes). Download it again.")
        header = _parse_header(path, stream.read(length))
    base, tensors, position = 8 + length, {}, 0
    for name, (dtype, shape, begin, end) in sorted(header.items(), key=lambda item: item[1][2:]):
        bits = DTYPE_BITS.get(dtype)
        if bits is None:
            raise UnusableError(f"{path}: tensor {name} has unknown dtype {dtype}. Upgrade reapkit.")
        if begin != position or (end - begin) * 8 != prod(shape) * bits:
            raise UnusableError(f"{path}: tensor {name} has offsets {begin}..{end} that do not fit its shape. Download it "
                                "again.")
        position = end
        tensors[name] = TensorInfo(name, dtype, shape, path.name, base + begin, base + end)
    if base + position != size:
        raise UnusableError(f"{path}: holds {size} bytes where its header says {base + position}. Download it again.")
    return tensors


def _parse_header(path: Path, text: bytes) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """name -> (dtype, shape, begin, end), every value of the type and sign that the format demands, every name once."""
    try:
        entries = json.loads(text, object_pairs_hook=_unique)
        entries.pop("__metadata__", None)
        return {name: _parse_entry(name, entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UnusableError(f"{path}: its header is no safetensors header ({type(error).__name__}: {error}). Download it "
                            "again.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _parse_entry(name: str, entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    name.encode()  # a lone surrogate could not be written back
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if type(dtype) is not str or any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise ValueError(f"tensor {name} has a dtype, shape or offset of a wrong kind")
    return dtype, shape, begin, end


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard; shards lie in the directory itself. Raises UnusableError where the index says anything else."""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        wrong = [shard for shard in weight_map.values() if type(shard) is not str or shard != Path(shard).name or "\0" in shard]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UnusableError(f"{path}: no index of shards ({type(error).__name__}: {error}). Download it again.") from None
    if wrong:
        raise UnusableError(f"{path}: names the shard {wrong[0]!r}, which is no file of this directory. Download it again.")
    return weight_map


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A complete model directory: config, tensors by name, files."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: str | os.PathLike) -> Checkpoint:
        """Reads config.json and every shard's header. Raises UnusableError naming what is missing."""
        path = Path(path)
        if not (path / "config.json").is_file():
            raise UnusableError(f"{path}: no config.json there. Give a model directory or a hub id.")
        try:
            config = json.loads((path / "config.json").read_text())
        except (ValueError, RecursionError) as error:
            raise UnusableError(f"{path / 'config.json'}: not JSON ({error}).") from None
        if not isinstance(config, dict):
            raise UnusableError(f"{path / 'config.json'}: no JSON object. Download it again.")
        index = path / "model.safetensors.index.json"
        if index.is_file():
            weight_map = _read_index(index)
            shards = sorted(set(weight_map.values()))
        else:
            weight_map, shards = None, sorted(file.name for file in path.glob("*.safetensors"))
        if not shards:
            raise UnusableError(f"{path}: no safetensors weights there. reapkit reads safetensors only; convert .bin files "
                                "first.")
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            if not (path / shard).is_file():
                raise UnusableError(f"{path}: shard {shard} is missing. Download it again.")
            found = read_header(path / shard)
            if weight_map is not None:  # of two tensors of one name the index chooses
                found = {name: tensor for name, tensor in found.items() if weight_map.get(name, shard) == shard}
            if twice := next((name for name in found if name in tensors), None):
                raise UnusableError(f"{path}: tensor {twice} lies in {tensors[twice].shard} and in {shard}. Remove the stale "
                                    "one.")
            tensors.update(found)
        if weight_map is not None and (lost := sorted(set(weight_map) - set(tensors))):
            raise UnusableError(f"{path}: the index names {len(lost)} tensors that no shard holds, such as {lost[0]}.")
        return cls(path, config, tensors)

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture.from_config(self.config)

    @cached_property
    def shards(self) -> tuple[str, ...]:
        return tuple(sorted({tensor.shard for tensor in self.tensors.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def numel(self) -> int:
        return sum(tensor.numel for tensor in self.tensors.values())

    @cached_property
    def identity(self) -> str:
        """What names this checkpoint in keys: config, headers and each shard's content where it is small, else its size and
        mtime."""
        tensors = [(t.name, t.dtype, t.shape, t.shard, t.begin) for t in self.tensors.values()]
        return digest({"config": self.config, "tensors": sorted(tensors), "shards": [_shard_identity(self.path / s) for s in self.shards]})


def _shard_identity(path: Path) -> list[str | int]:
    """Hub caches name a shard by its sha256 and link to it; small files are hashed; others count as changed when touched."""
    resolved, stat = path.resolve(), path.stat()
    if len(resolved.name) == 64 and resolved.parent.name == "blobs":
        return [path.name, resolved.name]
    if stat.st_size <= HASHED_SHARD_BYTES:
        return [path.name, digest_file(path)]
    return [path.name, stat.st_size, stat.st_mtime_ns]
