"""Computes statistics of a base and a candidate over rows, per source and over all sources, each with its paired
interval.

Rows are the unit of resampling, because positions of one row depend on each other. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reapkit.evaluation.gates import UNION
from reapkit.evaluation.metrics.bootstrap import RESAMPLES, Sums, bootstrap_weights, measurement, measurements
from reapkit.evaluation.metrics.signals import (
    HISTOGRAM_BINS,
    PositionSignals,
    Thresholds,
    histogram_cell,
    js_distance,
    kl_by_confidence,
    quantile,
    thresholds,
)

QUANTILE_RESAMPLES = 200
KL_QUANTILES = {"kl_median": "0.5", "kl_p90": "0.9", "kl_p99": "0.99"}


@dataclass(frozen=True, eq=False)
class RowIndex:
    """Which measured positions belong to which row, and which row to which source.

    `offsets` `[rows + 1]` int64, `source` `[rows]` int64 index into `sources`; `outside` names sources that do not
    count in the union, because the calibration mix does not hold them.
    """

    offsets: Tensor
    source: Tensor
    sources: tuple[str, ...]
    outside: frozenset[str] = frozenset()

    @property
    def num_rows(self) -> int:
        return self.source.numel()

    @property
    def row_of_position(self) -> Tensor:
        """The row of each measured position, int64 `[n]`."""
        return torch.repeat_interleave(torch.arange(self.num_rows), self.offsets.diff())

    @property
    def source_of_position(self) -> Tensor:
        """The source of each measured position, int64 `[n]`."""
        return self.source[self.row_of_position]

    @property
    def in_union(self) -> Tensor:
        """Rows whose source counts in the union, bool `[rows]`."""
        counted = torch.tensor([name not in self.outside for name in self.sources], dtype=torch.bool)
        return counted[self.source]

    def sum_rows(self, values: Tensor) -> Tensor:
        """Σ over each row's positions of `[n]`, float64 `[rows]`."""
        return torch.zeros(self.num_rows, dtype=torch.float64).index_add_(0, self.row_of_position, values.double())

    def groups(self) -> dict[str, Tensor]:
        """Row indices, int64 `[rows of the group]`, of the union and of each source that has measured positions, in the
        sources' order."""
        filled = self.offsets.diff() > 0
        chosen = {UNION: filled & self.in_union} | {
            name: filled & (self.source == i) for i, name in enumerate(self.sources)
        }
        return {name: rows.nonzero().squeeze(1) for name, rows in chosen.items() if rows.any()}


def regions(positions: PositionSignals, index: RowIndex, eaft: Mapping[str, Any]) -> Thresholds:
    """The conflict thresholds of `positions`, each `[n]` float32; `eaft` = `{"p_low", "h_low", "thresholds": "pooled" |
    "per-source"}`."""
    pooled = index.in_union[index.row_of_position] if eaft["thresholds"] == "pooled" else None
    return thresholds(positions, index.source_of_position, pooled, eaft["p_low"], eaft["h_low"])


def summarize_base(
    base: PositionSignals, index: RowIndex, limits: Thresholds, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Per group (`all` and each source): rows, positions, nll (nats per position), perplexity, p_mean, entropy_mean,
    conflict_rate, each a `{"value", "interval"}` but for the counts.

    `base` and `limits` hold the `n` measured positions of `index`, in its order.
    """
    per_row = {
        "n": torch.ones(len(base)),
        "nll": base.nll,
        "p": base.p,
        "entropy": base.entropy,
        "conflict": limits.conflict(base),
    }
    sums = {name: index.sum_rows(values) for name, values in per_row.items()}
    result = {}
    for group, rows in index.groups().items():
        own = {name: each[rows] for name, each in sums.items()}
        weights = bootstrap_weights(index.source[rows], resamples)
        result[group] = {"rows": rows.numel(), "positions": int(own["n"].sum())} | measurements(own, _of_base, weights)
    return result


def _of_base(s: Sums) -> dict[str, Tensor]:
    nll = s["nll"] / s["n"]
    return {
        "nll": nll,
        "perplexity": nll.exp(),
        "p_mean": s["p"] / s["n"],
        "entropy_mean": s["entropy"] / s["n"],
        "conflict_rate": s["conflict"] / s["n"],
    }


def summarize_candidate(
    base: PositionSignals,
    candidate: PositionSignals,
    index: RowIndex,
    base_limits: Thresholds,
    own_limits: Thresholds,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Per group the candidate's own numbers and its distances from the base, paired position by position.

    perplexity, perplexity_ratio, nll_delta, kl_mean, kl_median, kl_p90, kl_p99, kl_by_confidence (of the base),
    top1_agreement, p_mean, p_mean_delta, entropy_mean, conflict_rate and conflict_rate_delta (base's thresholds),
    conflict_rate_own (its own thresholds), js_distance of the (p, entropy) histograms. KL and nll in nats. Everything
    is `[n]`, over the measured positions of `index` in its order.
    """
    per_row = {
        "n": torch.ones(len(base)),
        "nll": candidate.nll,
        "base_nll": base.nll,
        "kl": candidate.kl,
        "p": candidate.p,
        "base_p": base.p,
        "entropy": candidate.entropy,
        "agree": candidate.top1 == base.top1,
        "conflict": base_limits.conflict(candidate),
        "base_conflict": base_limits.conflict(base),
        "own_conflict": own_limits.conflict(candidate),
    }
    sums = {name: index.sum_rows(values) for name, values in per_row.items()}
    histograms = [_row_histograms(positions, index) for positions in (base, candidate)]
    row_of_position = index.row_of_position
    result = {}
    for group, rows in index.groups().items():
        own = {name: each[rows] for name, each in sums.items()}
        own |= {name: each[rows] for name, each in zip(("base_cells", "cells"), histograms, strict=True)}
        weights = bootstrap_weights(index.source[rows], resamples)
        members = torch.isin(row_of_position, rows)
        local_row = torch.searchsorted(rows, row_of_position[members])
        result[group] = {
            "rows": rows.numel(),
            "positions": int(own["n"].sum()),
            **measurements(own, _of_candidate, weights),
            "js_distance": _js_measurement(own, weights),
            **_kl_quantiles(candidate.kl[members], local_row, weights),
            "kl_by_confidence": kl_by_confidence(base.confidence[members], candidate.kl[members]),
        }
    return result


def summarize_difference(
    candidate: PositionSignals, other: PositionSignals, index: RowIndex, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Per group by how much `other` loses more than `candidate` at the same positions: kl_mean_delta, nll_delta, each
    in nats with its paired interval. Positive where the candidate is nearer to the base.
    """
    sums = {
        name: index.sum_rows(values)
        for name, values in {
            "n": torch.ones(len(candidate)),
            "kl": other.kl.double() - candidate.kl,
            "nll": other.nll.double() - candidate.nll,
        }.items()
    }
    result = {}
    for group, rows in index.groups().items():
        own = {name: each[rows] for name, each in sums.items()}
        weights = bootstrap_weights(index.source[rows], resamples)
        result[group] = {"rows": rows.numel()} | measurements(
            own,
            lambda s: {f"{name}_delta": s[short] / s["n"] for name, short in (("kl_mean", "kl"), ("nll", "nll"))},
            weights,
        )
    return result


def _of_candidate(s: Sums) -> dict[str, Tensor]:
    n = s["n"]
    nll, delta = s["nll"] / n, (s["nll"] - s["base_nll"]) / n
    return {
        "nll": nll,
        "perplexity": nll.exp(),
        "perplexity_ratio": delta.exp(),
        "nll_delta": delta,
        "kl_mean": s["kl"] / n,
        "top1_agreement": s["agree"] / n,
        "p_mean": s["p"] / n,
        "p_mean_delta": (s["p"] - s["base_p"]) / n,
        "entropy_mean": s["entropy"] / n,
        "conflict_rate": s["conflict"] / n,
        "conflict_rate_delta": (s["conflict"] - s["base_conflict"]) / n,
        "conflict_rate_own": s["own_conflict"] / n,
    }


def _js_measurement(sums: Sums, weights: Tensor | None) -> dict[str, Any]:
    """Noise drives two histograms apart and a resample is noisier than the rows, so the interval is recentred on the
    value."""
    value = js_distance(sums["base_cells"].sum(0), sums["cells"].sum(0))
    if weights is None:
        return measurement(value, None)
    resampled = js_distance(weights @ sums["base_cells"], weights @ sums["cells"])
    return measurement(value, (resampled - (resampled.mean() - value)).clamp(0.0, 1.0))


def _row_histograms(positions: PositionSignals, index: RowIndex) -> Tensor:
    cells = HISTOGRAM_BINS**2
    flat = index.row_of_position * cells + histogram_cell(positions)
    return torch.bincount(flat, minlength=index.num_rows * cells).reshape(index.num_rows, cells).double()


def _kl_quantiles(kl: Tensor, row: Tensor, weights: Tensor | None) -> dict[str, Any]:
    """Quantiles of `kl` `[n]` with intervals: a resample weighs every position of a row `[n]` by the row's weight."""
    ordered, order = kl.sort()
    row_in_order = row[order]
    resampled: dict[str, list[Tensor]] = {name: [] for name in KL_QUANTILES}
    for weight in () if weights is None else weights[:QUANTILE_RESAMPLES]:
        cumulative = weight[row_in_order].cumsum(0)
        for name, share in KL_QUANTILES.items():
            at = torch.searchsorted(cumulative, cumulative[-1] * float(share))
            resampled[name].append(ordered[at.clamp_max(kl.numel() - 1)])
    return {
        name: measurement(quantile(kl, share), torch.stack(resampled[name]) if resampled[name] else None)
        for name, share in KL_QUANTILES.items()
    }
