"""Formats numbers and lists for people. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

Name = TypeVar("Name")


def percent(share: float | None, digits: int = 1) -> str:
    """`0.1234` as `12.3 %`; None as a dash; what would round to nothing as `< 0.1 %`."""
    if share is None or not math.isfinite(share):
        return "–"
    least = 10.0**-digits
    return f"< {least:g} %" if 0 < 100 * share < least / 2 else f"{100 * share:.{digits}f} %"


def exact_percent(share: float | None, digits: int = 1) -> str:
    """`0.1234` as `12.3 %`, however small; None as a hyphen."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def signed_percent(share: float) -> str:
    """`0.012` as `+1.2 %`."""
    return f"{100 * share:+.1f} %"


def narrow_percent(share: float | None, digits: int = 1) -> str:
    """`0.1234` as `12.3%`, as columns of a terminal have it; None as a hyphen."""
    return "-" if share is None else f"{share:.{digits}%}"


def decimal(value: float | None, digits: int = 3) -> str:
    """So many decimals; None as a hyphen."""
    return "-" if value is None else f"{value:.{digits}f}"


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent where people can do without."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def count(value: int | float) -> str:
    """1234567 as `1,234,567`."""
    return f"{value:,.0f}"


def listed(items: Iterable[object], limit: int = 6) -> str:
    """`a, b and c`; past the limit `a, b, c and 4 more`."""
    items = [str(item) for item in items]
    if len(items) > limit:
        items = [*items[: limit - 1], f"{len(items) - limit + 1} more"]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else "none"


def counted(amounts: Mapping[str, int]) -> str:
    """`14 saliency, 2 cap`; nothing as a hyphen."""
    return ", ".join(f"{amount:,} {name}" for name, amount in amounts.items()) or "-"


def arrow(before: str, after: str) -> str:
    """`7.3 MB → 1.9 MB`, which breaks at the arrow alone."""
    return " → ".join(text.replace(" ", "\u00a0") for text in (before, after))


def plural(amount: int, noun: str, many: str = "") -> str:
    """`1 layer`, `2 layers`."""
    return f"{count(amount)} {noun if amount == 1 else many or noun + 's'}"


def seconds(value: float | None) -> str:
    """`0.4 s`, `3 min 20 s`, `2 h 5 min`."""
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def extreme(values: Sequence[float], names: Sequence[Name], *, largest: bool = True) -> tuple[Name, float]:
    """The (name, value) of the largest or smallest value. Raises ValueError where there is none."""
    return (max if largest else min)(zip(names, values, strict=True), key=lambda pair: pair[1])


def known_extreme(
    values: Sequence[float | None], names: Sequence[Name], *, largest: bool = True
) -> tuple[Name, float] | None:
    """The (name, value) of the largest or smallest known value; None where none is known."""
    known = [(name, value) for name, value in zip(names, values, strict=True) if value is not None]
    return extreme([value for _, value in known], [name for name, _ in known], largest=largest) if known else None


def ranges(layers: Sequence[int]) -> str:
    """`0, 3-5` for [0, 3, 4, 5]."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def human_bytes(count: int | None) -> str:
    """Bytes in decimal units: 7.3 MB."""
    if count is None:
        return "-"
    value, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.3g} {units[0]}"


def byte_unit(nbytes: int) -> tuple[str, float]:
    """The decimal unit that suits a size, and the bytes in it: ("GB", 1e9)."""
    units = [("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)]
    return next(((unit, size) for unit, size in units if nbytes >= size), ("B", 1.0))


def gigabytes(nbytes: int | float, precision: str = ".1f") -> str:
    """Bytes in 10^9, whatever their size, as one compares what is needed with what is free: `0.3 GB`."""
    return f"{nbytes / 1e9:{precision}} GB"


def human_count(count: int) -> str:
    """A count in thousands, millions, billions: 3.62 M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return str(count)


def human_experts(experts: Mapping[Any, int]) -> str:
    """`32` where every layer has as many, else the range."""
    low, high = min(experts.values()), max(experts.values())
    return str(low) if low == high else f"{low} to {high}"
