"""Turns the recipe's fractions into integers: how many experts each layer keeps, and why. Torch-free.

Every contradiction between the budget, the caps and the model's routing is found here, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor, lcm
from typing import cast

from reapkit.checkpoint.architecture import Architecture
from reapkit.core.errors import Problem, RecipeError
from reapkit.core.formatting import ranges
from reapkit.recipe.schema import Cap, PruneSpec


@dataclass(frozen=True)
class LayerBudget:
    """How many of a layer's experts are kept, with the steps that led there.

    `wanted` is what the ratio says, `rounded` after groups and `multiple_of`, `kept` after the caps, `least` the fewest
    that the layer's caps and the model's routing allow (what `allocation: global` may go down to). `table`: a fixed
    table routes the layer's tokens, so it keeps all its experts.
    """

    wanted: int
    rounded: int
    kept: int
    least: int
    table: bool = False


@dataclass(frozen=True)
class LayerRange:
    """The MoE layers that a range of the recipe names, and the dense ones it skips."""

    layers: tuple[int, ...]
    dense: tuple[int, ...] = ()


def kept_unit(prune: PruneSpec, architecture: Architecture) -> int:
    """What every kept count must be divisible by: lcm(n_group, multiple_of)."""
    return lcm(architecture.n_group, prune.multiple_of)


def layer_budgets(prune: PruneSpec, architecture: Architecture, layers: Sequence[int]) -> dict[int, LayerBudget]:
    """The budget of every MoE layer in `layers` (decoder indices). Raises RecipeError with every contradiction."""
    problems: list[Problem] = []
    wanted, rounded = _uniform_count(prune, architecture, problems)
    floors = _cap_floors(prune, architecture, layers, problems)
    routable = _round_up(
        _routing(prune, architecture).least_experts, kept_unit(prune, architecture), architecture.num_experts
    )
    budgets = {
        layer: LayerBudget(wanted, rounded, max(rounded, least), max(routable, least), layer in architecture.tables)
        for layer, least in floors.items()
    }
    if not problems:
        _check_routing(prune, architecture, rounded, problems)
        _check_layout(prune, architecture, budgets, problems)
        _check_protected(prune, architecture, budgets, problems)
    if not problems and all(budget.kept == architecture.num_experts for budget in budgets.values()):
        problems.append(
            Problem(
                budget_path(prune),
                f"{found(prune)}, but {_who_keeps(budgets)} every expert of every layer, so nothing is removed."
                + (" Loosen prune.caps." if prune.caps else " Choose another model."),
            )
        )
    if problems:
        raise RecipeError(problems)
    return budgets


def layer_range(spec: str | Sequence[int], layers: Sequence[int], num_hidden_layers: int) -> LayerRange:
    """The MoE layers named by `0-3`, `60-`, `7` or a list; ranges skip dense layers.

    Raises ValueError with the sentence to show for what cannot be parsed, names no MoE layer or leaves the model.
    """
    last, moe = num_hidden_layers - 1, set(layers)
    named: list[int] = []
    dense: list[int] = []
    for piece in [spec] if isinstance(spec, str) else map(str, spec):
        begin, dash, end = (part.strip() for part in piece.partition("-"))
        if not begin.isdecimal() or not (end.isdecimal() or (dash and not end) or not dash):
            raise ValueError(
                f"found '{piece.strip()}', which is not a layer range. Write layers as 7, 0-3, 60- or a"
                " list such as [0, 7]."
            )
        low, high = int(begin), int(end) if end else (last if dash else int(begin))
        if low > high or high > last:
            raise ValueError(
                f"found '{piece.strip()}', but the model has layers 0 to {last}. Give layers in this range"
                + (", the lower one first." if high <= last else ".")
            )
        inside = range(low, high + 1)
        if not dash and low not in moe:
            raise ValueError(f"layer {low} is dense and has no experts. MoE layers: {ranges(sorted(moe))}.")
        named += [layer for layer in inside if layer in moe]
        dense += [layer for layer in inside if layer not in moe]
    if not named:
        raise ValueError(f"names only dense layers ({ranges(sorted(set(dense)))}). MoE layers: {ranges(sorted(moe))}.")
    return LayerRange(tuple(sorted(set(named))), tuple(sorted(set(dense))))


# ---------------------------------------------------------------------------------------------- steps


def _uniform_count(prune: PruneSpec, architecture: Architecture, problems: list[Problem]) -> tuple[int, int]:
    """Kept experts of a layer without caps: as the ratio says, and rounded up to the unit."""
    experts, unit = architecture.num_experts, kept_unit(prune, architecture)
    if unit >= experts:
        problems.append(
            Problem(
                "prune.multiple_of",
                f"{prune.multiple_of}, but no count below {experts} experts is divisible by {unit}"
                f" ({_unit_factors(prune, architecture)}). Choose a smaller multiple_of.",
            )
        )
        return experts, experts
    if prune.keep_experts is not None:
        return _explicit_count(prune, architecture, prune.keep_experts, problems)
    removed = floor(experts * _ratio(prune))
    grouped = experts - removed // architecture.n_group * architecture.n_group
    rounded = _round_up(grouped, unit, experts)
    if rounded == experts:
        fewest = experts - (experts - 1) // unit * unit
        problems.append(
            Problem(
                budget_path(prune),
                f"{found(prune)}, which removes {removed} of {experts} experts"
                + (f" and none once the kept count is rounded {unit_reason(prune, architecture)}" if removed else "")
                + f". Choose {_ratio_for(prune, Fraction(fewest, experts))}, which removes {fewest} per "
                "layer.",
            )
        )
    return experts - removed, rounded


def _explicit_count(
    prune: PruneSpec, architecture: Architecture, kept: int, problems: list[Problem]
) -> tuple[int, int]:
    experts, unit = architecture.num_experts, kept_unit(prune, architecture)
    if kept >= experts:
        problems.append(
            Problem(
                "prune.keep_experts",
                f"{kept}, but {architecture.model_type} has {experts} routed experts per "
                f"layer, so nothing is removed. Choose {_choices(prune, architecture)}.",
            )
        )
    elif kept % unit:
        below, least = kept // unit * unit, _least(prune, architecture)
        near = " or ".join(str(count) for count in (below, below + unit) if least <= count < experts)
        factors, choice = _unit_factors(prune, architecture), near or _choices(prune, architecture)
        problems.append(
            Problem("prune.keep_experts", f"{kept} is not divisible by {unit} ({factors}). Choose {choice}.")
        )
    return kept, kept


def _cap_floors(
    prune: PruneSpec, architecture: Architecture, layers: Sequence[int], problems: list[Problem]
) -> dict[int, int]:
    """The fewest experts that tables and caps leave in each layer, divisible by the unit unless it is all of them; 0
    without either."""
    experts = architecture.num_experts
    floors = {layer: experts if layer in architecture.tables else 0 for layer in layers}
    for i, cap in enumerate(prune.caps):
        try:
            capped = layer_range(cap.layers, layers, architecture.num_hidden_layers).layers
        except ValueError as error:
            problems.append(Problem(f"prune.caps[{i}].layers", str(error)))
            continue
        if cap.min_experts is not None and cap.min_experts > experts:
            problems.append(
                Problem(
                    f"prune.caps[{i}].min_experts",
                    f"{cap.min_experts}, but a layer has {experts} experts. Choose 1 to {experts}, or keep_all: true.",
                )
            )
            continue
        kept = _round_up(_cap_count(cap, experts), kept_unit(prune, architecture), experts)
        floors.update({layer: max(floors[layer], kept) for layer in capped})
    return floors


def _cap_count(cap: Cap, experts: int) -> int:
    if cap.keep_all:
        return experts
    return (
        cap.min_experts
        if cap.min_experts is not None
        else experts - floor(experts * Fraction(cast(Decimal, cap.max_ratio)))
    )


def _check_routing(prune: PruneSpec, architecture: Architecture, rounded: int, problems: list[Problem]) -> None:
    """Top-k must still find its experts, group by group."""
    least, routing = _least(prune, architecture), _routing(prune, architecture)
    top_k = routing.num_experts_per_tok
    if architecture.tables and top_k != architecture.num_experts_per_tok:
        problems.append(
            Problem(
                "prune.experts_per_token",
                f"{top_k}, but a fixed table routes the tokens of layers {ranges(architecture.tables)} to"
                f" {architecture.num_experts_per_tok} experts each, which cannot be changed. Remove the field.",
            )
        )
        return
    source = "prune.experts_per_token" if prune.experts_per_token is not None else "num_experts_per_tok"
    needs = f"{architecture.model_type} routes each token to {top_k} experts ({source})"
    if architecture.n_group > 1:
        needs += f" in {architecture.topk_group} of {architecture.n_group} groups, each scored by its two best"
    if least > architecture.num_experts:
        most = _largest_top_k(architecture, architecture.num_experts)
        problems.append(
            Problem(
                "prune.experts_per_token",
                f"{top_k}, but {needs}, which needs {least} of the {architecture.num_experts} experts. Choose 1 to"
                f" {most}.",
            )
        )
    elif rounded < least == architecture.num_experts:
        problems.append(
            Problem(
                budget_path(prune),
                f"{found(prune)}, but {needs}, which needs all {least}, so none can be removed. Lower"
                " prune.experts_per_token.",
            )
        )
    elif rounded < least and prune.keep_experts is not None:
        problems.append(
            Problem("prune.keep_experts", f"{rounded}, but {needs}. Choose {_choices(prune, architecture)}.")
        )
    elif rounded < least:
        most = _ratio_for(prune, Fraction(architecture.num_experts - least, architecture.num_experts), at_most=True)
        problems.append(
            Problem(
                budget_path(prune),
                f"{found(prune)} leaves {rounded} of {architecture.num_experts} experts, but {needs}, which needs"
                f" {least}. Choose {most}.",
            )
        )


def _check_layout(
    prune: PruneSpec, architecture: Architecture, budgets: dict[int, LayerBudget], problems: list[Problem]
) -> None:
    """With `layout: uniform` tables and caps must leave the same count everywhere."""
    counts = {budget.kept for budget in budgets.values()}
    if prune.layout == "ragged" or len(counts) == 1:
        return
    experts, rounded = architecture.num_experts, min(counts)
    if architecture.tables:
        problems.append(
            Problem(
                "prune.layout",
                f"uniform, but a fixed table routes the tokens of layers {ranges(architecture.tables)}, which therefore"
                f" keep all {experts} experts, while the others keep {rounded}. Set prune.layout: ragged.",
            )
        )
    for i, cap in enumerate(prune.caps):
        kept = _round_up(_cap_count(cap, experts), kept_unit(prune, architecture), experts)
        if kept > rounded:
            capped = layer_range(cap.layers, tuple(budgets), architecture.num_hidden_layers).layers
            everywhere = (
                None
                if kept == experts
                else str(kept)
                if prune.keep_experts is not None
                else _ratio_for(prune, Fraction(experts - kept, experts), at_most=True)
            )
            field = budget_path(prune).removeprefix("prune.")
            problems.append(
                Problem(
                    f"prune.caps[{i}]",
                    f"keeps {kept} of {experts} experts in layers {ranges(capped)}, but {field} keeps {rounded} in the"
                    f" others, and layout: uniform allows one number for all layers. Loosen the cap to {rounded}"
                    " experts"
                    + (f", set {field} to {everywhere}" if everywhere else "")
                    + ", or set prune.layout: ragged.",
                )
            )


def _who_keeps(budgets: Mapping[int, LayerBudget]) -> str:
    return "fixed tables keep" if all(budget.table for budget in budgets.values()) else "the caps keep"


def _check_protected(
    prune: PruneSpec, architecture: Architecture, budgets: dict[int, LayerBudget], problems: list[Problem]
) -> None:
    """Experts protected by hand exist and fit into what is kept, group by group; so does the core."""
    experts, groups = architecture.num_experts, architecture.n_group
    for layer, protected in prune.protect.experts.items():
        path = f"prune.protect.experts.{layer}"
        if layer not in budgets:
            problems.append(Problem(path, f"layer {layer} is not an MoE layer. MoE layers: {ranges(sorted(budgets))}."))
            continue
        if wrong := sorted({expert for expert in protected if not 0 <= expert < experts}):
            named = ", ".join(map(str, wrong))
            problems.append(Problem(path, f"expert {named}, but a layer's experts are 0 to {experts - 1}."))
            continue
        room = experts if prune.allocation == "global" else budgets[layer].kept
        for group in range(groups):
            inside = {expert for expert in protected if expert * groups // experts == group}
            if len(inside) > room // groups:
                where = f" in group {group}" if groups > 1 else ""
                problems.append(
                    Problem(
                        path,
                        f"protects {len(inside)} experts{where}, but the layer keeps "
                        f"{room // groups}{where}. Protect fewer, or prune less.",
                    )
                )
    kept = min(budget.kept for budget in budgets.values())
    if prune.protect.core_per_layer > kept:
        problems.append(
            Problem(
                "prune.protect.core_per_layer",
                f"{prune.protect.core_per_layer}, but a layer keeps {kept} experts. Choose 0 to {kept}.",
            )
        )


# ---------------------------------------------------------------------------------------------- words and numbers


def _ratio(prune: PruneSpec) -> Fraction:
    return Fraction(prune.ratio) if prune.ratio is not None else 1 - Fraction(cast(Decimal, prune.keep_ratio))


def budget_path(prune: PruneSpec) -> str:
    """The recipe path of the field that says how much goes."""
    return "prune." + next(name for name in ("ratio", "keep_ratio", "keep_experts") if getattr(prune, name) is not None)


def found(prune: PruneSpec) -> str:
    """Its value, as the user wrote it."""
    return str(next(value for value in (prune.ratio, prune.keep_ratio, prune.keep_experts) if value is not None))


def _ratio_for(prune: PruneSpec, removed: Fraction, *, at_most: bool = False) -> str:
    """A value of the recipe's own field that removes at least (or at most) this fraction, in at most four decimals."""
    keeps = prune.keep_ratio is not None
    value, up = (1 - removed, at_most) if keeps else (removed, not at_most)
    rounded = Decimal((ceil if up else floor)(value * 10_000)) / 10_000
    return f"{'at least' if up else 'at most'} {rounded.normalize():f}"


def _routing(prune: PruneSpec, architecture: Architecture) -> Architecture:
    """The architecture with the recipe's top-k override."""
    top_k = prune.experts_per_token
    return architecture if top_k is None else replace(architecture, num_experts_per_tok=top_k)


def _least(prune: PruneSpec, architecture: Architecture) -> int:
    """The fewest experts that route, divisible by the unit; above the expert count where the top-k cannot be met at
    all."""
    least, experts = _routing(prune, architecture).least_experts, architecture.num_experts
    return least if least > experts else _round_up(least, kept_unit(prune, architecture), experts)


def _largest_top_k(architecture: Architecture, kept: int) -> int:
    return kept // architecture.n_group * architecture.topk_group if architecture.n_group > 1 else kept


def _choices(prune: PruneSpec, architecture: Architecture) -> str:
    unit = kept_unit(prune, architecture)
    least, most = _least(prune, architecture), (architecture.num_experts - 1) // unit * unit
    return f"{least} to {most}" + (f" in steps of {unit}" if unit > 1 else "")


def _round_up(count: int, unit: int, most: int) -> int:
    return min(most, -(-count // unit) * unit)


def unit_reason(prune: PruneSpec, architecture: Architecture) -> str:
    return f"to a multiple of {kept_unit(prune, architecture)} ({_unit_factors(prune, architecture)})"


def _unit_factors(prune: PruneSpec, architecture: Architecture) -> str:
    return f"n_group {architecture.n_group}, multiple_of {prune.multiple_of}"
