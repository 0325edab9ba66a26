"""Who goes, given saliency and budgets: rankings, groups, the global allocation, nesting and reasons."""

from __future__ import annotations

import random
from math import inf

import pytest

from reapkit.core.errors import RecipeError
from reapkit.selection.allocation import LayerRanking, global_counts, global_cut, reasons, uniform_counts
from reapkit.selection.layer_budget import LayerBudget


def random_rankings(
    seed: int,
    *,
    layers: int = 5,
    experts: int = 12,
    groups: int = 1,
    signed: bool = True,
    ties: bool = False,
    dead: float = 0.1,
):
    draw = random.Random(seed)

    def value() -> float:
        if draw.random() < dead:
            return -inf
        return (draw.randrange(-2 if signed else 0, 4) if ties else draw.gauss(0 if signed else 5, 1)) * 10**layer

    found = {}
    for layer in range(layers):
        found[layer] = LayerRanking(tuple(value() for _ in range(experts)), {}, groups)
    return found


def budgets_for(rankings, kept: int, least: int = 2) -> dict[int, LayerBudget]:
    return {layer: LayerBudget(kept, kept, kept, least) for layer in rankings}


def test_ties_go_to_the_lower_index_and_dead_experts_go_first() -> None:
    ranking = LayerRanking((1.0, 2.0, -inf, 1.0, 1.0, -inf, -3.0), {})
    assert ranking.order == [1, 0, 3, 4, 6, 2, 5]
    assert [ranking.keep(count) for count in (1, 2, 3)] == [(1,), (0, 1), (0, 1, 3)]
    assert ranking.removal_order() == [5, 2, 6, 4, 3, 0, 1]


def test_protected_experts_come_before_all_others() -> None:
    ranking = LayerRanking((5.0, 4.0, -inf, 1.0), {2: "protected by hand", 3: "core"})
    assert ranking.keep(2) == (2, 3) and ranking.keep(3) == (0, 2, 3)


def test_groups_keep_the_same_number_each() -> None:
    for seed in range(20):
        [ranking] = random_rankings(seed, layers=1, groups=4, ties=True).values()
        for kept in (4, 8):
            inside = ranking.keep(kept)
            for group in range(4):
                members = range(3 * group, 3 * group + 3)
                expected = sorted(members, key=lambda e: (-ranking.saliency[e], e))[: kept // 4]
                assert [e for e in inside if e in members] == sorted(expected)


@pytest.mark.parametrize("ties", [False, True])
def test_global_is_one_ranking_over_all_layers(ties: bool) -> None:
    """Against sorting every expert of every layer by S / sum|S|, dropping from the worst, stopping at each layer's
    least."""
    for seed in range(60):
        rankings = random_rankings(seed, ties=ties)
        least, kept = 3, 7
        pool = []
        for layer, ranking in rankings.items():
            scale = sum(abs(s) for s in ranking.saliency if s != -inf)
            pool += [(s if s == -inf else s / scale, -layer, -e) for e, s in enumerate(ranking.saliency)]
        dropped = {layer: set() for layer in rankings}
        left = len(rankings) * (12 - kept)
        for _, layer, e in sorted(pool):
            if left and len(dropped[-layer]) < 12 - least:
                dropped[-layer].add(-e)
                left -= 1
        counts = global_counts(rankings, budgets_for(rankings, kept, least), 1)
        assert {
            layer: set(range(12)) - set(ranking.keep(counts[layer])) for layer, ranking in rankings.items()
        } == dropped


def test_global_spends_the_same_total_and_drops_less_saliency() -> None:
    for seed in range(40):
        rankings = random_rankings(seed, signed=False)
        budgets = budgets_for(rankings, 6)
        uniform, spread = uniform_counts(rankings, budgets), global_counts(rankings, budgets, 1)
        assert sum(uniform.values()) == sum(spread.values())

        def lost(counts, rankings=rankings) -> float:
            return sum(
                share
                for layer, ranking in rankings.items()
                for e, share in enumerate(ranking.normalised)
                if e not in ranking.keep(counts[layer]) and share != -inf
            )

        assert lost(spread) <= lost(uniform) + 1e-12


@pytest.mark.parametrize(("groups", "unit"), [(1, 1), (1, 4), (2, 2), (4, 4), (2, 6)])
def test_larger_ratios_drop_what_smaller_ones_drop(groups: int, unit: int) -> None:
    for seed in range(20):
        rankings = random_rankings(seed, groups=groups, ties=seed % 2 == 0)
        for counts_of in (
            lambda kept, rankings=rankings: uniform_counts(rankings, budgets_for(rankings, kept)),
            lambda kept, rankings=rankings: global_counts(rankings, budgets_for(rankings, kept, unit), unit),
        ):
            previous = None
            for kept in range(12 - unit, unit - 1, -unit):
                counts = counts_of(kept)
                assert all(count % unit == 0 for count in counts.values())
                keep = {layer: set(ranking.keep(counts[layer])) for layer, ranking in rankings.items()}
                assert previous is None or all(keep[layer] <= previous[layer] for layer in keep)
                previous = keep


def test_units_that_do_not_divide_the_experts() -> None:
    """12 experts in steps of 5: layers go 12, 10, 5; the total never exceeds the budget and falls short by less than a
    step."""
    for seed in range(20):
        rankings = random_rankings(seed)
        counts = global_counts(rankings, budgets_for(rankings, 10, 5), 5)
        assert set(counts.values()) <= {12, 10, 5}
        assert 0 <= 5 * 2 - sum(12 - count for count in counts.values()) < 5


def test_a_layer_without_saliency_keeps_its_uniform_budget() -> None:
    rankings = random_rankings(1, dead=0) | {9: LayerRanking((0.0,) * 12, {}), 10: LayerRanking((-inf,) * 12, {})}
    counts = global_counts(rankings, budgets_for(rankings, 8), 1)
    assert counts[9] == counts[10] == 8 and sum(counts.values()) == 8 * len(rankings)


def test_experts_never_routed_go_first_globally() -> None:
    rankings = {0: LayerRanking((5.0, 1.0, -inf, -inf), {}), 1: LayerRanking((-9.0, 1.0, 1.0, 1.0), {})}
    assert global_counts(rankings, budgets_for(rankings, 3, 1), 1) == {0: 2, 1: 4}


def test_caps_and_protection_hold_layers_up() -> None:
    rankings = random_rankings(3, dead=0)
    rankings[2] = LayerRanking(rankings[2].saliency, dict.fromkeys(range(10), "core"))
    budgets = budgets_for(rankings, 6) | {4: LayerBudget(6, 6, 11, 11)}
    counts = global_counts(rankings, budgets, 1)
    assert counts[4] >= 11 and counts[2] >= 10 and set(range(10)) <= set(rankings[2].keep(counts[2]))
    assert sum(counts.values()) == sum(budget.kept for budget in budgets.values())


def test_too_much_protection_is_refused_with_numbers() -> None:
    protected = dict.fromkeys(range(3), "protected by hand") | dict.fromkeys(range(3, 8), "super expert")
    rankings = {
        4: LayerRanking(tuple(map(float, range(12))), protected),
        5: LayerRanking(tuple(map(float, range(12))), {}),
    }
    with pytest.raises(RecipeError) as error:
        uniform_counts(rankings, budgets_for(rankings, 6))
    assert (
        str(error.value)
        == "prune.protect: layer 4 protects 8 experts (3 protected by hand, 5 super expert), so it must keep 8"
        " experts, but its budget keeps 6. Protect fewer, or prune less."
    )
    with pytest.raises(RecipeError, match="the budget removes 20 experts, but only 14 can be removed: 8 are protected"):
        global_counts(rankings, budgets_for(rankings, 2), 1)


def test_every_expert_has_its_reason() -> None:
    ranking = LayerRanking((9.0, 8.0, 7.0, 6.0, 5.0, 4.0, -inf, 3.0), {7: "core"})
    budget = LayerBudget(wanted=3, rounded=4, kept=6, least=6)
    assert reasons(ranking, ranking.keep(6), budget) == {
        7: "core",
        0: "saliency",
        1: "saliency",
        2: "rounding",
        3: "cap",
        4: "cap",
        5: "saliency",
        6: "never routed",
    }
    dead = LayerRanking((1.0, -inf, -inf), {})
    assert reasons(dead, dead.keep(2), LayerBudget(2, 2, 2, 1)) == {
        0: "saliency",
        1: "never routed, fills the budget",
        2: "never routed",
    }
    assert set(reasons(dead, dead.keep(3), LayerBudget(2, 2, 3, 3)).values()) == {"whole layer kept"}


def test_reasons_tell_group_quotas_from_saliency() -> None:
    ranking = LayerRanking((9.0, 8.0, 7.0, 1.0, 2.0, 3.0), {}, groups=2)
    assert reasons(ranking, ranking.keep(4), LayerBudget(4, 4, 4, 4)) == {
        0: "saliency",
        1: "saliency",
        2: "group quota",
        3: "saliency",
        4: "group quota",
        5: "saliency",
    }


def test_reasons_under_the_global_cut() -> None:
    rankings = {0: LayerRanking((4.0, 3.0, 2.0, 1.0), {}), 1: LayerRanking((97.0, 1.0, 1.0, 1.0), {})}
    budgets = budgets_for(rankings, 3, 3)
    counts = global_counts(rankings, budgets, 1)
    cut = global_cut(rankings, counts)
    assert counts == {0: 3, 1: 3} and cut == pytest.approx(0.1)
    assert reasons(rankings[1], rankings[1].keep(3), budgets[1], cut) == {
        0: "saliency",
        1: "layer minimum",
        2: "layer minimum",
        3: "saliency",
    }
