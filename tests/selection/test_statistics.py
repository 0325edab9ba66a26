"""The report's numbers against their definitions, written out naively."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from reapkit.checkpoint.architecture import Architecture
from reapkit.selection.decide import select
from reapkit.selection.saliency import saliency
from reapkit.selection.statistics import (
    balance,
    chance_coverage,
    concentration,
    convergence,
    cut_curve,
    drivers,
    dropped_mask,
    floors,
    kept_overlap,
    mix_without,
    pearson,
    rank_correlation,
    redundancy_coverage,
    report_metrics,
    share_deleted,
    source_influence,
    spearman,
    specialisation,
    tail_risks,
)
from reapkit.selection.totals import totals
from tests.support.observations import observe_routing, random_routing
from tests.support.specs import prune, saliency_spec

TOY = Architecture("toy_moe", 3, 8, 2)


@pytest.fixture(scope="module")
def decided():
    observation = observe_routing(random_routing(0, dead=(2,)))
    return observation, select(observation, saliency_spec(), prune(ratio=0.5, protect={"super_experts": False}), TOY)


def test_shares_deleted_floor_and_balance(decided) -> None:
    observation, selection = decided
    summed, dropped = totals(observation), dropped_mask(selection, 8)
    n = observation.statistics["count"].sum(1).tolist()
    lost = sum(n[row][e] for row, layer in enumerate(selection.layers.values()) for e in layer.drop)
    assert share_deleted(summed.count, dropped) == pytest.approx(lost / sum(map(sum, n)))
    for row, layer in enumerate(selection.layers.values()):
        values = np.array([layer.saliency])
        assert floors(values, dropped[row : row + 1]) == [max(layer.saliency[e] for e in layer.drop)]
        mean = sum(n[row]) / 8
        assert balance(summed.count)[row] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in n[row]) / 8) / mean)


def test_floor_of_layers_that_lose_nothing_or_only_dead_experts() -> None:
    values = np.array([[1.0, 2.0, 3.0], [1.0, -np.inf, 2.0]])
    assert floors(values, np.array([[False] * 3, [False, True, False]])) == [None, None]


def test_the_cut_curve_ends_where_it_must(decided) -> None:
    observation, selection = decided
    summed, values = totals(observation), saliency(observation, saliency_spec())
    curve = cut_curve(summed, values)
    assert curve.traffic[0] == curve.mass[0] == 0 and curve.traffic[-1] == pytest.approx(1) and len(curve.traffic) == 9
    assert all(a <= b for a, b in zip(curve.mass, curve.mass[1:], strict=False))
    dropped = dropped_mask(selection, 8)
    assert curve.mass[4] == pytest.approx(share_deleted(summed.gate_norm_sum, dropped))
    assert curve.traffic[4] == pytest.approx(share_deleted(summed.count, dropped))
    k = round(curve.steepens_at * 8)
    assert curve.mass[k + 1] - curve.mass[k] > 1 / 8 and all(
        curve.mass[i + 1] - curve.mass[i] <= 1 / 8 for i in range(k)
    )


def test_tail_risk_counts_dropped_experts_in_the_top_quarter() -> None:
    peaks = np.array([[1.0, 8.0, 3.0, 4.0], [5.0, 6.0, 7.0, 2.0]])
    dropped = np.array([[True, True, False, False], [False, False, True, True]])
    assert tail_risks(peaks, dropped) == [0.5, 0.5]  # of eight, the top quarter is 8 and 7
    assert tail_risks(peaks, np.zeros((2, 4), bool)) == [None, None]
    assert tail_risks(np.ones((2, 4)), dropped) == [0.0, 0.0], "where all are equal none stands out"


def test_redundancy_coverage_against_the_definition(decided) -> None:
    observation, selection = decided
    pairs = observation.coactivation.sum(1)
    found = redundancy_coverage(pairs, dropped_mask(selection, 8))
    for row, layer in enumerate(selection.layers.values()):
        top = sum(pairs[row, i, j].item() for i in layer.drop for j in layer.keep)
        bottom = sum(pairs[row, i, j].item() for i in layer.drop for j in range(8) if j != i)
        assert found[row] == pytest.approx(top / bottom)
    assert chance_coverage(dropped_mask(selection, 8)) == [4 / 7] * 3
    assert redundancy_coverage(None, dropped_mask(selection, 8)) == [None] * 3


def test_even_coactivation_meets_its_chance_level() -> None:
    dropped = np.array([[True] * 3 + [False] * 7])
    assert redundancy_coverage(np.ones((1, 10, 10)), dropped) == pytest.approx(chance_coverage(dropped))


def test_correlations() -> None:
    a, b = np.array([1.0, 2.0, 2.0, 5.0, -1.0]), np.array([3.0, 1.0, 1.0, 9.0, 0.0])
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)
    ranks = (np.array([2.0, 3.5, 3.5, 5.0, 1.0]), np.array([4.0, 2.5, 2.5, 5.0, 1.0]))
    assert spearman(a, b) == pytest.approx(np.corrcoef(ranks)[0, 1], abs=1e-6)
    assert pearson(a, np.ones(5)) is None and pearson(a[:0], b[:0]) is None and pearson(a[:1], b[:1]) is None


def test_drivers_leave_dead_experts_out(decided) -> None:
    observation, _ = decided
    summed, values = totals(observation), saliency(observation, saliency_spec())
    rows = []
    for row in range(3):
        alive = [e for e in range(8) if summed.count[row, e] > 0]
        assert 2 not in alive
        rows.append(pearson(values[row, alive], summed.norm_sum[row, alive] / summed.count[row, alive]))
    assert drivers(summed, values)["norm_mean"]["pearson"] == pytest.approx(sum(rows) / 3)
    assert all(-1 <= v <= 1 for pair in drivers(summed, values).values() for v in pair.values())
    assert drivers(summed, summed.count)["count"] == {"pearson": pytest.approx(1), "spearman": pytest.approx(1)}


def test_concentration_is_the_share_of_the_top() -> None:
    mass = np.array([[8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0] * 9])
    assert concentration(mass) == {4: [pytest.approx(11 / 16), None], 8: [pytest.approx(15 / 16), None]}
    assert list(concentration(np.ones((1, 128)))) == [4, 8, 16, 32, 64]


def test_overlap_is_one_only_for_equal_sets() -> None:
    assert kept_overlap({0: [1, 2], 1: [3, 4], 2: [1]}, {0: [2, 1], 1: [4, 5, 6, 7]}) == {0: 1.0, 1: 0.25}
    dead = np.array([[1.0, -np.inf, -np.inf, 3.0]])
    assert rank_correlation(dead, dead) == [pytest.approx(1)]


def test_convergence_follows_the_snapshots(decided) -> None:
    observation, _ = decided
    counts = dict.fromkeys(observation.layers, 4)
    steps = convergence(observation, counts)
    assert [step["rows"] for step in steps] == ["1/16", "1/8", "1/4", "1/2"] and all(
        step["chance"] == 0.5 for step in steps
    )
    for i, step in enumerate(steps):
        n, mass = (observation.snapshots[name][i].sum(1) for name in ("count", "gate_norm_sum"))
        for row, layer in enumerate(observation.layers):
            early = sorted(range(8), key=lambda e: (-(mass[row, e] / n[row, e]).item() if n[row, e] else math.inf, e))[
                :4
            ]
            final = saliency(observation, saliency_spec())[row]
            whole = sorted(range(8), key=lambda e: (-final[e].item(), e))[:4]
            assert step["by_layer"][layer] == len(set(early) & set(whole)) / 4


def test_convergence_before_anything_was_seen_is_unknown(decided) -> None:
    observation, _ = decided
    for name in ("count", "gate_norm_sum"):
        observation.snapshots[name][0] = 0
    first, second, *_ = convergence(observation, dict.fromkeys(observation.layers, 4))
    assert first["overlap"] is None and first["rank_correlation"] is None and second["overlap"] is not None


def test_specialisation_is_a_share_of_rates() -> None:
    observation = observe_routing(random_routing(5, dead=(1,)))
    shares = specialisation(observation)
    np.testing.assert_allclose(shares.sum(1), np.ones((3, 8)))
    rates = observation.statistics["count"][0, :, 0] / observation.scored_tokens
    assert shares[0, 0, 0].item() == pytest.approx((rates[0] / rates.sum()).item()) and shares[0, :, 1].tolist() == [
        0.5,
        0.5,
    ]


def test_a_mix_without_a_source_is_an_observation_without_it() -> None:
    routing = random_routing(6, sources=3)
    names = ("code", "tools", "prose")
    observation = observe_routing(routing, sources=names)
    mix = mix_without(observation, "tools")
    assert set(mix) == {"code", "prose"}
    kept = [0, 2]
    n, mass = (observation.statistics[name][:, kept].sum(1) for name in ("count", "gate_norm_sum"))
    found = saliency(observation, saliency_spec(mix={name: float(weight) for name, weight in mix.items()}))
    np.testing.assert_allclose(found, np.where(n > 0, mass / n, -np.inf), rtol=1e-9, atol=0)


def test_what_a_source_alone_keeps() -> None:
    names = ("code", "tools", "prose")
    observation = observe_routing(random_routing(7, sources=3), sources=names)
    for given in (None, {"code": 1, "tools": 2}):
        spec = saliency_spec("ean-mean", mix=given)
        kept = {
            layer: np.argsort(-row, kind="stable")[:4].tolist()
            for layer, row in zip(observation.layers, saliency(observation, spec), strict=True)
        }
        influence = source_influence(observation, spec, kept)
        assert set(influence) == set(given or names)
        left = [observation.sources.index(name) for name in given or names if name != "code"]
        n, mass = (observation.statistics[name][:, left].sum(1) for name in ("count", "norm_sum"))
        others = np.where(n > 0, mass / n, -np.inf)
        for row, layer in enumerate(observation.layers):
            lost = set(kept[layer]) - set(np.argsort(-others[row], kind="stable")[:4].tolist())
            assert influence["code"]["would_drop"][layer] == sorted(lost)
        assert influence["code"]["overlap"] == pytest.approx(
            1 - sum(map(len, influence["code"]["would_drop"].values())) / 12
        )
    assert source_influence(observation, saliency_spec(mix={"code": 1}), kept) == {}


def test_all_numbers_of_a_selection_are_plain_data(decided) -> None:
    observation, selection = decided
    metrics = report_metrics(observation, selection)
    json.dumps(metrics, allow_nan=False)
    assert metrics["kept"] == [4, 4, 4] and metrics["layers"] == [0, 1, 2]
    risky = [risk * 4 for risk in metrics["tail_risk"]]
    assert metrics["tail_risk_all"] == pytest.approx(sum(risky) / 12)
    bare = {layer: dataclasses.replace(chosen, saliency=()) for layer, chosen in selection.layers.items()}
    imported = report_metrics(observation, dataclasses.replace(selection, layers=bare))
    assert imported["floor"] == [None] * 3 and imported["drivers"]["count"] == {"pearson": None, "spearman": None}
    assert imported["traffic_deleted"] == metrics["traffic_deleted"]
    mixed = select(observation, saliency_spec(mix={"code": 1}), prune(ratio=0.5, protect={"super_experts": False}), TOY)
    code = observation.statistics["count"][:, 0]
    assert report_metrics(observation, mixed)["traffic_deleted"] == pytest.approx(
        share_deleted(code, dropped_mask(mixed, 8))
    )
