"""Computes the signals of logits at each measured position, and what follows from many of them: regions, histograms,
loops.

A measured position t predicts the reference token y. Signals are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from math import ceil, log
from typing import Any

import torch
from torch import Tensor

HISTOGRAM_BINS = 20
CONFIDENCE_EDGES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
LOOP_DISTINCT_4 = 0.55


@dataclass(frozen=True, eq=False)
class PositionSignals:
    """What one model said at each measured position, each `[n]`.

    `nll` = −ln p(y), `p` = full-vocabulary probability of y, `entropy` = of the softmax over the top-k logits / ln k,
    `confidence` = highest probability (float32); `top1` = its token (int64); `kl` = KL(base‖this) in nats, 0 for the
    base.
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
    def concatenate(cls, parts: Sequence[PositionSignals]) -> PositionSignals:
        """The positions of all parts, one after another."""
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})

    def __getitem__(self, index: Tensor | slice) -> PositionSignals:
        return PositionSignals(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def top_entropy(logits: Tensor, top_k: int = 20) -> Tensor:
    """Entropy `[n]` of the softmax over the top-k logits `[n, vocabulary]`, divided by ln k: in [0, 1]. float32."""
    top_k = min(top_k, logits.shape[-1])
    log_q = logits.topk(top_k, dim=-1).values.float().log_softmax(-1)
    return (-(log_q.exp() * log_q).nan_to_num(0.0).sum(-1) / log(max(top_k, 2))).clamp(0.0, 1.0)


def kl_divergence(base_log_p: Tensor, log_p: Tensor) -> Tensor:
    """KL(base‖candidate) = Σ p_base · (ln p_base − ln p), `[n]` float32 in nats, from log-probabilities `[n,
    vocabulary]` float32; tokens the base rules out add nothing."""
    base_p = base_log_p.exp()
    return torch.where(base_p > 0, base_p * (base_log_p - log_p), 0.0).sum(-1).clamp_min(0.0)


def describe(logits: Tensor, reference: Tensor, base_logits: Tensor | None = None, top_k: int = 20) -> PositionSignals:
    """The signals of logits `[n, vocabulary]` (any float, read as float32) for reference tokens `[n]` int64, against
    the base's logits where given."""
    log_p = logits.float().log_softmax(-1)
    nll = -log_p.gather(-1, reference.unsqueeze(-1)).squeeze(-1)
    confidence, top1 = log_p.max(-1)
    kl = torch.zeros_like(nll) if base_logits is None else kl_divergence(base_logits.float().log_softmax(-1), log_p)
    return PositionSignals(nll, (-nll).exp(), top_entropy(logits, top_k), confidence.exp(), top1, kl)


def quantile(values: Tensor, share: Any) -> Tensor:
    """The ⌈share·n⌉-th smallest of `values` `[n]`, a scalar in their dtype, no interpolation; `share` is read as the
    decimal it prints as."""
    rank = ceil(Fraction(str(share)) * values.numel())
    return values.kthvalue(max(1, rank)).values


@dataclass(frozen=True, eq=False)
class Thresholds:
    """At or below `p` the reference token is improbable, at or below `entropy` the model is confident; each `[n]`."""

    p: Tensor
    entropy: Tensor

    def conflict(self, positions: PositionSignals) -> Tensor:
        """Confidently wrong positions, bool `[n]`."""
        return (positions.p <= self.p) & (positions.entropy <= self.entropy)


def thresholds(positions: PositionSignals, source: Tensor, pooled: Tensor | None, p_low: Any, h_low: Any) -> Thresholds:
    """Quantiles q(p_low) and q(h_low) for each position: over those where `pooled` is true, or of each source if None.

    `source` `[n]` int64 is each position's source, `pooled` `[n]` bool. Where `pooled` holds nothing all positions
    count.
    """
    p, entropy = torch.empty_like(positions.p), torch.empty_like(positions.entropy)
    everywhere = torch.ones_like(source, dtype=torch.bool)
    groups = (
        [(source == s, source == s) for s in source.unique()]
        if pooled is None
        else [(everywhere, pooled if pooled.any() else everywhere)]
    )
    for members, counted in groups:
        p[members] = quantile(positions.p[counted], p_low)
        entropy[members] = quantile(positions.entropy[counted], h_low)
    return Thresholds(p, entropy)


def histogram_cell(positions: PositionSignals, bins: int = HISTOGRAM_BINS) -> Tensor:
    """The cell of each position in a `bins` x `bins` histogram of (p, entropy) over the unit square, int64 `[n]`."""
    row, column = ((value * bins).long().clamp(0, bins - 1) for value in (positions.p, positions.entropy))
    return row * bins + column


def js_distance(a: Tensor, b: Tensor) -> Tensor:
    """Jensen–Shannon distance of histograms `[..., cells]` (base 2, square root of the divergence: in [0, 1]),
    float64."""
    a, b = (h.double() / h.double().sum(-1, keepdim=True) for h in (a, b))
    middle = (a + b) / 2
    of_a, of_b = (torch.where(h > 0, h * (h / middle).log2(), 0.0).sum(-1) for h in (a, b))
    return ((of_a + of_b) / 2).clamp(0.0, 1.0).sqrt()


def distinct_n(tokens: Sequence[int], n: int = 4) -> float:
    """Share of different n-grams among all n-grams; 1.0 for fewer than n tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def loops(tokens: Sequence[int]) -> bool:
    """Whether a continuation repeats itself: distinct-4 below 0.55."""
    return distinct_n(tokens) < LOOP_DISTINCT_4


def kl_by_confidence(confidence: Tensor, kl: Tensor) -> list[dict[str, Any]]:
    """Mean KL (nats) by the base's confidence, both `[n]` float32: where a sure base is contradicted. Bins are [low,
    high), the last one closed; `share` is that of the positions. Sums are float64."""
    bins = torch.bucketize(confidence, torch.tensor(CONFIDENCE_EDGES[1:-1]), right=True)
    count = torch.bincount(bins, minlength=len(CONFIDENCE_EDGES) - 1)
    total = torch.zeros(count.numel(), dtype=torch.float64).index_add_(0, bins, kl.double())
    return [
        {
            "confidence": [CONFIDENCE_EDGES[i], CONFIDENCE_EDGES[i + 1]],
            "share": float(count[i] / kl.numel()),
            "kl_mean": float(total[i] / count[i]) if count[i] else None,
        }
        for i in range(count.numel())
    ]
