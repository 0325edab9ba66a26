"""Lists the dtypes of safetensors files: code, width, and the names in numpy and torch. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Dtype(NamedTuple):
    """One dtype: bits per element, and what numpy and torch call it (None where they have none of the kind)."""

    code: str
    bits: int
    numpy: str | None
    torch: str | None


DTYPES: Mapping[str, Dtype] = {
    dtype.code: dtype
    for dtype in (
        Dtype("F64", 64, "float64", "float64"),
        Dtype("I64", 64, "int64", "int64"),
        Dtype("U64", 64, "uint64", "uint64"),
        Dtype("F32", 32, "float32", "float32"),
        Dtype("I32", 32, "int32", "int32"),
        Dtype("U32", 32, "uint32", "uint32"),
        Dtype("F16", 16, "float16", "float16"),
        Dtype("BF16", 16, None, "bfloat16"),
        Dtype("I16", 16, "int16", "int16"),
        Dtype("U16", 16, "uint16", "uint16"),
        Dtype("F8_E4M3", 8, None, "float8_e4m3fn"),
        Dtype("F8_E5M2", 8, None, "float8_e5m2"),
        Dtype("F8_E8M0", 8, None, "float8_e8m0fnu"),
        Dtype("I8", 8, "int8", "int8"),
        Dtype("U8", 8, "uint8", "uint8"),
        Dtype("BOOL", 8, "bool", "bool"),
        Dtype("F4", 4, None, None),  # two elements lie in one byte, which torch reads as bytes
        Dtype("C64", 64, "complex64", None),  # no weight of a model is complex
    )
}
"""Every dtype that the safetensors format knows, by its code."""
BITS: Mapping[str, int] = {code: dtype.bits for code, dtype in DTYPES.items()}
"""Bits per element, by code."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Codes of the dtypes that store weights directly, without scales."""


@cache
def torch_dtypes() -> Mapping[str, torch.dtype]:
    """The torch dtype of every code that torch can read. Imports torch."""
    import torch

    return {code: getattr(torch, dtype.torch) for code, dtype in DTYPES.items() if dtype.torch is not None}
