"""Computes what the page shows at each position of its slider: 0 to E - 1 experts of every layer removed and, last, the
decided cut if there is a selection. The page's script only picks."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from reapkit.core.formatting import mean, number, percent
from reapkit.report.view import View, decided_label, removal_rank
from reapkit.selection import statistics

SENTENCES = {
    "cut": (
        "{shape}; the cut is at {floor}, {share} of the highest. The removed experts hold {lost} of the layer's mass."
    ),
    "nothing": "{shape}; no routed expert is removed here.",
    "nobody": "No token was routed to this layer's experts.",
}
"""About a layer's saliencies: where the cut lies, where it takes nothing that was routed, where nothing was."""


@dataclass(frozen=True)
class Position:
    """One cut; lists by layer, None where a number does not exist."""

    label: str
    removed: float
    traffic: float | None
    mass: float | None
    floors: list[float | None]
    tail_risks: list[float | None]
    coverage: list[float | None]
    chance: list[float | None]
    lost: list[float | None]

    @property
    def readout(self) -> str:
        """What goes, in a sentence."""
        if not self.removed:
            return "Nothing removed."
        covered = mean(self.coverage)
        return (
            f"Removes {percent(self.traffic)} of the routed traffic and {percent(self.mass)} of the saliency mass;"
            f" random: {percent(self.removed)}. Tail risk {percent(mean(self.tail_risks), 0)}"
            + (f", redundancy coverage {percent(covered, 0)}." if covered is not None else ".")
        )


def positions(view: View) -> Iterator[Position]:
    """Every position, in the slider's order."""
    rank = removal_rank(view.saliency)
    unknown = np.full(view.saliency.shape, np.nan)
    together = view.coactivation
    curves = unknown if together is None else coverage_curves(together, statistics.removal_order(view.saliency))
    for size in range(view.experts):
        coverage = _known(curves[:, size])
        yield position(view, rank < size, coverage, f"{size} of {view.experts} ({percent(size / view.experts, 0)})")
    if view.selection is not None:
        coverage = statistics.redundancy_coverage(view.coactivation, view.dropped)
        yield position(view, view.dropped, coverage, decided_label(view))


def position(view: View, dropped: ndarray, coverage: list[float | None], label: str = "") -> Position:
    """The numbers of the cut that drops `dropped`, bool [L, E]."""
    chance = statistics.chance_coverage(dropped)
    return Position(
        label,
        float(dropped.mean()),
        statistics.share_deleted(view.summed.count, dropped),
        statistics.share_deleted(view.summed.gate_norm_sum, dropped),
        statistics.floors(view.saliency, dropped),
        statistics.tail_risks(view.summed.gate_norm_max, dropped),
        coverage,
        [share if some else None for share, some in zip(chance, np.any(dropped, 1).tolist(), strict=True)],
        [statistics.share_deleted(*pair) for pair in zip(view.summed.gate_norm_sum, dropped, strict=True)],
    )


def coverage_curves(coactivation: ndarray, order: ndarray) -> ndarray:
    """Redundancy coverage of each layer when its k least salient experts go, k = 0 … E - 1: float64 [L, E], NaN where
    undefined.

    `coactivation` [L, E, E], `order` int64 [L, E], first to go first. One cumulative sum per layer gives all k.
    """
    layers, experts = order.shape
    curves = np.full((layers, experts), np.nan)
    for layer in range(layers):
        pairs = coactivation[layer][np.ix_(order[layer], order[layer])].astype(np.float64)
        np.fill_diagonal(pairs, 0)
        beside = pairs.sum(1).cumsum()
        among = pairs.cumsum(0).cumsum(1).diagonal()
        with np.errstate(invalid="ignore"):
            curves[layer, 1:] = ((beside - among) / beside)[: experts - 1]
    return curves


def distribution_sentence(view: View, row: int) -> str:
    """About one layer's saliencies and the cut that the page starts with."""
    shape, top = _shape(view.saliency[row])
    if shape is None:
        return SENTENCES["nobody"]
    at = position(view, view.dropped, [None] * len(view.layers))
    words = _words(at.floors[row], top, at.lost[row])
    return SENTENCES["cut" if words else "nothing"].format(shape=shape, **words)


def page_data(view: View) -> dict[str, Any]:
    """Matrices, labels and sentences for the page's script."""
    found = list(positions(view))
    data: dict[str, Any] = {
        "layers": list(view.layers),
        "experts": view.experts,
        "sources": list(view.observation.sources),
        "routed": np.maximum(view.summed.count.sum(1), 1).tolist(),
        "positions": {
            name: [getattr(at, name) for at in found] for name in ("label", "readout", "removed", "traffic", "mass")
        },
        "distribution": _distribution(view, found),
    }
    if view.selection is not None:
        data["decidedRemoved"] = round(view.removed_share * view.experts)
    return data | {"matrices": _matrices(view, found)}


def _matrices(view: View, found: list[Position]) -> dict[str, Any]:
    """By expert [L, E], and by position [L, positions]."""
    specialised = statistics.specialisation(view.observation)
    lifts = specialised * len(view.observation.sources)
    dominant = np.where(view.observation.statistics["count"].sum(1) > 0, specialised.argmax(1), 255)
    matrices = {
        "saliency": packed(view.saliency, "f4"),
        "rank": packed(removal_rank(view.saliency), "i2"),
        "count": packed(view.summed.count, "f4"),
        "dominant": packed(dominant, "u1"),
        **{f"lift{index}": packed(lifts[:, index], "f4") for index in range(len(view.observation.sources))},
    }
    for name in ("floors", "tail_risks", "coverage", "chance"):
        matrices[name] = packed(np.array([getattr(at, name) for at in found], np.float64).T, "f4")
    if view.selection is not None:
        matrices["decided"] = packed(view.dropped, "u1")
    return matrices


def _distribution(view: View, found: list[Position]) -> dict[str, Any]:
    """What SENTENCES are filled with: `shape` by layer, the others by layer and position; null where there is none."""
    shapes = [_shape(values) for values in view.saliency]
    words = [
        [_words(at.floors[row], top, at.lost[row]) for at in found] if shape is not None else []
        for row, (shape, top) in enumerate(shapes)
    ]
    by_name = {name: [[each.get(name) for each in row] for row in words] for name in ("floor", "share", "lost")}
    return {"sentences": SENTENCES, "shape": [shape for shape, _ in shapes], **by_name}


def _shape(values: ndarray) -> tuple[str | None, float]:
    """(median and highest in words, the highest) of a layer's saliencies; None where nothing was routed."""
    ordered = np.sort(values[np.isfinite(values)])
    if not ordered.size:
        return None, 0.0
    median, top = float(ordered[(len(ordered) - 1) // 2]), float(ordered[-1])  # of two in the middle the lower
    return f"Median {number(median)}, highest {number(top)}", top


def _words(floor: float | None, top: float, lost: float | None) -> dict[str, str]:
    """Where a layer's cut lies; nothing where it takes nothing that was routed."""
    if floor is None or top <= 0:
        return {}
    return {"floor": number(floor), "share": percent(floor / top, 0), "lost": percent(lost, 0)}


def _known(values: ndarray) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]


def packed(matrix: ndarray, dtype: str) -> dict[str, Any]:
    """A matrix [L, n] of numbers as little-endian bytes in base64, rounded to `dtype` (`f4`, `i2` or `u1`): a quarter
    of its size as JSON text."""
    values = np.ascontiguousarray(matrix, f"<{dtype}")
    return {"shape": list(matrix.shape), "dtype": dtype, "base64": base64.b64encode(values.tobytes()).decode()}
