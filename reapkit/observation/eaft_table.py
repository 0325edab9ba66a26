"""The EAFT table: every position falls into one of 32 x 16 cells of (p, H), for calibrations whose exact trace would be
too large.

A cell holds what lies above the edge before it and not above its own. Edges stand at quantiles over the positions of
all sources and of each source alone; at the levels that recipes use most, two stand side by side, so that the quantile
itself is a cell and cuts exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np
from numpy import ndarray

from reapkit.core.errors import UnusableError
from reapkit.core.mapped_safetensors import as_arrays

P_CELLS, H_CELLS = 32, 16
P_EXACT, H_EXACT = ("0.15", "0.5"), ("0.15", "0.5", "0.85")
P_LEVELS = (
    "0.01",
    "0.02",
    "0.03",
    "0.05",
    "0.07",
    "0.1",
    "0.125",
    "0.175",
    "0.2",
    "0.225",
    "0.25",
    "0.275",
    "0.3",
    "0.325",
    "0.35",
    "0.4",
    "0.45",
    "0.6",
    "0.7",
    "0.75",
    "0.8",
    "0.9",
    "0.95",
)
H_LEVELS = ("0.1", "0.2", "0.9")
TOLERANCE = Fraction("0.02")
"""How far a realised quantile may be from the one asked for."""
COLUMNS = ("positions", "count", "gate_norm_sum")


@dataclass(frozen=True, eq=False)
class EaftTable:
    """Sums by cell. `p_edges` float32 [S, 31], `h_edges` float32 [S, 15]: ascending, equal ones leave the cell between
    them empty. `positions` int64 [S, 32, 16]: positions with a signal. `count`, `gate_norm_sum` float64 [L, S, 32, 16,
    E]: N and Σgn of those routed to the expert.
    """

    p_edges: ndarray
    h_edges: ndarray
    positions: ndarray
    count: ndarray
    gate_norm_sum: ndarray

    def __post_init__(self) -> None:
        as_arrays(self, *self.__dataclass_fields__)

    def __len__(self) -> int:
        return int(self.positions.sum())

    def tensors(self) -> dict[str, ndarray]:
        """The fields by the names they are saved under, `eaft_table.positions` int64 [S, 32, 16] and so on."""
        return {f"eaft_table.{name}": tensor for name, tensor in vars(self).items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, ndarray]) -> EaftTable | None:
        """The inverse of `tensors` (`eaft_table.positions` int64 [S, 32, 16] and so on); None where there is no table
        among them."""
        if "eaft_table.positions" not in tensors:
            return None
        return cls(**{name: tensors[f"eaft_table.{name}"] for name in cls.__dataclass_fields__})


def cell_edges(
    values: ndarray, source: ndarray, num_sources: int, exact: Sequence[str], levels: Sequence[str]
) -> ndarray:
    """Edges [S, n] float32 at quantiles (the ⌈a·n⌉-th smallest) of all values and of each source's; infinity where
    there are none."""
    pooled = _edges_of(values, exact, levels)
    rows = [np.concatenate([pooled, _edges_of(values[source == index], exact, ())]) for index in range(num_sources)]
    return np.sort(np.stack(rows), axis=1)


def _edges_of(values: ndarray, exact: Sequence[str], levels: Sequence[str]) -> ndarray:
    ordered = np.sort(values.astype(np.float32))
    at = {level: _at(ordered, level) for level in (*exact, *levels)}
    doubled = [math.nan if math.isinf(at[level]) else at[level] for level in exact]
    below = np.nextafter(np.array(doubled, np.float32), np.float32(-math.inf))
    return np.concatenate(
        [np.where(np.isnan(below), np.float32(math.inf), below), np.array(list(at.values()), np.float32)]
    )


def _at(ordered: ndarray, level: str) -> float:
    return float(ordered[max(1, math.ceil(Fraction(level) * len(ordered))) - 1]) if len(ordered) else math.inf


def cells_of(p: ndarray, h: ndarray, source: ndarray, p_edges: ndarray, h_edges: ndarray) -> ndarray:
    """The number of each position's cell, counted through sources, p and H: int64 [n]."""
    cell = np.zeros(len(p), np.int64)
    for index in range(len(p_edges)):
        mine = source == index
        row = np.searchsorted(p_edges[index], p[mine]) * H_CELLS + np.searchsorted(h_edges[index], h[mine])
        cell[mine] = index * P_CELLS * H_CELLS + row
    return cell


@dataclass(frozen=True)
class Border:
    """A threshold as a float32 value, and the quantile it realises."""

    value: float
    realised: float


def border(
    edges: ndarray, counts: ndarray, alphas: Sequence[Fraction], level: Decimal, name: str, *, upward: bool = False
) -> Border:
    """The threshold nearest to quantile `level` of the sources weighed by α that the cells can cut at: what is not
    above it (`upward`: not below it) are whole cells.

    `edges` float32 [S, n], ascending; `counts` int64 [S, n + 1]: positions by source and cell. Raises UnusableError
    where it is off by more than TOLERANCE.
    """
    used = [index for index, alpha in enumerate(alphas) if alpha and int(counts[index].sum())]
    if not used:
        return Border(math.nan, float(level))
    total = sum(alphas[index] * int(counts[index].sum()) for index in used)
    common = sorted(set.intersection(*(set(edges[index].tolist()) for index in used)) - {math.inf})
    shares = [
        sum(alphas[index] * _not_above(edges[index], counts[index], edge) for index in used) / total for edge in common
    ]
    reached = next((place for place, share in enumerate(shares) if share >= Fraction(level)), len(common))
    if 0 < reached < len(common) and common[reached - 1] == _next(common[reached], -math.inf):
        return Border(common[reached], float(level))
    candidates = [(shares[place], common[place]) for place in (reached - 1, reached) if 0 <= place < len(common)]
    candidates += [(Fraction(0), -math.inf)] * (reached == 0) + [(Fraction(1), math.inf)] * (reached == len(common))
    share, edge = min(candidates, key=lambda each: abs(each[0] - Fraction(level)))
    if abs(share - Fraction(level)) > TOLERANCE:
        raise UnusableError(
            f"saliency.eaft: {name} {level} is not available in this observation's table of p and H; the nearest"
            f" quantile is {float(share):.3f}, which differs by more than {float(TOLERANCE):g}. Choose"
            f" {float(share):.3f} or a common level such as 0.15, or raise observe.trace_bytes and observe again for"
            " the exact trace."
        )
    return Border(_next(edge, math.inf) if upward else edge, float(share))


def _not_above(edges: ndarray, counts: ndarray, edge: float) -> int:
    return int(counts[: int(np.searchsorted(edges, np.float32(edge), side="right"))].sum())


def _next(value: float, towards: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(towards)))


def cell_bounds(edges: ndarray) -> tuple[ndarray, ndarray]:
    """The least and the greatest value that each cell can hold, float32 [n + 1] each, of one source's edges [n]."""
    infinite = np.array([math.inf], np.float32)
    return np.nextafter(np.concatenate([-infinite, edges]), infinite), np.concatenate([edges, infinite])
