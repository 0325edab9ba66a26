"""Decides which experts are dropped, given saliency and budgets: plain lists in, expert sets and reasons out.
Torch-free.

Rankings do not depend on how much is removed, so a larger budget always keeps what a smaller one keeps.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

from reapkit.core.errors import Problem, RecipeError
from reapkit.selection.layer_budget import LayerBudget
from reapkit.selection.selection import TABLE

NEVER_ROUTED = -inf
BY_HAND, SUPER, CORE = "protected by hand", "super expert", "core"


@dataclass(frozen=True, eq=False)
class LayerRanking:
    """A layer's experts by saliency, best first. `saliency`: -inf for experts never routed. `protected`: expert ->
    reason.

    `groups` > 1: experts are routed in that many groups of equal size, each of which keeps the same number. `path`: the
    order in which experts go (those it does not name stay longest), where saliency alone does not say it. `costs`: what
    removing each costs, comparable between layers, in place of normalised saliency.
    """

    saliency: tuple[float, ...]
    protected: Mapping[int, str]
    groups: int = 1
    path: tuple[int, ...] | None = None
    costs: tuple[float, ...] | None = None

    @cached_property
    def order(self) -> list[int]:
        """Protected experts first, then by saliency; ties go to the lower index."""
        experts = range(len(self.saliency))
        if self.path is not None:
            turn = {expert: i for i, expert in enumerate(self.path)}
            return sorted(
                experts, key=lambda expert: (expert not in self.protected, -turn.get(expert, len(experts)), expert)
            )
        return sorted(experts, key=lambda expert: (expert not in self.protected, -self.saliency[expert], expert))

    def group(self, expert: int) -> int:
        return expert * self.groups // len(self.saliency)

    @cached_property
    def by_group(self) -> list[list[int]]:
        """The order within each group."""
        groups: list[list[int]] = [[] for _ in range(self.groups)]
        for expert in self.order:
            groups[self.group(expert)].append(expert)
        return groups

    def keep(self, count: int) -> tuple[int, ...]:
        """The `count` experts kept, the same number of every group, ascending."""
        return tuple(sorted(expert for group in self.by_group for expert in group[: count // self.groups]))

    def least_for_protected(self) -> int:
        """The smallest count that keeps every protected expert."""
        counts = [0] * self.groups
        for expert in self.protected:
            counts[self.group(expert)] += 1
        return max(counts) * self.groups

    def removal_order(self) -> list[int]:
        """Worst first; with groups the worst of each in turn."""
        rounds = zip(*(reversed(group) for group in self.by_group), strict=True)
        return [expert for worst in rounds for expert in worst]

    @cached_property
    def normalised(self) -> list[float] | None:
        """S_e / Σ|S| over the routed experts, signed, -inf for those never routed; None where Σ|S| = 0. `costs` where
        there are."""
        if self.costs is not None:
            return list(self.costs)
        scale = sum(abs(value) for value in self.saliency if value != NEVER_ROUTED)
        return [value if value == NEVER_ROUTED else value / scale for value in self.saliency] if scale > 0 else None


def uniform_counts(rankings: Mapping[int, LayerRanking], budgets: Mapping[int, LayerBudget]) -> dict[int, int]:
    """Every layer keeps its own budget. Raises RecipeError where a layer protects more than it keeps."""
    problems = [
        _too_many_protected(layer, ranking, budgets[layer].kept)
        for layer, ranking in rankings.items()
        if ranking.least_for_protected() > budgets[layer].kept
    ]
    if problems:
        raise RecipeError(problems)
    return {layer: budgets[layer].kept for layer in rankings}


def global_counts(
    rankings: Mapping[int, LayerRanking], budgets: Mapping[int, LayerBudget], unit: int
) -> dict[int, int]:
    """Spends the layers' total budget where normalised saliency is lowest, never below a layer's least.

    Layers shrink in steps of `unit` experts (one without groups and `multiple_of`), each step costing the mean
    normalised saliency of its experts; of equals the lower layer is kept. Experts never routed go first; a layer
    without any saliency keeps its uniform budget. Where E is not a multiple of `unit` the total may fall short of the
    budget by less than one step.

    Raises RecipeError where what is protected does not fit.
    """
    counts = {layer: len(ranking.saliency) for layer, ranking in rankings.items()}
    least = {
        layer: max(budgets[layer].least, _round_up(ranking.least_for_protected(), unit, counts[layer]))
        for layer, ranking in rankings.items()
    }
    budget = sum(counts[layer] - budgets[layer].kept for layer in rankings)
    steps = {}
    for layer, ranking in rankings.items():
        shares = ranking.normalised
        if shares is None:
            counts[layer] = max(budgets[layer].kept, least[layer])
            budget -= len(ranking.saliency) - counts[layer]
        else:
            steps[layer] = _steps(ranking, shares, least[layer], unit)
    removable = sum(size for layer_steps in steps.values() for _, size in layer_steps)
    if removable < budget:
        protected = sum(len(ranking.protected) for ranking in rankings.values())
        raise RecipeError(
            [
                Problem(
                    "prune.protect",
                    f"the budget removes {budget} experts, but only {removable} can be removed: {protected} are"
                    " protected, and caps and routing keep others. Protect fewer, loosen prune.caps, or prune less.",
                )
            ]
        )
    queue = [(layer_steps[0][0], -layer, 0) for layer, layer_steps in steps.items() if layer_steps]
    heapq.heapify(queue)
    while queue:
        _, negative, i = heapq.heappop(queue)
        layer = -negative
        size = steps[layer][i][1]
        if size > budget:  # stop instead of looking for a smaller step: then a larger budget always continues this one
            break
        counts[layer] -= size
        budget -= size
        if i + 1 < len(steps[layer]):
            heapq.heappush(queue, (steps[layer][i + 1][0], negative, i + 1))
    return counts


def _steps(ranking: LayerRanking, shares: Sequence[float], least: int, unit: int) -> list[tuple[float, int]]:
    """(cost, experts) of each step a layer can shrink by; costs never fall from one step to the next."""
    lowest = min(0.0, *(share for share in shares if share != NEVER_ROUTED))
    order, steps, begin = ranking.removal_order(), [], 0
    while (end := begin + ((len(order) - begin) % unit or unit)) <= len(order) - least:
        steps.append((_step_cost([shares[expert] for expert in order[begin:end]], lowest), end - begin))
        begin = end
    return steps


def _step_cost(shares: Sequence[float], lowest: float) -> float:
    """The mean share; experts never routed count as the lowest, and a step of nothing else comes before all others."""
    routed = [share for share in shares if share != NEVER_ROUTED]
    if not routed:
        return NEVER_ROUTED
    return (sum(routed) + lowest * (len(shares) - len(routed))) / len(shares)


def global_cut(rankings: Mapping[int, LayerRanking], counts: Mapping[int, int]) -> float:
    """The highest normalised saliency that was dropped globally; experts kept below it owe it to their layer's
    minimum."""
    dropped = [
        shares[expert]
        for layer, ranking in rankings.items()
        if (shares := ranking.normalised) is not None
        for expert in set(range(len(shares))) - set(ranking.keep(counts[layer]))
    ]
    return max(dropped, default=NEVER_ROUTED)


def reasons(
    ranking: LayerRanking, kept: Sequence[int], budget: LayerBudget, cut: float | None = None
) -> dict[int, str]:
    """Why each expert stays or goes, in a few words, by expert. `cut`: the global cut under `allocation: global`, else
    None."""
    inside, plain = set(kept), set(ranking.order[: len(kept)])
    position = {expert: i for group in ranking.by_group for i, expert in enumerate(group)}
    return {
        expert: (
            _kept_reason(ranking, expert, position[expert], len(kept), expert in plain, budget, cut)
            if expert in inside
            else _dropped_reason(ranking, expert, expert in plain)
        )
        for expert in range(len(ranking.saliency))
    }


def _kept_reason(
    ranking: LayerRanking, expert: int, position: int, count: int, plain: bool, budget: LayerBudget, cut: float | None
) -> str:
    if budget.table:
        return TABLE
    if expert in ranking.protected:
        return ranking.protected[expert]
    if count == len(ranking.saliency):
        return "whole layer kept"
    if cut is not None and (shares := ranking.normalised) is not None and shares[expert] < cut:
        return "layer minimum"
    if cut is None and position >= budget.rounded // ranking.groups:
        return "cap"
    if cut is None and position >= -(-budget.wanted // ranking.groups):
        return "rounding"
    if ranking.saliency[expert] == NEVER_ROUTED:
        return "never routed, fills the budget"
    return _by(ranking) if plain else "group quota"


def _dropped_reason(ranking: LayerRanking, expert: int, plain: bool) -> str:
    if ranking.saliency[expert] == NEVER_ROUTED:
        return "never routed"
    return "group quota" if plain else _by(ranking)


def _by(ranking: LayerRanking) -> str:
    return "saliency" if ranking.path is None else "removal path"


def _too_many_protected(layer: int, ranking: LayerRanking, kept: int) -> Problem:
    names = list(ranking.protected.values())
    parts = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    groups = f" in {ranking.groups} equal groups" if ranking.groups > 1 else ""
    least = ranking.least_for_protected()
    return Problem(
        "prune.protect",
        f"layer {layer} protects {len(names)} experts ({parts}), so it must keep {least} experts{groups}, but its"
        f" budget keeps {kept}. Protect fewer, or prune less.",
    )


def _round_up(count: int, unit: int, most: int) -> int:
    return min(most, -(-count // unit) * unit)
