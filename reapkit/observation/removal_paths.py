"""The reroute criteria: an observation's removal paths as saliency, order of removal and cost, for allocation to
spend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy import ndarray

from reapkit.core.errors import Problem, RecipeError, UnusableError
from reapkit.observation.observation import Observation, Reroute

REROUTE = ("reroute", "reroute-single")


@dataclass(frozen=True, eq=False)
class Removal:
    """`saliency` float64 [L, E]: the layer's relative error once the expert is gone. `cost` float64 [L, E]: what its
    removal adds.

    `order`: by layer, the experts in the order they go (those that never can are not named), or None where saliency
    says it. Costs are fractions of the squared residual stream per token, and so compare between layers.
    """

    saliency: ndarray
    cost: ndarray
    order: tuple[tuple[int, ...], ...] | None


def removal(observation: Observation, criterion: str, alphas: Sequence[Fraction]) -> Removal:
    """What a reroute criterion says, its sources weighed by `alphas` (see saliency.source_alphas).

    `reroute` follows one path as it was measured: of the mix by its scored tokens, of all sources with equal weights,
    or of one source. A path under other weights visits other sets of experts, and what they cost is no sum of what was
    kept: finding it takes every sampled token's router logits and its experts' inner products, 0.5 GB a layer at 128
    experts and 8,192 tokens.

    Raises UnusableError where nothing was measured, RecipeError for weights that no path was measured for.
    """
    found = observation.reroute
    if found is None:
        raise UnusableError(
            f"saliency.criterion: {criterion} needs removal paths, and this observation holds none"
            " (observe.reroute_tokens was 0, or it is a sum of observations, whose paths do not add up). Observe with"
            " observe.reroute_tokens: 8192."
        )
    if criterion == "reroute-single":
        return _alone(observation, found, alphas)
    number = _path_number(observation, found, alphas)
    rows = [_along(order, error) for order, error in zip(found.order[:, number], found.error[:, number], strict=True)]
    orders, saliency, cost = zip(*rows, strict=True)
    return Removal(np.stack(saliency), np.stack(cost), orders)


def _along(order: ndarray, error: ndarray) -> tuple[tuple[int, ...], ndarray, ndarray]:
    """Error reached and error added by expert; those the path never removes take the last ones' values."""
    steps = int((order >= 0).sum())
    gone, reached = order[:steps], error[:steps]
    added, highest = np.diff(reached, prepend=0.0), np.maximum.accumulate(reached)
    saliency = np.full_like(error, highest[-1] if steps else 0.0)
    cost = np.full_like(error, added.max() if steps else 0.0)
    saliency[gone], cost[gone] = highest, added
    return tuple(gone.tolist()), saliency, cost


def _path_number(observation: Observation, found: Reroute, alphas: Sequence[Fraction]) -> int:
    weighed = [source for source, alpha in enumerate(alphas) if alpha and observation.scored_tokens[source]]
    _refuse_unsampled(observation, found, weighed)
    if len(set(alphas)) == 1:
        return len(alphas) + 1
    if len({alpha * int(count) for alpha, count in zip(alphas, observation.scored_tokens, strict=True)}) == 1:
        return len(alphas)
    if len(weighed) > 1:
        raise RecipeError([Problem("saliency.mix", NO_PATH)])
    return weighed[0]


def _alone(observation: Observation, found: Reroute, alphas: Sequence[Fraction]) -> Removal:
    """Σ_s α_s T_s err_s / Σ_s α_s T_s, with T_s a source's scored tokens and err_s the mean over its sample."""
    weighed = [source for source, alpha in enumerate(alphas) if alpha and observation.scored_tokens[source]]
    _refuse_unsampled(observation, found, weighed)
    shares = [float(alphas[source] * int(observation.scored_tokens[source])) for source in weighed]
    mean = sum(
        share / sum(shares) * found.single[:, source] / int(found.tokens[source])
        for share, source in zip(shares, weighed, strict=True)
    )
    return Removal(mean, mean, None)


def _refuse_unsampled(observation: Observation, found: Reroute, weighed: Sequence[int]) -> None:
    missing = [observation.sources[source] for source in weighed if not found.tokens[source]]
    if missing:
        raise UnusableError(
            f"saliency.criterion: the reroute sample holds no token of {', '.join(missing)}. Raise"
            " observe.reroute_tokens."
        )


NO_PATH = (
    "reroute follows paths that were measured for the mix as it was calibrated, for equal weights of all sources, and"
    " for each source alone; others are unknown. Choose one of these, change calibration.mix, or choose reroute-single."
)
