"""Reads and checks the header of a safetensors file: its offsets must cover the file without gaps and fit dtypes and
shapes. Torch-free."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from math import prod
from operator import eq, itemgetter, sub
from pathlib import Path
from typing import Any, NamedTuple

from reapkit.core.dtypes import BITS
from reapkit.core.errors import UnusableError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit: a forged length must not make us allocate the file's size
FIRST_READ_BYTES = 1 << 16  # holds most headers, which then cost one read


class TensorInfo(NamedTuple):
    """One tensor of a shard: safetensors dtype code, shape, and its bytes [begin, end) as absolute offsets in the
    shard."""

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
    return tensors_of(path, *read_header_text(path))


def tensors_of(path: Path, size: int, text: bytes) -> dict[str, TensorInfo]:
    shard, base = path.name, 8 + len(text)
    try:
        header = _parse_header(text)
        header.pop("__metadata__", None)
        found = _parse_entries(header, shard, base)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UnusableError(
            f"{path}: the header is not a valid safetensors header ({type(error).__name__}: {error}). Download it"
            " again."
        ) from None
    if not _tiles(found, base, size):
        found.sort(key=itemgetter(4, 5))  # begin, end
        _refuse_gaps(path, found, base, size)
    return {tensor.name: tensor for tensor in found}


def _tiles(found: Sequence[TensorInfo], base: int, size: int) -> bool:
    """Whether the tensors follow each other to the file's end in the order in which they are listed, each as long as
    its shape says."""
    if not found:
        return base == size
    _, dtypes, shapes, _, begins, ends = zip(*found, strict=True)
    nbits = {
        (dtype, shape): prod(shape) * BITS.get(dtype, -1) for dtype, shape in set(zip(dtypes, shapes, strict=True))
    }
    return (
        begins == (base, *ends[:-1])
        and ends[-1] == size
        and all(
            map(
                eq,
                (8 * nbytes for nbytes in map(sub, ends, begins)),
                map(nbits.__getitem__, zip(dtypes, shapes, strict=True)),
            )
        )
    )


def _refuse_gaps(path: Path, found: Iterable[TensorInfo], base: int, size: int) -> None:
    """Raises UnusableError where tensors in the order of their bytes leave a gap, overlap, or do not fit their
    shapes."""
    position = base
    for name, dtype, shape, _, begin, end in found:
        bits = BITS.get(dtype)
        if bits is None:
            raise UnusableError(f"{path}: tensor {name} has unknown dtype {dtype}. Upgrade reapkit.")
        if begin != position or (end - begin) * 8 != prod(shape) * bits:
            raise UnusableError(
                f"{path}: tensor {name} has offsets {begin - base}..{end - base} that do not fit its shape. "
                "Download it again."
            )
        position = end
    if position != size:
        raise UnusableError(
            f"{path}: the file has {size} bytes, but its header describes {position}. Download it again."
        )


def read_header_text(path: Path) -> tuple[int, bytes]:
    """The file's size and its header, in as few system calls as that takes: shards come by the thousand."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        size, start = os.fstat(file).st_size, os.read(file, FIRST_READ_BYTES)
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise UnusableError(f"{path}: not a safetensors file, or truncated ({size} bytes). Download it again.")
        while len(start) < 8 + length and (more := os.read(file, 8 + length - len(start))):
            start += more
    finally:
        os.close(file)
    return size, start[8 : 8 + length]


def _parse_header(text: bytes) -> dict[str, Any]:
    """The header as JSON. Raises ValueError where it gives a name twice, of which a parser would keep one.

    Names given twice leave quotes in the text for which nothing parsed accounts; only then the text is parsed pair by
    pair. Half a character in JSON's escapes, which the format's own parser refuses too, is a ValueError as well.
    """
    header = json.loads(text)
    metadata = header.get("__metadata__")
    expected = 10 * (len(header) - 1) + 2 + 4 * len(metadata) if isinstance(metadata, dict) else 10 * len(header)
    if text.count(b'"') == expected and b"\\" not in text:
        return header
    json.dumps(header, ensure_ascii=False).encode()
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


_INTEGERS = {int}  # and not bool, which Python counts among the integers


def _parse_entries(header: Mapping[str, Any], shard: str, base: int) -> list[TensorInfo]:
    """Every value of the type and sign that the format demands, looked at for all tensors together: there may be
    100,000."""
    "".join(header).encode()  # a lone surrogate could not be written back
    dtypes, shapes = [entry["dtype"] for entry in header.values()], [tuple(entry["shape"]) for entry in header.values()]
    begins, ends = [], []
    for entry in header.values():
        begin, end = entry["data_offsets"]
        begins.append(begin)
        ends.append(end)
    numbers = list(chain(begins, ends, *shapes))
    if not set(map(type, dtypes)) <= {str} or not set(map(type, numbers)) <= _INTEGERS or min(numbers, default=0) < 0:
        each = zip(header, dtypes, shapes, begins, ends, strict=True)
        name = next(
            name
            for name, dtype, shape, *span in each
            if type(dtype) is not str or set(map(type, (*span, *shape))) != _INTEGERS or min(*span, *shape) < 0
        )
        raise ValueError(f"tensor {name} has a dtype, shape or offset of a wrong kind")
    return [
        TensorInfo(name, dtype, shape, shard, base + begin, base + end)
        for name, dtype, shape, begin, end in zip(header, dtypes, shapes, begins, ends, strict=True)
    ]
