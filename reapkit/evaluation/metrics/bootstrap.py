"""Computes intervals by resampling rows: paired, seeded, with the sources' shares kept. float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 1000
INTERVAL = (0.025, 0.975)

Sums = Mapping[str, Tensor]
"""Named sums, each `[..., ]` float64: per row, or per resample."""


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


def measurements(
    sums: Sums, statistics: Callable[[Sums], Mapping[str, Tensor]], weights: Tensor | None
) -> dict[str, Any]:
    """Each statistic of per-row `sums` `[rows]` (or `[rows, k]`) float64: `{"value", "interval"}` with its 95 %
    percentile interval under `weights` `[resamples, rows]` float64 (see `bootstrap_weights`)."""
    values = statistics({name: each.sum(0) for name, each in sums.items()})
    resampled = None if weights is None else statistics({name: weights @ each for name, each in sums.items()})
    return {name: measurement(value, None if resampled is None else resampled[name]) for name, value in values.items()}


def measurement(value: Tensor | float, resampled: Tensor | None) -> dict[str, Any]:
    """`{"value", "interval"}`: a scalar and the percentile interval of `resampled` `[resamples]`, any float dtype, None
    without them."""
    if resampled is None:
        return {"value": float(value), "interval": None}
    low, high = torch.quantile(resampled.double(), torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    return {"value": float(value), "interval": [low, high]}
