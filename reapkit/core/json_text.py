"""JSON that others wrote, distrusted: what Python's parser takes beyond the standard is refused. Torch-free."""

from __future__ import annotations

import json
from math import isfinite
from typing import Any

MOST_DIGITS = 40
"""No count, size or time has more; numbers of thousands of digits cost minutes, or end in an error far from here."""


def parse_json(text: str | bytes, *, infinite: bool = False) -> Any:
    """The value of a JSON text. `infinite`: Infinity may stand in it, as configs of models with time steps have it.

    Raises ValueError for what is not JSON, for NaN, for numbers beyond any measure, for nesting too deep to follow.
    """

    def constant(name: str) -> float:
        if infinite and name != "NaN":
            return float(name)
        raise ValueError(f"it holds {name}, which is no number")

    try:
        return json.loads(text, parse_int=_integer, parse_float=_fraction, parse_constant=constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _fraction(digits: str) -> float:
    value = float(digits)
    if not isfinite(value):
        raise ValueError(f"it holds the number {digits[:MOST_DIGITS]}, which is too large")
    return value
