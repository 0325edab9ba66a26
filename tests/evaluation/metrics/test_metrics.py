"""Metrics against plain-Python computations of the same formulas, and against themselves."""

import math
import random
from fractions import Fraction

import pytest
import torch

from reapkit.evaluation.metrics.bootstrap import bootstrap_weights, measurement, measurements
from reapkit.evaluation.metrics.rows import RowIndex, regions, summarize_base, summarize_candidate, summarize_difference
from reapkit.evaluation.metrics.signals import (
    CONFIDENCE_EDGES,
    PositionSignals,
    Thresholds,
    describe,
    distinct_n,
    js_distance,
    kl_by_confidence,
    kl_divergence,
    loops,
    quantile,
    top_entropy,
)
from reapkit.observation.eaft_signals import signals

EAFT = {"p_low": "0.15", "h_low": "0.15", "thresholds": "pooled"}


@pytest.fixture(scope="module")
def logits():
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(2, 40, 32, generator=generator)


@pytest.fixture(scope="module")
def reference():
    return torch.randint(32, (40,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def index():
    """Six rows of two sources; one row of code measures nothing, a third source is outside the mix."""
    return RowIndex(
        torch.tensor([0, 7, 7, 15, 22, 30, 40]),
        torch.tensor([0, 0, 1, 0, 1, 2]),
        ("code", "tools", "french"),
        frozenset({"french"}),
    )


@pytest.fixture(scope="module")
def pair(logits, reference):
    return describe(logits[0], reference), describe(logits[1], reference, logits[0])


def softmax(row):
    top = max(row)
    exps = [math.exp(x - top) for x in row]
    return [x / sum(exps) for x in exps]


def test_signals_equal_a_naive_loop(logits, reference, pair):
    base, candidate = pair
    for t in range(40):
        p, q = softmax(logits[0, t].tolist()), softmax(logits[1, t].tolist())
        y = int(reference[t])
        top = softmax(sorted(logits[1, t].tolist(), reverse=True)[:20])
        assert candidate.p[t].item() == pytest.approx(q[y], rel=1e-5)
        assert candidate.nll[t].item() == pytest.approx(-math.log(q[y]), rel=1e-5)
        assert candidate.entropy[t].item() == pytest.approx(-sum(x * math.log(x) for x in top) / math.log(20), rel=1e-5)
        assert candidate.confidence[t].item() == pytest.approx(max(q), rel=1e-5)
        assert candidate.top1[t].item() == q.index(max(q))
        assert candidate.kl[t].item() == pytest.approx(
            sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-4
        )
    assert base.kl.abs().max() == 0


def test_p_and_entropy_are_those_that_an_observation_collects(logits, reference, pair):
    p, entropy = signals(logits[1], reference, 20)
    assert torch.allclose(pair[1].p, p, rtol=1e-5) and torch.allclose(pair[1].entropy, entropy, atol=1e-6)


def test_kl_ignores_tokens_that_the_base_rules_out():
    base = torch.tensor([[0.0, 0.0, float("-inf")]]).log_softmax(-1)
    assert kl_divergence(base, base).item() == 0
    assert kl_divergence(base, torch.zeros(1, 3).log_softmax(-1)).item() == pytest.approx(math.log(1.5), rel=1e-6)


def test_entropy_of_few_logits_and_of_certainty():
    assert top_entropy(torch.zeros(1, 5)).item() == pytest.approx(1.0)
    assert top_entropy(torch.tensor([[float("-inf")] * 7 + [0.0]])).item() == 0.0


@pytest.mark.parametrize("share", ["0.15", "0.5", "0.3", "1", "0"])
@pytest.mark.parametrize("n", [1, 7, 10, 100])
def test_quantiles_are_the_ceiled_rank(n, share):
    values = list(range(n))
    random.Random(0).shuffle(values)
    expected = sorted(values)[max(1, math.ceil(Fraction(share) * n)) - 1]
    assert quantile(torch.tensor(values, dtype=torch.float32), share).item() == expected


def test_thresholds_pooled_leave_out_foreign_sources_and_per_source_use_each_its_own(pair, index):
    base, _ = pair
    pooled = regions(base, index, EAFT)
    counted = sorted(base.p[:30].tolist())
    assert pooled.p.unique().tolist() == [counted[math.ceil(0.15 * 30) - 1]]
    own = regions(base, index, EAFT | {"thresholds": "per-source"})
    tools = [*base.entropy[7:15].tolist(), *base.entropy[22:30].tolist()]
    assert own.entropy[8].item() == sorted(tools)[math.ceil(0.15 * 16) - 1]


def test_statistics_equal_naive_sums(pair, index, reference):
    base, candidate = pair
    limits = Thresholds(torch.full((40,), 0.02), torch.full((40,), 0.6))
    found = summarize_candidate(base, candidate, index, limits, limits)
    assert list(found) == ["all", "code", "tools", "french"]
    where = {
        "all": range(30),
        "code": [*range(7), *range(15, 22)],
        "tools": [*range(7, 15), *range(22, 30)],
        "french": range(30, 40),
    }
    for group, positions in where.items():
        t = list(positions)
        got, n = found[group], len(t)

        def mean(values, t=t):
            return sum(float(values[i]) for i in t) / len(t)

        conflicts = [mean((each.p <= 0.02) & (each.entropy <= 0.6)) for each in (base, candidate)]
        kls = sorted(float(candidate.kl[i]) for i in t)
        expected = {
            "perplexity": math.exp(mean(candidate.nll)),
            "perplexity_ratio": math.exp(mean(candidate.nll) - mean(base.nll)),
            "nll_delta": mean(candidate.nll) - mean(base.nll),
            "kl_mean": mean(candidate.kl),
            "top1_agreement": mean(base.top1 == candidate.top1),
            "p_mean": mean(candidate.p),
            "p_mean_delta": mean(candidate.p) - mean(base.p),
            "entropy_mean": mean(candidate.entropy),
            "conflict_rate": conflicts[1],
            "conflict_rate_own": conflicts[1],
            "conflict_rate_delta": conflicts[1] - conflicts[0],
            "kl_median": kls[math.ceil(n / 2) - 1],
            "kl_p90": kls[math.ceil(Fraction("0.9") * n) - 1],
            "kl_p99": kls[math.ceil(Fraction("0.99") * n) - 1],
        }
        assert got["positions"] == n
        for name, value in expected.items():
            assert got[name]["value"] == pytest.approx(value, rel=1e-6, abs=1e-9), (group, name)
    assert found["all"]["rows"] == 4 and found["french"]["rows"] == 1
    assert found["french"]["kl_mean"]["interval"] is None
    for name in ("js_distance", "kl_mean", "perplexity_ratio", "kl_p90"):
        low, high = found["all"][name]["interval"]
        assert low <= found["all"][name]["value"] <= high


def test_conflicts_are_counted_by_the_bases_limits_and_by_its_own(pair, index):
    base, candidate = pair
    of_base, own = (
        Thresholds(torch.full((40,), 0.02), torch.full((40,), 0.6)),
        Thresholds(torch.full((40,), 0.3), torch.full((40,), 0.8)),
    )
    found = summarize_candidate(base, candidate, index, of_base, own)["all"]
    rate = [
        [
            sum(each.p[t].item() <= p and each.entropy[t].item() <= h for t in range(30)) / 30
            for p, h in ((0.02, 0.6), (0.3, 0.8))
        ]
        for each in (base, candidate)
    ]
    assert found["conflict_rate"]["value"] == pytest.approx(rate[1][0]) and found["conflict_rate_own"][
        "value"
    ] == pytest.approx(rate[1][1])
    assert found["conflict_rate_delta"]["value"] == pytest.approx(rate[1][0] - rate[0][0])
    assert rate[1][0] != rate[1][1] and rate[1][0] - rate[0][0] != rate[1][1] - rate[0][1], (
        "the test can tell them apart"
    )


def test_intervals_are_the_middle_95_percent_of_the_resamples():
    assert measurement(3.0, torch.arange(1001).flip(0)) == {"value": 3.0, "interval": [25.0, 975.0]}


def test_intervals_equal_a_naive_resampling_of_whole_rows(pair, index):
    """Each resample adds up its rows one by one, as often as they were drawn."""
    base, candidate = pair
    limits = Thresholds(torch.full((40,), 0.02), torch.full((40,), 0.6))
    found = summarize_candidate(base, candidate, index, limits, limits)["all"]
    rows, spans = (
        [0, 2, 3, 4],
        [(0, 7), (7, 15), (15, 22), (22, 30)],
    )  # the second row measures nothing, the last is outside
    weights = bootstrap_weights(index.source[torch.tensor(rows)]).tolist()
    ratios, kls, p90s = [], [], []
    for drawn in weights:
        positions = [
            (t, weight)
            for weight, (first, last) in zip(drawn, spans, strict=True)
            for t in range(first, last)
            if weight
        ]
        n = sum(weight for _, weight in positions)
        ratios.append(math.exp(sum(weight * (candidate.nll[t] - base.nll[t]).item() for t, weight in positions) / n))
        kls.append(sum(weight * candidate.kl[t].item() for t, weight in positions) / n)
        below = 0.0
        for t, weight in sorted(positions, key=lambda each: candidate.kl[each[0]].item()):
            below += weight
            if below >= 0.9 * n - 1e-9:
                p90s.append(candidate.kl[t].item())
                break

    def middle(values):
        ordered, last = sorted(values), len(values) - 1
        return [
            ordered[math.floor(q * last)]
            + (q * last) % 1 * (ordered[math.ceil(q * last)] - ordered[math.floor(q * last)])
            for q in (0.025, 0.975)
        ]

    assert found["perplexity_ratio"]["interval"] == pytest.approx(middle(ratios), rel=1e-5)
    assert found["kl_mean"]["interval"] == pytest.approx(middle(kls), rel=1e-5)
    assert found["kl_p90"]["interval"] == pytest.approx(middle(p90s[:200]), rel=1e-5)
    assert found["kl_p90"]["interval"][0] < found["kl_p90"]["interval"][1]


def test_kl_by_confidence_splits_every_position(pair):
    base, candidate = pair
    bins = kl_by_confidence(base.confidence, candidate.kl)
    assert sum(each["share"] for each in bins) == pytest.approx(1)
    assert sum(each["share"] * each["kl_mean"] for each in bins if each["share"]) == pytest.approx(
        candidate.kl.mean().item(), rel=1e-5
    )


def test_confidence_bins_and_histograms_equal_a_naive_count(pair, index):
    base, candidate = pair
    edges = CONFIDENCE_EDGES
    for low, high, found in zip(edges[:-1], edges[1:], kl_by_confidence(base.confidence, candidate.kl), strict=True):
        inside = [
            t
            for t in range(40)
            if low <= base.confidence[t].item() < high or (high == 1.0 == base.confidence[t].item())
        ]
        assert found["confidence"] == [low, high] and found["share"] == pytest.approx(len(inside) / 40)
        if inside:
            assert found["kl_mean"] == pytest.approx(
                sum(candidate.kl[t].item() for t in inside) / len(inside), rel=1e-5
            )
    limits = Thresholds(torch.full((40,), 0.02), torch.full((40,), 0.6))
    measured = summarize_candidate(base, candidate, index, limits, limits)["all"]["js_distance"]["value"]
    cells = [[0] * 400 for _ in range(2)]
    for each, counts in zip(pair, cells, strict=True):
        for t in range(30):  # the third source is outside
            counts[min(19, int(each.p[t].item() * 20)) * 20 + min(19, int(each.entropy[t].item() * 20))] += 1
    p, q = ([count / 30 for count in counts] for counts in cells)
    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    divergence = (
        sum(x * math.log2(x / z) for x, z in zip(p, m, strict=True) if x) / 2
        + sum(y * math.log2(y / z) for y, z in zip(q, m, strict=True) if y) / 2
    )
    assert measured == pytest.approx(math.sqrt(divergence), rel=1e-6)


def test_differences_of_two_candidates_are_paired(pair, index):
    base, candidate = pair
    same = summarize_difference(candidate, candidate, index)
    assert same["all"]["kl_mean_delta"] == {"value": 0.0, "interval": [0.0, 0.0]}
    found = summarize_difference(base, candidate, index)["tools"]
    t = [*range(7, 15), *range(22, 30)]
    assert found["kl_mean_delta"]["value"] == pytest.approx(sum(candidate.kl[i].item() for i in t) / 16, rel=1e-6)
    assert found["nll_delta"]["value"] == pytest.approx(
        sum(candidate.nll[i].item() - base.nll[i].item() for i in t) / 16, rel=1e-5
    )


def test_js_distance_equals_its_definition():
    a, b = [3, 1, 0, 4], [1, 1, 2, 0]
    p, q = [x / 8 for x in a], [x / 4 for x in b]
    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    expected = math.sqrt(
        sum(x * math.log2(x / z) for x, z in zip(p, m, strict=True) if x) / 2
        + sum(y * math.log2(y / z) for y, z in zip(q, m, strict=True) if y) / 2
    )
    assert js_distance(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(expected)
    assert js_distance(torch.tensor([1, 0]), torch.tensor([0, 5])).item() == 1


def test_base_against_itself_is_exactly_zero(logits, reference, index):
    base = describe(logits[0], reference)
    again = describe(logits[0], reference, logits[0])
    limits = regions(base, index, EAFT)
    found = summarize_candidate(base, again, index, limits, regions(again, index, EAFT))
    for group in found.values():
        for metric, value in {
            "kl_mean": 0,
            "kl_p99": 0,
            "nll_delta": 0,
            "perplexity_ratio": 1,
            "top1_agreement": 1,
            "p_mean_delta": 0,
            "conflict_rate_delta": 0,
            "js_distance": 0,
        }.items():
            assert group[metric]["value"] == value
            assert group[metric]["interval"] in ([value, value], None)
        assert group["conflict_rate_own"]["value"] == group["conflict_rate"]["value"]
    own = summarize_base(base, index, limits)
    assert own["all"]["perplexity"] == found["all"]["perplexity"]
    assert own["all"]["conflict_rate"] == found["all"]["conflict_rate"]


def test_bootstrap_is_seeded_paired_and_has_the_variance_of_the_mean():
    values = torch.randn(60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    strata = torch.zeros(60, dtype=torch.int64)
    weights = bootstrap_weights(strata, resamples=4000)
    assert torch.equal(weights, bootstrap_weights(strata, resamples=4000))
    assert not torch.equal(weights, bootstrap_weights(strata, resamples=4000, seed=1))
    assert torch.allclose(weights.sum(1), torch.tensor(60.0, dtype=torch.float64))
    means = weights @ values / 60
    assert means.std().item() == pytest.approx((values.std() / math.sqrt(60)).item(), rel=0.05)
    assert means.mean().item() == pytest.approx(values.mean().item(), abs=0.01)


def test_strata_keep_the_shares_of_the_sources_and_lone_rows_are_pooled():
    weights = bootstrap_weights(torch.tensor([0, 0, 0, 1, 1, 2, 3]), resamples=50)
    by_stratum = torch.stack([weights[:, :3].sum(1), weights[:, 3:5].sum(1), weights[:, 5:].sum(1)], 1)
    assert torch.allclose(by_stratum, torch.tensor([3.0, 2.0, 2.0], dtype=torch.float64))
    one_alone = bootstrap_weights(torch.tensor([0, 0, 1]), resamples=50)
    assert torch.allclose(one_alone.sum(1), torch.tensor(3.0, dtype=torch.float64)) and one_alone[:, 2].std() > 0
    assert bootstrap_weights(torch.tensor([0])) is None


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    generator = torch.Generator().manual_seed(5)
    hits = 0
    for _ in range(200):
        rows = torch.randn(24, generator=generator, dtype=torch.float64)
        found = measurements(
            {"x": rows, "n": torch.ones_like(rows)},
            lambda s: {"mean": s["x"] / s["n"]},
            bootstrap_weights(torch.zeros(24, dtype=torch.int64), resamples=300),
        )
        low, high = found["mean"]["interval"]
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.98


def test_loops_are_told_by_distinct_four_grams():
    assert distinct_n([1, 2, 3, 4, 1, 2, 3, 4], 4) == pytest.approx(4 / 5)
    assert distinct_n([1, 2, 3]) == 1.0
    assert loops([7] * 40) and not loops(list(range(40)))
    at, below = [*range(57), *[200] * 46], [*range(56), *[200] * 47]  # of 100 four-grams 58 and 57 differ
    assert (distinct_n(at), distinct_n(below)) == (0.58, 0.57)
    repeated = [*range(54), *[200] * 49]
    assert distinct_n(repeated) == 0.55 and not loops(repeated) and loops([*range(53), *[200] * 50])


def test_positions_slice_and_concatenate(pair):
    base, _ = pair
    joined = PositionSignals.concatenate([base[:10], base[10:]])
    assert torch.equal(joined.nll, base.nll) and len(joined) == 40
