"""How much each expert matters: the criteria as pure functions of an observation's sums.

Sums are float64 and already taken over the scored positions (see observation); nothing here needs the model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from numpy import ndarray

from reapkit.core.errors import Problem, RecipeError, UnusableError
from reapkit.observation.observation import MAXIMA, SUMS, Columns, Observation
from reapkit.observation.removal_paths import REROUTE, removal
from reapkit.recipe.schema import SaliencySpec
from reapkit.selection.criteria import user_criterion
from reapkit.selection.eaft import Regions, eaft_saliency, measure_regions, region_weights


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
        """Σ / (N + λ) with λ in tokens; an expert without tokens becomes 0/0 = NaN unless λ > 0, and ranks last either
        way."""
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
        Problem(f"saliency.mix.{name}", f"is no source of the observation. Known: {', '.join(observation.sources)}.")
        for name in mix
        if name not in tokens
    ]
    problems += [
        Problem(f"saliency.mix.{name}", f"{weight} is negative. Give a share of 0 or more.")
        for name, weight in mix.items()
        if weight < 0
    ]
    problems += [
        Problem(
            f"saliency.mix.{name}",
            f"weighs {weight}, but the observation has no scored token of it. Give it 0, or observe it.",
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
        **{
            name: add_sources(observation.statistics[name], alphas) if name in observation.statistics else None
            for name in SUMS
        },
        **{name: _largest(observation.maxima[name], alphas) if name in observation.maxima else None for name in MAXIMA},
    )


def mean_alpha(observation: Observation, alphas: tuple[Fraction, ...]) -> float:
    """The mean of α over the scored tokens of the sources that have weight."""
    tokens = [(alpha, count) for alpha, count in zip(alphas, observation.scored_tokens.tolist(), strict=True) if alpha]
    weight = sum(count for _, count in tokens)
    return float(sum(alpha * count for alpha, count in tokens) / weight) if weight else 1.0


def add_sources(values: ndarray, alphas: tuple[Fraction, ...]) -> ndarray:
    """Σ_s α_s values[:, s] for values [L, S, ...]; float64, added in the order of the sources."""
    added = np.zeros_like(values[:, 0], dtype=np.float64)
    for source, alpha in enumerate(alphas):
        if alpha:
            added += float(alpha) * values[:, source]
    return added


def _largest(values: ndarray, alphas: tuple[Fraction, ...]) -> ndarray:
    weighed = [source for source, alpha in enumerate(alphas) if alpha]
    return values[:, weighed].max(1) if weighed else np.zeros_like(values[:, 0])


# ---------------------------------------------------------------------------------------------- criteria


def reap(totals: Totals, spec: SaliencySpec) -> ndarray:
    """Σgn / N: the mean contribution to the layer's output while routed (REAP, arXiv 2510.13999); `sum`: Σgn."""
    return _reduced(totals, totals.gate_norm_sum, spec)


def ean(totals: Totals, spec: SaliencySpec) -> ndarray:
    """Σn: expert activation norm, a sum by definition."""
    return totals.norm_sum


def ean_mean(totals: Totals, spec: SaliencySpec) -> ndarray:
    """Σn / N; `sum`: Σn."""
    return _reduced(totals, totals.norm_sum, spec)


def frequency(totals: Totals, spec: SaliencySpec) -> ndarray:
    """N: how often the expert is routed to."""
    return totals.count


def weighted_frequency(totals: Totals, spec: SaliencySpec) -> ndarray:
    """Σg: how much gate weight the expert receives."""
    return totals.gate_sum


def random_control(totals: Totals, spec: SaliencySpec) -> ndarray:
    """Uniform numbers by seed and decoder layer, the same on every platform: the control that a criterion must beat."""
    experts = totals.count.shape[1]
    rows = []
    for layer in totals.layers:
        draw = random.Random(f"{spec.seed}:{layer}")
        rows.append([draw.random() for _ in range(experts)])
    return np.array(rows)


def _reduced(totals: Totals, sums: ndarray, spec: SaliencySpec) -> ndarray:
    return sums if spec.reduction == "sum" else totals.mean(sums, spec.prior_count)


CRITERIA: dict[str, Callable[[Totals, SaliencySpec], ndarray]] = {
    "reap": reap,
    "ean": ean,
    "ean-mean": ean_mean,
    "frequency": frequency,
    "weighted-frequency": weighted_frequency,
    "random": random_control,
}

FORMULAS = {"reap": "Σgn", "ean-mean": "Σn", "eaft-reap": "Σwgn"}


def formula(spec: SaliencySpec) -> str:
    """What is computed for each expert, in the words of the report."""
    fixed = {
        "reroute": "‖y(A) − y‖² / ‖r‖² along the removal path",
        "reroute-single": "‖y(A) − y‖² / ‖r‖² without it alone",
        "ean": "Σn",
        "frequency": "N",
        "weighted-frequency": "Σg",
        "random": f"random (seed {spec.seed})",
    }
    if spec.criterion not in FORMULAS:
        return fixed.get(spec.criterion, spec.criterion)
    if spec.reduction == "sum":
        return FORMULAS[spec.criterion]
    return f"{FORMULAS[spec.criterion]} / " + (f"(N + {spec.prior_count:g})" if spec.prior_count else "N")


def saliency(
    observation: Observation, spec: SaliencySpec, regions: Regions | None = None, weights: Sequence[float] | None = None
) -> ndarray:
    """The saliency of every expert, array [L, E] float64; -inf for experts that no position was routed to.

    `regions`: the EAFT sums, if they were measured already; `weights`: other region weights than the spec's.

    Raises RecipeError for an unknown criterion or mix, UnusableError where the observation lacks what the criterion
    needs or holds a number that is not finite.
    """
    summed = totals(observation, spec.mix)
    if spec.criterion == "eaft-reap":
        alphas = source_alphas(observation, spec.mix)
        regions = regions or measure_regions(observation, spec.eaft, alphas)
        values = eaft_saliency(
            regions,
            alphas,
            weights or region_weights(spec.eaft),
            mean=spec.reduction == "mean",
            prior_count=spec.prior_count * summed.mean_alpha,
        )
        routed = regions.counts(alphas) > 0
    elif spec.criterion in REROUTE:
        values, routed = (
            removal(observation, spec.criterion, source_alphas(observation, spec.mix)).saliency,
            summed.count > 0,
        )
        values = np.where(
            observation.reroute.measured[:, None], values, reap(summed, spec)
        )  # layers without a path: by plain REAP
    else:
        criterion = CRITERIA.get(spec.criterion) or user_criterion(spec.criterion)
        with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite is masked or refused below
            values, routed = _checked(criterion(summed, spec), summed, spec.criterion), summed.count > 0
    # 0/0 is NaN, and topk and argsort both rank NaN highest: an expert without tokens must never reach them as NaN
    values = np.where(routed, values, -np.inf)
    _check_finite(values, routed, observation, spec.criterion)
    return values


def _checked(values: object, summed: Totals, criterion: str) -> ndarray:
    """What a criterion returned, an array or anything that says it can be one (a tensor does), as float64 [L, E]."""
    shape = getattr(values, "shape", None)
    if not hasattr(values, "__array__") or tuple(shape) != summed.count.shape:
        found = f"an array of shape {list(shape)}" if hasattr(values, "__array__") else f"a {type(values).__name__}"
        raise UnusableError(
            f"saliency.criterion: '{criterion}' returned {found}; it must return an array of shape "
            f"{list(summed.count.shape)} [layers, experts]."
        )
    return np.asarray(values, dtype=np.float64)


def _check_finite(values: ndarray, routed: ndarray, observation: Observation, criterion: str) -> None:
    bad = np.argwhere(routed & ~np.isfinite(values)).tolist()
    if bad:
        named = ", ".join(f"layer {observation.layers[layer]} expert {expert}" for layer, expert in bad[:4])
        raise UnusableError(
            f"saliency: {criterion} is not a finite number for {len(bad)} of {values.size} experts ({named}"
            + (", …" if len(bad) > 4 else "")
            + "). The model overflowed while it was observed, or the "
            "criterion divides by zero. Observe in bfloat16 or float32, or mend the criterion."
        )
