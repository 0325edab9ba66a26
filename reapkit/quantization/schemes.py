"""Lists the weight-only quantization schemes, one record each. Torch-free.

A record in `SCHEMES` is all that a scheme takes: plans, checks, sizes, cards and the README read it there. Which
engine serves a scheme is said in `engines.py`. Every scheme is symmetric: transformers loses zero points when it loads
experts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from reapkit.core.errors import Problem, RecipeError
from reapkit.recipe.schema import QuantizeSpec


@dataclass(frozen=True)
class Scheme:
    """How a scheme stores one matrix [rows, columns]; the names are compressed-tensors' presets.

    `group`: columns that share a scale (None: one scale per row); `fixed`: the group is part of the format, else the
    recipe chooses it. `rows_per_scale` > 1 for blocks. `scale_bits` None: as the source's weights. `constant_bits`: per
    matrix. `experts_reload`: whether transformers 5.17 reads routed experts in this format; engines that keep one
    module per expert (vLLM) read all of them. `suggested`: whether advice offers it as the next larger scheme.
    """

    name: str
    bits: int
    group: int | None
    scale_bits: int | None
    fixed: bool
    meaning: str
    constant_bits: int = 0
    rows_per_scale: int = 1
    kind: Literal["int", "float"] = "int"
    experts_reload: bool = True
    suggested: bool = False

    def nbytes(self, rows: int, columns: int, group_size: int, weight_bits: int = 16) -> int:
        """Bytes of one quantized matrix: packed weights, scales (as wide as the source's weights unless the format
        says) and the rest."""
        group = (self.group if self.fixed else group_size) or columns
        words = -(-columns * self.bits // 32) * 32 if self.kind == "int" else columns * self.bits
        scales = -(-rows // self.rows_per_scale) * -(-columns // group)
        return (rows * words + scales * (self.scale_bits or weight_bits) + self.constant_bits) // 8

    def refused_by(self, method: str) -> str | None:
        """Why a method cannot do this scheme; None: it can."""
        return INTEGER_METHODS.get(method) if self.kind == "float" else None


INTEGER_METHODS = {"awq": "awq scales weights for integer schemes", "autoround": "autoround tunes integer rounding"}
"""Methods that do integer schemes only, and why."""


def _integer(bits: int, *, suggested: bool = False) -> Scheme:
    shape = 2 * 64  # pack-quantized stores `weight_shape`, two int64
    meaning = f"{bits}-bit integers, a scale per group of columns"
    return Scheme(f"W{bits}A16", bits, 128, None, False, meaning, constant_bits=shape, suggested=suggested)


SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        *(_integer(bits, suggested=bits in (3, 4, 8)) for bits in range(2, 9)),
        Scheme("FP8_DYNAMIC", 8, None, None, True, "8-bit floats, a scale per row", kind="float"),
        Scheme(
            "FP8_BLOCK",
            8,
            128,
            None,
            True,
            "8-bit floats, a scale per block of 128 rows and 128 columns",
            rows_per_scale=128,
            kind="float",
            experts_reload=False,
        ),
        Scheme("MXFP4A16", 4, 32, 8, True, "4-bit floats, a power of two per 32 columns", kind="float"),
        Scheme(
            "MXFP8A16",
            8,
            32,
            8,
            True,
            "8-bit floats, a power of two per 32 columns",
            kind="float",
            experts_reload=False,
        ),
        Scheme(
            "NVFP4A16",
            4,
            16,
            8,
            True,
            "4-bit floats, an 8-bit float scale per 16 columns and one scale per matrix",
            constant_bits=32,
            kind="float",
            experts_reload=False,
        ),
    )
}


@dataclass(frozen=True)
class Refusal:
    """Presets of compressed-tensors that no recipe may name, and what to say of them."""

    names: re.Pattern[str]
    reason: str


REFUSED = (
    Refusal(
        re.compile(r"^W4A16_ASYM$"),
        "stores zero points, which transformers loses when it loads experts. Choose a symmetric scheme:",
    ),
    Refusal(
        re.compile(r"^(?:W\dA[48]|W4AFP8|W8A8|INT8|FP8|NVFP4|MXFP4|MXFP8)$"),
        "quantizes activations too, and reapkit quantizes weights only. Choose one of",
    ),
)


def scheme_of(spec: QuantizeSpec) -> Scheme:
    """The scheme that `quantize.scheme` names, in upper or lower case. Raises RecipeError listing the known ones."""
    if problem := scheme_problem(spec):
        raise RecipeError([problem])
    return SCHEMES[str(spec.scheme).upper()]


def scheme_problem(spec: QuantizeSpec) -> Problem | None:
    """What is wrong with the name that a recipe gives, and which names are allowed; None: it names a scheme."""
    name, allowed = str(spec.scheme).upper(), ", ".join(SCHEMES)
    if name in SCHEMES:
        return None
    if refusal := next((each for each in REFUSED if each.names.match(name)), None):
        return Problem("quantize.scheme", f"{spec.scheme} {refusal.reason} {allowed}.")
    near = difflib.get_close_matches(name, SCHEMES, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return Problem(
        "quantize.scheme", f"'{spec.scheme}' is not a known scheme.{hint} Allowed: {allowed}, or null for none."
    )


def schemes_table() -> str:
    """README's table of the schemes, in Markdown: bits per weight of a large bf16 matrix in groups of 128."""
    rows = "\n".join(
        f"| {scheme.name} | {scheme.meaning} | {_bits_per_weight(scheme):.4g} |" for scheme in SCHEMES.values()
    )
    return f"| scheme | stores | bits per weight |\n|---|---|---|\n{rows}"


def _bits_per_weight(scheme: Scheme) -> float:
    rows, columns = 4096, 8192
    return (scheme.nbytes(rows, columns, 128) * 8 - scheme.constant_bits) / (rows * columns)
