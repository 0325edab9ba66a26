"""How far a candidate is from its base: per-position signals from logits, statistics over rows, bootstrap intervals.

Pure tensor maths. A *measured position* t predicts the reference token y; rows are the unit of resampling, because
positions of one row depend on each other. Sums are float64; signals are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from math import ceil, log
from typing import Any

import torch
from torch import Tensor

from reapkit.gates import UNION

RESAMPLES = 1000
QUANTILE_RESAMPLES = 200
INTERVAL = (0.025, 0.975)
HISTOGRAM_BINS = 20
CONFIDENCE_EDGES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
LOOP_DISTINCT_4 = 0.55
KL_QUANTILES = {"kl_median": "0.5", "kl_p90": "0.9", "kl_p99": "0.99"}

Sums = Mapping[str, Tensor]
"""Named sums, each `[..., ]` float64: per row, or per resample."""


# ---------------------------------------------------------------------------------------------- positions


@dataclass(frozen=True, eq=False)
class Positions:
    """What one model said at each measured position, each `[n]`.

    `nll` = −ln p(y), `p` = full-vocabulary probability of y, `entropy` = of the softmax over the top-k logits / ln k,
    `confidence` = highest probability (float32); `top1` = its token (int64); `kl` = KL(base‖this) in nats, zeros for the base.
    """

    nll: Tensor
    p: Tensor
    entropy: Tensor
    confidence: Tensor
    top1: Tensor
    kl: Tensor

    def __len__(self) -> int:
        return self.nll.numel()

    @classmethod
    def concatenate(cls, parts: Sequence[Positions]) -> Positions:
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})

    def __getitem__(self, index: Tensor | slice) -> Positions:
        return Positions(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def top_entropy(logits: Tensor, top_k: int = 20) -> Tensor:
    """Entropy `[n]` of the softmax over the top-k logits `[n, vocabulary]`, divided by ln k: in [0, 1]. float32."""
    top_k = min(top_k, logits.shape[-1])
    log_q = logits.topk(top_k, dim=-1).values.float().log_softmax(-1)
    return (-(log_q.exp() * log_q).nan_to_num(0.0).sum(-1) / log(max(top_k, 2))).clamp(0.0, 1.0)


def kl_divergence(base_log_p: Tensor, log_p: Tensor) -> Tensor:
    """KL(base‖candidate) `[n]` in nats from log-probabilities `[n, vocabulary]`; tokens the base rules out add nothing."""
    base_p = base_log_p.exp()
    return torch.where(base_p > 0, base_p * (base_log_p - log_p), 0.0).sum(-1).clamp_min(0.0)


def describe(logits: Tensor, reference: Tensor, base_logits: Tensor | None = None, top_k: int = 20) -> Positions:
    """The signals of logits `[n, vocabulary]` for reference tokens `[n]`, against the base's logits where given."""
    log_p = logits.float().log_softmax(-1)
    nll = -log_p.gather(-1, reference.unsqueeze(-1)).squeeze(-1)
    confidence, top1 = log_p.max(-1)
    kl = torch.zeros_like(nll) if base_logits is None else kl_divergence(base_logits.float().log_softmax(-1), log_p)
    return Positions(nll, (-nll).exp(), top_entropy(logits, top_k), confidence.exp(), top1, kl)


# ---------------------------------------------------------------------------------------------- quantiles, regions, histograms


def quantile(values: Tensor, share: Any) -> Tensor:
    """The ⌈share·n⌉-th smallest of `values` `[n]`, no interpolation; `share` is read as the decimal it prints as."""
    rank = ceil(Fraction(str(share)) * values.numel())
    return values.kthvalue(max(1, rank)).values


@dataclass(frozen=True, eq=False)
class Thresholds:
    """At or below `p` the reference token is improbable, at or below `entropy` the model is confident; each `[n]`."""

    p: Tensor
    entropy: Tensor

    def conflict(self, positions: Positions) -> Tensor:
        """Confidently wrong positions, bool `[n]`."""
        return (positions.p <= self.p) & (positions.entropy <= self.entropy)


def thresholds(positions: Positions, source: Tensor, pooled: Tensor | None, p_low: Any, h_low: Any) -> Thresholds:
    """Quantiles q(p_low) and q(h_low) for each position: over those where `pooled` is true, or of each source if None.

    `source` `[n]` int64 is each position's source, `pooled` `[n]` bool. Where `pooled` holds nothing all positions count.
    """
    p, entropy = torch.empty_like(positions.p), torch.empty_like(positions.entropy)
    everywhere = torch.ones_like(source, dtype=torch.bool)
    groups = [(source == s, source == s) for s in source.unique()] if pooled is None else \
        [(everywhere, pooled if pooled.any() else everywhere)]
    for members, counted in groups:
        p[members] = quantile(positions.p[counted], p_low)
        entropy[members] = quantile(positions.entropy[counted], h_low)
    return Thresholds(p, entropy)


def histogram_cell(positions: Positions, bins: int = HISTOGRAM_BINS) -> Tensor:
    """The cell of each position in a `bins` x `bins` histogram of (p, entropy) over the unit square, int64 `[n]`."""
    row, column = ((value * bins).long().clamp(0, bins - 1) for value in (positions.p, positions.entropy))
    return row * bins + column


def js_distance(a: Tensor, b: Tensor) -> Tensor:
    """Jensen–Shannon distance of histograms `[..., cells]` (base 2, square root of the divergence: in [0, 1]), float64."""
    a, b = (h.double() / h.double().sum(-1, keepdim=True) for h in (a, b))
    middle = (a + b) / 2
    divergence = sum(torch.where(h > 0, h * (h / middle).log2(), 0.0).sum(-1) for h in (a, b)) / 2
    return divergence.clamp(0.0, 1.0).sqrt()


def distinct_n(tokens: Sequence[int], n: int = 4) -> float:
    """Share of different n-grams among all n-grams; 1.0 for fewer than n tokens."""
    grams = [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def loops(tokens: Sequence[int]) -> bool:
    """Whether a continuation repeats itself: distinct-4 below 0.55."""
    return distinct_n(tokens) < LOOP_DISTINCT_4


# ---------------------------------------------------------------------------------------------- bootstrap


def bootstrap_weights(strata: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Tensor | None:
    """How often each row counts in each resample, `[resamples, rows]` float64; None with fewer than two rows.

    Rows are drawn with replacement within their stratum `[rows]` int64 (the source: the packs fix the sources' shares):
    m − 1 of m rows, weighted by m / (m − 1), which keeps the variance unbiased for small strata (Rao and Wu, 1988).
    A stratum of one row joins the others of one row, else the largest. The same seed and strata give the same weights.
    """
    if strata.numel() < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(resamples, strata.numel(), dtype=torch.float64)
    for members in _usable_strata(strata):
        size = members.numel()
        drawn = members[torch.randint(size, (resamples, size - 1), generator=generator)]
        weights.scatter_add_(1, drawn, torch.full(drawn.shape, size / (size - 1), dtype=torch.float64))
    return weights


def _usable_strata(strata: Tensor) -> list[Tensor]:
    members = [(strata == s).nonzero().squeeze(1) for s in strata.unique()]
    single = [m for m in members if m.numel() == 1]
    several = [m for m in members if m.numel() > 1]
    if len(single) == 1:
        largest = max(range(len(several)), key=lambda i: several[i].numel())
        several[largest] = torch.cat([several[largest], single[0]])
    elif single:
        several.append(torch.cat(single))
    return several


def measurements(sums: Sums, statistics: Callable[[Sums], Mapping[str, Tensor]], weights: Tensor | None) -> dict[str, Any]:
    """Each statistic of per-row sums `[rows]` (or `[rows, k]`): `{"value", "interval"}` with its 95 % percentile interval."""
    values = statistics({name: each.sum(0) for name, each in sums.items()})
    resampled = None if weights is None else statistics({name: weights @ each for name, each in sums.items()})
    return {name: measurement(value, None if resampled is None else resampled[name]) for name, value in values.items()}


def measurement(value: Tensor | float, resampled: Tensor | None) -> dict[str, Any]:
    """`{"value", "interval"}`: the percentile interval of `resampled` `[resamples]`, None without them."""
    if resampled is None:
        return {"value": float(value), "interval": None}
    low, high = torch.quantile(resampled.double(), torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    return {"value": float(value), "interval": [low, high]}


# ---------------------------------------------------------------------------------------------- statistics over rows


@dataclass(frozen=True, eq=False)
class RowIndex:
    """Which measured positions belong to which row, and which row to which source.

    `offsets` `[rows + 1]` int64, `source` `[rows]` int64 index into `sources`; `outside` names sources that do not count
    in the union, because the calibration mix does not hold them.
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
        return torch.repeat_interleave(torch.arange(self.num_rows), self.offsets.diff())

    @property
    def source_of_position(self) -> Tensor:
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
        """Row indices of the union and of each source that has measured positions, in the sources' order."""
        filled = self.offsets.diff() > 0
        chosen = {UNION: filled & self.in_union} | {name: filled & (self.source == i) for i, name in enumerate(self.sources)}
        return {name: rows.nonzero().squeeze(1) for name, rows in chosen.items() if rows.any()}


def regions(positions: Positions, index: RowIndex, eaft: Mapping[str, Any]) -> Thresholds:
    """The conflict thresholds of `positions`; `eaft` = `{"p_low", "h_low", "thresholds": "pooled" | "per-source"}`."""
    pooled = index.in_union[index.row_of_position] if eaft["thresholds"] == "pooled" else None
    return thresholds(positions, index.source_of_position, pooled, eaft["p_low"], eaft["h_low"])


def summarize_base(base: Positions, index: RowIndex, limits: Thresholds, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Per group (`all` and each source): rows, positions, nll, perplexity, p_mean, entropy_mean, conflict_rate."""
    per_row = {"n": torch.ones(len(base)), "nll": base.nll, "p": base.p, "entropy": base.entropy,
               "conflict": limits.conflict(base)}
    sums = {name: index.sum_rows(values) for name, values in per_row.items()}
    result = {}
    for group, rows in index.groups().items():
        own = {name: each[rows] for name, each in sums.items()}
        weights = bootstrap_weights(index.source[rows], resamples)
        result[group] = {"rows": rows.numel(), "positions": int(own["n"].sum())} | measurements(own, _of_base, weights)
    return result


def _of_base(s: Sums) -> dict[str, Tensor]:
    nll = s["nll"] / s["n"]
    return {"nll": nll, "perplexity": nll.exp(), "p_mean": s["p"] / s["n"], "entropy_mean": s["entropy"] / s["n"],
            "conflict_rate": s["conflict"] / s["n"]}


def summarize_candidate(base: Positions, candidate: Positions, index: RowIndex, base_limits: Thresholds,
                        own_limits: Thresholds, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Per group the candidate's own numbers and its distances from the base, paired position by position.

    perplexity, perplexity_ratio, nll_delta, kl_mean, kl_median, kl_p90, kl_p99, kl_by_confidence (of the base),
    top1_agreement, p_mean, p_mean_delta, entropy_mean, conflict_rate and conflict_rate_delta (base's thresholds),
    conflict_rate_own (its own thresholds), js_distance of the (p, entropy) histograms.
    """
    per_row = {"n": torch.ones(len(base)), "nll": candidate.nll, "base_nll": base.nll, "kl": candidate.kl, "p": candidate.p,
               "base_p": base.p, "entropy": candidate.entropy, "agree": candidate.top1 == base.top1,
               "conflict": base_limits.conflict(candidate), "base_conflict": base_limits.conflict(base),
               "own_conflict": own_limits.conflict(candidate)}
    sums = {name: index.sum_rows(values) for name, values in per_row.items()}
    histograms = [_row_histograms(positions, index) for positions in (base, candidate)]
    row_of_position = index.row_of_position
    result = {}
    for group, rows in index.groups().items():
        own = {name: each[rows] for name, each in sums.items()}
        own |= {name: each[rows] for name, each in zip(("base_cells", "cells"), histograms)}
        weights = bootstrap_weights(index.source[rows], resamples)
        members = torch.isin(row_of_position, rows)
        local_row = torch.searchsorted(rows, row_of_position[members])
        result[group] = {"rows": rows.numel(), "positions": int(own["n"].sum()),
                         **measurements(own, _of_candidate, weights), "js_distance": _js_measurement(own, weights),
                         **_kl_quantiles(candidate.kl[members], local_row, weights),
                         "kl_by_confidence": kl_by_confidence(base.confidence[members], candidate.kl[members])}
    return result


def _of_candidate(s: Sums) -> dict[str, Tensor]:
    n = s["n"]
    nll, delta = s["nll"] / n, (s["nll"] - s["base_nll"]) / n
    return {"nll": nll, "perplexity": nll.exp(), "perplexity_ratio": delta.exp(), "nll_delta": delta, "kl_mean": s["kl"] / n,
            "top1_agreement": s["agree"] / n, "p_mean": s["p"] / n, "p_mean_delta": (s["p"] - s["base_p"]) / n,
            "entropy_mean": s["entropy"] / n, "conflict_rate": s["conflict"] / n,
            "conflict_rate_delta": (s["conflict"] - s["base_conflict"]) / n, "conflict_rate_own": s["own_conflict"] / n}


def _js_measurement(sums: Sums, weights: Tensor | None) -> dict[str, Any]:
    """The distance of two histograms grows with their noise, and a resample is noisier than the rows: its interval is recentred."""
    value = js_distance(sums["base_cells"].sum(0), sums["cells"].sum(0))
    if weights is None:
        return measurement(value, None)
    resampled = js_distance(weights @ sums["base_cells"], weights @ sums["cells"])
    return measurement(value, (resampled - (resampled.mean() - value)).clamp(0.0, 1.0))


def _row_histograms(positions: Positions, index: RowIndex) -> Tensor:
    cells = HISTOGRAM_BINS ** 2
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
    return {name: measurement(quantile(kl, share), torch.stack(resampled[name]) if resampled[name] else None)
            for name, share in KL_QUANTILES.items()}


def kl_by_confidence(confidence: Tensor, kl: Tensor) -> list[dict[str, Any]]:
    """Mean KL by the base's confidence: where a sure base is contradicted. Bins are [low, high), the last one closed."""
    bins = torch.bucketize(confidence, torch.tensor(CONFIDENCE_EDGES[1:-1]), right=True)
    count = torch.bincount(bins, minlength=len(CONFIDENCE_EDGES) - 1)
    total = torch.zeros(count.numel(), dtype=torch.float64).index_add_(0, bins, kl.double())
    return [{"confidence": [CONFIDENCE_EDGES[i], CONFIDENCE_EDGES[i + 1]], "share": float(count[i] / kl.numel()),
             "kl_mean": float(total[i] / count[i]) if count[i] else None} for i in range(count.numel())]
