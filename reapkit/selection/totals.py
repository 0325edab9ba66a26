"""Adds up an observation's statistics over its weighted sources. Torch-free.

Sums are float64 and already taken over the scored positions (see observation); nothing here needs the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from numpy import ndarray

from reapkit.core.errors import Problem, RecipeError
from reapkit.observation.observation import MAXIMA, SUMS, Columns, Observation


@dataclass(frozen=True)
class Totals:
    """An observation's statistics with its sources added up, weighted by the post-hoc mix.

    Sums are arrays [L, E] float64, maxima arrays [L, E] float32 over the sources that have weight. `mean_alpha` is the
    mean weight of a scored token, by which `prior_count` scales (1 without a mix).
    """

    layers: tuple[int, ...]
    mean_alpha: float
    count: ndarray
    gate_sum: ndarray
    norm_sum: ndarray
    gate_norm_sum: ndarray
    gate_norm_sq_sum: ndarray
    relative_sq_sum: ndarray
    norm_max: ndarray
    gate_norm_max: ndarray
    activation_max: ndarray
    norm_max_scored: ndarray
    gate_norm_max_scored: ndarray
    activation_max_scored: ndarray

    def __getattribute__(self, name: str) -> Any:
        """What the observation does not have cannot be asked for. Raises UnusableError."""
        value = super().__getattribute__(name)
        return Columns()[name] if value is None else value

    def mean(self, sums: ndarray, prior_count: float = 0.0) -> ndarray:
        """Σ / (N + λ), float64 [L, E], of `sums` Σ [L, E] with `prior_count` λ in tokens; an expert without tokens
        becomes 0/0 = NaN unless λ > 0, and ranks last either way."""
        with np.errstate(invalid="ignore"):
            return sums / (self.count + prior_count * self.mean_alpha)


def source_alphas(observation: Observation, mix: Mapping[str, Decimal] | None) -> tuple[Fraction, ...]:
    """The exact weight α_s of each source's sums: w_s / T_s with Σw = 1 and T_s its scored tokens; 1 each without a
    mix.

    Raises RecipeError (path `saliency.mix`) for unknown names, negative weights and sources without scored tokens.
    """
    if mix is None:
        return (Fraction(1),) * len(observation.sources)
    tokens = dict(zip(observation.sources, observation.scored_tokens.tolist(), strict=True))
    problems = [
        Problem(f"saliency.mix.{name}", f"is not a source of the observation. Known: {', '.join(observation.sources)}.")
        for name in mix
        if name not in tokens
    ]
    problems += [
        Problem(f"saliency.mix.{name}", f"found {weight}, which is negative. Give a share of 0 or more.")
        for name, weight in mix.items()
        if weight < 0
    ]
    problems += [
        Problem(
            f"saliency.mix.{name}",
            f"has weight {weight}, but the observation has no scored token of this source. Set the weight to 0, or"
            " observe the source.",
        )
        for name, weight in mix.items()
        if weight > 0 and tokens.get(name) == 0
    ]
    if not problems and sum(mix.values()) == 0:
        problems.append(Problem("saliency.mix", "every weight is 0. Give at least one source a share."))
    if problems:
        raise RecipeError(problems)
    total = sum(Fraction(weight) for weight in mix.values())
    return tuple(
        Fraction(mix[name]) / total / count if mix.get(name) else Fraction(0) for name, count in tokens.items()
    )


def totals(observation: Observation, mix: Mapping[str, Decimal] | None = None) -> Totals:
    """Σ_s α_s Σ_s of every statistic, in the order of the sources, and the maxima over sources with weight.

    It equals an observation whose scored tokens have the mix's shares, up to a common factor.
    """
    alphas = source_alphas(observation, mix)
    return Totals(
        observation.layers,
        mean_alpha(observation, alphas),
        **{name: _if_held(add_sources, observation.statistics, name, alphas) for name in SUMS},
        **{name: _if_held(_largest, observation.maxima, name, alphas) for name in MAXIMA},
    )


def _if_held(
    reduce: Callable[[ndarray, Sequence[Fraction]], ndarray],
    columns: Mapping[str, ndarray],
    name: str,
    alphas: Sequence[Fraction],
) -> Any:
    """None for a column that the observation does not have, which Totals refuses to give."""
    return reduce(columns[name], alphas) if name in columns else None


def mean_alpha(observation: Observation, alphas: Sequence[Fraction]) -> float:
    """The mean of α over the scored tokens of the sources that have weight."""
    tokens = [(alpha, count) for alpha, count in zip(alphas, observation.scored_tokens.tolist(), strict=True) if alpha]
    weight = sum(count for _, count in tokens)
    return float(sum(alpha * count for alpha, count in tokens) / weight) if weight else 1.0


def add_sources(values: ndarray, alphas: Sequence[Fraction]) -> ndarray:
    """Σ_s α_s values[:, s] for values [L, S, ...]; float64, added in the order of the sources."""
    added = np.zeros_like(values[:, 0], dtype=np.float64)
    for source, alpha in enumerate(alphas):
        if alpha:
            added += float(alpha) * values[:, source]
    return added


def _largest(values: ndarray, alphas: Sequence[Fraction]) -> ndarray:
    weighed = [source for source, alpha in enumerate(alphas) if alpha]
    return values[:, weighed].max(1) if weighed else np.zeros_like(values[:, 0])
