"""Reads removal paths as numbers for decisions: saliency, order of removal and cost by expert. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy import ndarray

from reapkit.core.errors import UnusableError
from reapkit.observation.observation import Observation, Reroute


@dataclass(frozen=True, eq=False)
class Removal:
    """`saliency` float64 [L, E]: the layer's relative error once the expert is gone. `cost` float64 [L, E]: what its
    removal adds.

    `measured` bool [L]: the layers that this says anything about. `order`: by layer, the experts in the order they go
    (those that never can are not named), or None where saliency says it. Costs are fractions of the squared residual
    stream per token, and so compare between layers.
    """

    saliency: ndarray
    cost: ndarray
    measured: ndarray
    order: tuple[tuple[int, ...], ...] | None


def removal_along(paths: Reroute, number: int) -> Removal:
    """Experts as path `number` removes them, one after another (see path_number)."""
    rows = [_along(order, error) for order, error in zip(paths.order[:, number], paths.error[:, number], strict=True)]
    orders, saliency, cost = zip(*rows, strict=True)
    return Removal(np.stack(saliency), np.stack(cost), paths.measured, orders)


def _along(order: ndarray, error: ndarray) -> tuple[tuple[int, ...], ndarray, ndarray]:
    """Error reached and error added by expert; those the path never removes take the last ones' values."""
    steps = int((order >= 0).sum())
    gone, reached = order[:steps], error[:steps]
    added, highest = np.diff(reached, prepend=0.0), np.maximum.accumulate(reached)
    saliency = np.full_like(error, highest[-1] if steps else 0.0)
    cost = np.full_like(error, added.max() if steps else 0.0)
    saliency[gone], cost[gone] = highest, added
    return tuple(gone.tolist()), saliency, cost


def path_number(observation: Observation, paths: Reroute, alphas: Sequence[Fraction]) -> int | None:
    """Which path was measured under these weights of the sources (`alphas`, see totals.source_alphas); None: none was.

    There is one for the mix by its scored tokens, one for all sources with equal weights, and one for each source. A
    path under other weights visits other sets of experts, and what they cost is no sum of what was kept: finding it
    takes every sampled token's router logits and its experts' inner products, 0.5 GB a layer at 128 experts and 8,192
    tokens. Raises UnusableError where a source that has weight was not sampled.
    """
    weighed = _weighed(observation, paths, alphas)
    if len(set(alphas)) == 1:
        return len(alphas) + 1
    if len({alpha * int(count) for alpha, count in zip(alphas, observation.scored_tokens, strict=True)}) == 1:
        return len(alphas)
    return weighed[0] if len(weighed) == 1 else None


def removal_alone(observation: Observation, paths: Reroute, alphas: Sequence[Fraction]) -> Removal:
    """Each expert removed alone: Σ_s α_s T_s err_s / Σ_s α_s T_s, with T_s a source's scored tokens and err_s the mean
    over its sample. Raises UnusableError where a source that has weight was not sampled."""
    weighed = _weighed(observation, paths, alphas)
    shares = [float(alphas[source] * int(observation.scored_tokens[source])) for source in weighed]
    mean = np.zeros_like(paths.single[:, 0], dtype=np.float64)
    for share, source in zip(shares, weighed, strict=True):
        mean += share / sum(shares) * paths.single[:, source] / int(paths.tokens[source])
    return Removal(mean, mean, paths.measured, None)


def _weighed(observation: Observation, paths: Reroute, alphas: Sequence[Fraction]) -> list[int]:
    """The sources that have weight and scored tokens. Raises UnusableError where one of them was not sampled."""
    weighed = [source for source, alpha in enumerate(alphas) if alpha and observation.scored_tokens[source]]
    missing = [observation.sources[source] for source in weighed if not paths.tokens[source]]
    if missing:
        raise UnusableError(
            f"saliency.criterion: the reroute sample holds no token of {', '.join(missing)}. Raise"
            " observe.reroute_tokens."
        )
    return weighed
