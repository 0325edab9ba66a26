"""A saliency criterion as one record: how it ranks experts, what it needs and what people read about it. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy import ndarray

from reapkit.core.errors import Problem, UnusableError
from reapkit.observation.materials import Material
from reapkit.observation.observation import MAXIMA, Observation
from reapkit.observation.removal_paths import Removal
from reapkit.recipe.schema import Recipe, SaliencySpec
from reapkit.selection.evidence import Evidence

Kept = Mapping[int, Sequence[int]]
"""Layer -> the experts that stay."""


@dataclass(frozen=True)
class Remarks:
    """What a criterion adds to a decision: facts for the selection's `details`, and sentences that users must read."""

    details: dict[str, Any]
    warnings: Sequence[str] = ()


def routed_positions(evidence: Evidence) -> ndarray:
    """N: the scored positions routed to each expert, float64 [L, E]."""
    return evidence.totals.count


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """How much each of E experts in L layers matters.

    What people read: `summary` is one line for the recipe's schema and reference; `explanation` completes "a saliency
    by `name`: …" in the model card; `symbols` is the formula without its division; `citations` are BibTeX entries.

    How it ranks: `function` gives numbers [L, E], higher is kept. With `reduction: mean` they are sums over positions,
    which `saliency.reduction` and `saliency.prior_count` divide by `counts`; with `sum` they are sums by nature, which
    nothing divides; None: they are no sums. Experts whose `counts` is 0 rank last. `removal`: the order in which
    experts go and what that costs, where saliency alone does not say it.

    What it needs: `columns` of the observation besides `count`, `materials` that are recorded on request, and
    `settings` of the recipe's `saliency` section that it reads besides mix, reduction and prior_count. `problems`: what
    it refuses of a recipe before anything is observed. `from_sums`: the report may compute it again for another mix.

    `remarks`: of the evidence, the settings, the kept experts, and a function that says which experts the same budget
    would keep by another saliency [L, E].
    """

    name: str
    summary: str
    explanation: str
    symbols: str | Callable[[SaliencySpec], str]
    function: Callable[[Evidence, SaliencySpec], Any]
    reduction: Literal["mean", "sum"] | None = None
    counts: Callable[[Evidence], ndarray] = routed_positions
    removal: Callable[[Evidence], Removal] | None = None
    columns: tuple[str, ...] = ()
    materials: tuple[Material, ...] = ()
    settings: tuple[str, ...] = ()
    problems: Callable[[Recipe], list[Problem]] | None = None
    from_sums: bool = False
    citations: tuple[str, ...] = ()
    remarks: Callable[[Evidence, SaliencySpec, Kept, Callable[[ndarray], Kept]], Remarks] | None = None

    def formula(self, spec: SaliencySpec) -> str:
        """What is computed for each expert under these settings, in symbols: `Σgn / (N + 2.5)`."""
        symbols = self.symbols if isinstance(self.symbols, str) else self.symbols(spec)
        if self.reduction != "mean" or spec.reduction == "sum":
            return symbols
        return f"{symbols} / " + (f"(N + {spec.prior_count:g})" if spec.prior_count else "N")

    def saliency(self, evidence: Evidence, spec: SaliencySpec) -> ndarray:
        """Float64 [L, E]; -inf for experts whose `counts` is 0.

        Raises UnusableError where the observation lacks what the criterion needs or a number is not finite.
        """
        return self.ranked(self.values(evidence, spec), evidence)

    def values(self, evidence: Evidence, spec: SaliencySpec) -> ndarray:
        """As `saliency`, float64 [L, E], before experts without positions are put last: NaN may stand where `counts` is
        0."""
        self._check_held(evidence.observation)
        with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite is masked or refused by `ranked`
            found = _as_array(self.function(evidence, spec), evidence.totals.count.shape, self.name)
        return self.reduced(found, evidence, spec)

    def reduced(self, sums: ndarray, evidence: Evidence, spec: SaliencySpec) -> ndarray:
        """Σ / (N + λ), float64 [L, E], with `sums` Σ float64 [L, E], N the `counts` and λ in tokens, scaled as the
        sources are; the bare sums where they are sums by nature or `reduction: sum` asks for them. 0/0 is NaN."""
        if self.reduction != "mean" or spec.reduction == "sum":
            return sums
        with np.errstate(divide="ignore", invalid="ignore"):
            return sums / (self.counts(evidence) + spec.prior_count * evidence.totals.mean_alpha)

    def ranked(self, values: ndarray, evidence: Evidence) -> ndarray:
        """`values`, float64 [L, E], with -inf where `counts` is 0. Raises UnusableError for any other number that is
        not finite.

        topk and argsort both rank NaN highest, so an expert without positions must never reach them as NaN.
        """
        counted = self.counts(evidence) > 0
        values = np.where(counted, values, -np.inf)
        _check_finite(values, counted, evidence.observation, self.name)
        return values

    def _check_held(self, observation: Observation) -> None:
        for material in self.materials:
            material.of(observation, f"saliency.criterion: {self.name}")
        for column in self.columns:
            (observation.maxima if column in MAXIMA else observation.statistics)[column]


def _as_array(values: Any, shape: tuple[int, ...], name: str) -> ndarray:
    """What a function returned, an array or anything that says it can be one (a tensor does), as float64 [L, E]."""
    if not hasattr(values, "__array__") or tuple(values.shape) != shape:
        found = f"an array of shape {list(values.shape)}" if hasattr(values, "__array__") else f"a {_kind(values)}"
        raise UnusableError(
            f"saliency.criterion: '{name}' returned {found}; it must return an array of shape {list(shape)} [layers,"
            " experts]."
        )
    return np.asarray(values, dtype=np.float64)


def _kind(value: object) -> str:
    return type(value).__name__


def _check_finite(values: ndarray, counted: ndarray, observation: Observation, name: str) -> None:
    bad = np.argwhere(counted & ~np.isfinite(values)).tolist()
    if bad:
        named = ", ".join(f"layer {observation.layers[layer]} expert {expert}" for layer, expert in bad[:4])
        raise UnusableError(
            f"saliency: {name} is not a finite number for {len(bad)} of {values.size} experts ({named}"
            + (", …" if len(bad) > 4 else "")
            + "). The model overflowed while it was observed, or the criterion divides by zero. Observe in bfloat16"
            " or float32, or correct the criterion."
        )
