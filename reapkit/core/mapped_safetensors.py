"""Opens safetensors files as memory-mapped arrays, which are read only when they are used. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from reapkit.core.atomic_files import naming, reserve
from reapkit.core.dtypes import DTYPES
from reapkit.core.errors import UnusableError
from reapkit.core.safetensors_header import read_header

WRITTEN = {name: code for code in ("F64", "F32", "I64", "I32", "I16", "U8") if (name := DTYPES[code].numpy)}
"""The dtypes of the files that reapkit writes for itself: numpy's name to safetensors' code."""


def map_tensors(path: Path) -> dict[str, ndarray]:
    """Every tensor of a safetensors file as a read-only array by name, of any shape, in the file's dtype.

    Raises UnusableError where its header is not to be trusted or names another dtype than those of WRITTEN, or where
    the file is cut short meanwhile.
    """
    names = {code: name for name, code in WRITTEN.items()}
    tensors = {}
    for name, tensor in read_header(path).items():
        if tensor.dtype not in names:
            raise UnusableError(
                f"{path}: tensor {name} is {tensor.dtype}, a dtype that reapkit never writes. Run the stage that wrote"
                " the file again."
            )
        dtype = np.dtype(names[tensor.dtype]).newbyteorder("<")
        try:
            tensors[name] = (
                np.memmap(path, dtype, "r", tensor.begin, tensor.shape).view(ndarray)
                if tensor.nbytes
                else np.empty(tensor.shape, dtype)
            )
        except ValueError as error:  # cut short since its header was read
            raise UnusableError(f"{path}: {error}. Leave the file alone while it is read, and run again.") from None
    return tensors


def create_tensors(path: Path, shapes: Mapping[str, tuple[str, int]]) -> dict[str, np.memmap]:
    """A safetensors file of 1-d tensors, allocated at once and returned as writable memory maps [length] by name.

    `shapes`: each tensor's dtype, as WRITTEN spells it, and length.

    The bytes depend on names, dtypes, lengths and what is written, on nothing else. Wide types come first, which aligns
    all. Raises OSError where the disk has no room for the file.
    """
    order = sorted(shapes, key=lambda name: (-np.dtype(shapes[name][0]).itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        dtype, length = shapes[name]
        begin, end = end, end + np.dtype(dtype).itemsize * length
        header[name] = {"dtype": WRITTEN[dtype], "shape": [length], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with naming(path), path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
    reserve(path, 8 + len(text) + end)
    first = 8 + len(text)
    return {
        name: np.memmap(
            path,
            np.dtype(dtype).newbyteorder("<"),
            "r+",
            first + header[name]["data_offsets"][0] if length else 0,  # an empty map must not lie behind the end
            (length,),
        )
        for name, (dtype, length) in shapes.items()
    }


def as_arrays(frozen: Any, *names: str) -> None:
    """Makes arrays of these fields of a frozen dataclass, which may have been given as tensors on the CPU."""
    for name in names:
        object.__setattr__(frozen, name, np.asarray(getattr(frozen, name)))
