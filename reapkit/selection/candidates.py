"""Turns a recipe's prune section into integers: the candidates of its grid, and how many experts each layer keeps.
Torch-free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from itertools import product
from typing import Any

from reapkit.checkpoint.architecture import Architecture
from reapkit.core.errors import Problem, RecipeError
from reapkit.core.formatting import ranges
from reapkit.recipe.schema import CandidatesSpec, PruneSpec, SaliencySpec
from reapkit.selection.criteria.registry import criterion_problem
from reapkit.selection.layer_budget import budget_path, found, layer_budgets, layer_range, unit_reason


@dataclass(frozen=True)
class Candidate:
    """One way to prune: everything of the recipe's grid decided. `ratio` is None where `keep_experts` says how much.

    Candidates that differ in their ratio only are nested: what the smaller ratio drops, the larger drops too.
    """

    name: str
    ratio: Decimal | None
    criterion: str
    allocation: str
    experts_per_token: int | None

    def prune(self, prune: PruneSpec) -> PruneSpec:
        """The recipe's prune section with this candidate's values in place of grid and scalars."""
        said = self.ratio is None or self.ratio == _scalar_ratio(
            prune
        )  # then errors name the field that the user wrote
        budget = {} if said else {"ratio": self.ratio, "keep_ratio": None, "keep_experts": None}
        return prune.model_copy(
            update={
                **budget,
                "candidates": None,
                "allocation": self.allocation,
                "experts_per_token": self.experts_per_token,
            }
        )

    def kept(self, prune: PruneSpec, architecture: Architecture, layers: Sequence[int]) -> dict[int, int]:
        """Kept experts by decoder layer; under `allocation: global` the counts whose total is spent."""
        return {layer: budget.kept for layer, budget in layer_budgets(self.prune(prune), architecture, layers).items()}

    def with_ratio(self, ratio: Decimal) -> Candidate:
        """This candidate with another ratio, whatever it removed before."""
        return replace(
            self, ratio=ratio, name=_name(ratio, None, self.criterion, self.allocation, self.experts_per_token)
        )

    def saliency(self, saliency: SaliencySpec) -> SaliencySpec:
        """The recipe's saliency section with this candidate's criterion."""
        return saliency.model_copy(update={"criterion": self.criterion})


def ratio_removing(removed: int, num_experts: int) -> Decimal:
    """The ratio that removes `removed` of `num_experts` experts; rounded down it would remove one less."""
    return (Decimal(removed) / num_experts).quantize(Decimal("0.00001"), ROUND_CEILING)


def kept_experts(
    prune: PruneSpec, ratio: Decimal | None, architecture: Architecture, layers: Sequence[int]
) -> dict[int, int]:
    """Kept experts by decoder layer; `ratio` replaces the recipe's scalars, None leaves them.

    Under `allocation: global` these are the counts whose total is spent. Raises RecipeError with every contradiction.
    """
    spec = (
        prune
        if ratio is None or ratio == _scalar_ratio(prune)
        else prune.model_copy(update={"ratio": ratio, "keep_ratio": None, "keep_experts": None})
    )
    return {layer: budget.kept for layer, budget in layer_budgets(spec, architecture, layers).items()}


def candidates(
    prune: PruneSpec, saliency: SaliencySpec, architecture: Architecture | None = None, layers: Sequence[int] = ()
) -> tuple[Candidate, ...]:
    """Every candidate of the recipe, the smallest model first; without a grid the one that the scalars say.

    `layers` are the decoder indices of the MoE layers; without an architecture only what the recipe alone can say is
    checked. Raises RecipeError with every contradiction of every candidate.
    """
    if problems := _grid_problems(prune):
        raise RecipeError(problems)
    listed = _grid(prune, saliency)
    problems = [
        problem
        for i, name in enumerate(dict.fromkeys(candidate.criterion for candidate in listed))
        if (problem := criterion_problem(name, _path(prune, "criterion", "saliency.criterion", i)))
    ]
    if prune.layout != "ragged" and any(candidate.allocation == "global" for candidate in listed):
        problems.append(
            Problem(
                "prune.candidates.allocation",
                "global gives layers different numbers of experts, which needs prune.layout: ragged. Set"
                " prune.layout: ragged, or remove global.",
            )
        )
    if architecture is not None:
        for candidate in listed:
            try:
                layer_budgets(candidate.prune(prune), architecture, layers)
            except RecipeError as error:
                problems += [_at_grid(problem, candidate, prune) for problem in error.problems]
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return listed


def budget_notes(prune: PruneSpec, architecture: Architecture, layers: Sequence[int]) -> list[str]:
    """What the plan says aloud about one candidate's budget: layers that a table routes, dense layers that a range
    skips, counts that rounding raised."""
    notes = []
    if tables := [layer for layer in layers if layer in architecture.tables]:
        notes.append(
            f"Layers {ranges(tables)} keep all {architecture.num_experts} experts: a fixed table says which experts a"
            " token goes to, and their router cannot choose others."
        )
    for i, cap in enumerate(prune.caps):
        if dense := layer_range(cap.layers, layers, architecture.num_hidden_layers).dense:
            notes.append(f"prune.caps[{i}].layers skips the dense layers {ranges(dense)}.")
    budget = next(iter(layer_budgets(prune, architecture, layers).values()))
    if budget.rounded != budget.wanted:
        notes.append(
            f"{budget_path(prune)}: {found(prune)} asks for {budget.wanted} kept experts, rounded up to "
            f"{budget.rounded} {unit_reason(prune, architecture)}."
        )
    return notes


def _grid_problems(prune: PruneSpec) -> list[Problem]:
    """Values of the grid that no model could take."""
    spec = prune.candidates or CandidatesSpec()
    problems = [
        Problem(f"prune.candidates.{name}", "is an empty list. Give values, or remove the field.")
        for name in type(spec).model_fields
        if getattr(spec, name) == ()
    ]
    problems += [
        Problem(f"prune.candidates.ratio[{i}]", f"found {ratio}, must be at least 0 and below 1.")
        for i, ratio in enumerate(spec.ratio or ())
        if not 0 <= ratio < 1
    ]
    return problems + [
        Problem(f"prune.candidates.experts_per_token[{i}]", f"found {top_k}, must be at least 1.")
        for i, top_k in enumerate(spec.experts_per_token or ())
        if top_k < 1
    ]


def _grid(prune: PruneSpec, saliency: SaliencySpec) -> tuple[Candidate, ...]:
    """The product of the grid's lists, a missing list being the scalar; nothing is checked against a model."""
    spec = prune.candidates or CandidatesSpec()
    axes = product(
        sorted(_distinct(spec.ratio), reverse=True) or (_scalar_ratio(prune),),
        sorted(_distinct(spec.experts_per_token)) or (prune.experts_per_token,),
        _distinct(spec.criterion) or (saliency.criterion,),
        _distinct(spec.allocation) or (prune.allocation,),
    )
    return tuple(
        Candidate(_name(ratio, prune.keep_experts, criterion, allocation, top_k), ratio, criterion, allocation, top_k)
        for ratio, top_k, criterion, allocation in axes
    )


def _scalar_ratio(prune: PruneSpec) -> Decimal | None:
    return 1 - prune.keep_ratio if prune.keep_ratio is not None else prune.ratio


def _distinct(values: Sequence[Any] | None) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values or ()))


def _name(ratio: Decimal | None, keep_experts: int | None, criterion: str, allocation: str, top_k: int | None) -> str:
    """A name that is also a file name, such as `reap-r0.5`, `reap-r0.5-global-top2` or `reap-keep80`."""
    budget = f"r{ratio.normalize():f}" if ratio is not None else f"keep{keep_experts}"
    parts = [re.sub(r"[^A-Za-z0-9_.-]+", ".", criterion), budget]
    parts += ["global"] if allocation == "global" else []
    parts += [f"top{top_k}"] if top_k is not None else []
    return "-".join(parts)


def _path(prune: PruneSpec, field: str, scalar_path: str, index: int | None = None) -> str:
    values = getattr(prune.candidates, field, None) if prune.candidates else None
    return scalar_path if not values else f"prune.candidates.{field}" + (f"[{index}]" if index is not None else "")


def _at_grid(problem: Problem, candidate: Candidate, prune: PruneSpec) -> Problem:
    """A candidate's problem at the place in the grid where the value of that candidate was written."""
    field = problem.path.removeprefix("prune.")
    values = getattr(prune.candidates, field, None) if field in ("ratio", "experts_per_token") else None
    if not values:
        return problem
    return Problem(_path(prune, field, problem.path, values.index(getattr(candidate, field))), problem.message)
