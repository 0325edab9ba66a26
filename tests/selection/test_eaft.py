"""EAFT-REAP against a brute-force two-pass loop: thresholds from all positions first, then weights."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from reapkit.core.errors import UnusableError
from reapkit.selection.eaft import REGIONS, measure_regions, quantile, summarise
from reapkit.selection.saliency import saliency
from reapkit.selection.totals import source_alphas
from tests.support.observations import observe_routing, random_routing, repeated, variants
from tests.support.specs import saliency_spec

STRICT = {"good": {"p_high": 0.6, "h_mid": 0.4, "other_weight": 0.1}}


def rank_quantile(values: list[float], level: str) -> float:
    """The ceil(level * n)-th smallest."""
    return sorted(values)[max(1, math.ceil(Fraction(level) * len(values))) - 1] if values else math.nan


def two_passes(
    routing,
    *,
    quantiles: dict | None = None,
    per_source: bool = False,
    strict: bool = False,
    experts: int = 8,
    sources: int = 2,
):
    """(saliency rows, region of every position with a signal), from nothing but the definition."""
    levels = {"p_low": "0.15", "h_low": "0.15", "h_high": "0.85"} | (quantiles or {})
    p_of, h_of, source_of, signal, expert = (
        getattr(routing, name).tolist() for name in ("p", "h", "source", "signal", "expert")
    )
    contribution = (routing.gate * routing.norm).tolist()
    positions = [t for t in range(len(p_of)) if signal[t]]

    def border(values, source: int, level: str) -> float:
        own = [values[t] for t in positions if not per_source or source_of[t] == source]
        return rank_quantile(own, level)

    borders = [
        {
            "p_low": border(p_of, s, levels["p_low"]),
            "h_low": border(h_of, s, levels["h_low"]),
            "h_high": border(h_of, s, levels["h_high"]),
            "p_high": border(p_of, s, "0.6"),
            "h_mid": border(h_of, s, "0.4"),
        }
        for s in range(sources)
    ]
    weights = {"conflict": -2.0, "uncertain": 0.25, "good": 1.0, "other": 0.1}
    regions = []
    for t in positions:
        p, h, b = p_of[t], h_of[t], borders[source_of[t]]
        if p <= b["p_low"] and h <= b["h_low"]:
            regions.append("conflict")
        elif p <= b["p_low"] and h >= b["h_high"]:
            regions.append("uncertain")
        else:
            regions.append("good" if not strict or (p >= b["p_high"] and h <= b["h_mid"]) else "other")
    rows = []
    for layer in range(len(expert)):
        sums, counts = [0.0] * experts, [0] * experts
        for t, region in zip(positions, regions, strict=True):
            for e, mass in zip(expert[layer][t], contribution[layer][t], strict=True):
                sums[e] += weights[region] * mass
                counts[e] += 1
        rows.append([s / n if n else -math.inf for s, n in zip(sums, counts, strict=True)])
    return np.array(rows), regions


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("thresholds", ["pooled", "per-source"])
@pytest.mark.parametrize("strict", [False, True])
def test_against_two_passes(seed: int, thresholds: str, strict: bool) -> None:
    spec = saliency_spec("eaft-reap", eaft={"thresholds": thresholds} | (STRICT if strict else {}))
    for routing in variants(seed):
        observation = observe_routing(routing)
        expected, regions = two_passes(routing, per_source=thresholds == "per-source", strict=strict)
        np.testing.assert_allclose(saliency(observation, spec), expected, rtol=1e-12, atol=1e-12)
        measured = measure_regions(observation, spec.eaft, source_alphas(observation, None))
        assert measured.positions.sum(0).tolist() == [regions.count(name) for name in REGIONS]
        counted = [torch.bincount(routing.expert[layer, routing.signal].flatten(), minlength=8) for layer in range(3)]
        assert np.array_equal(measured.count.sum((1, 2)), torch.stack(counted))


@pytest.mark.parametrize(
    "quantiles",
    [{"p_low": "0"}, {"p_low": "1", "h_low": "1"}, {"h_low": "0.5", "h_high": "0.5", "p_low": "0.5"}, {"h_high": "1"}],
)
def test_extreme_quantiles(quantiles: dict) -> None:
    routing = random_routing(4)
    spec = saliency_spec("eaft-reap", eaft={"quantiles": {name: float(level) for name, level in quantiles.items()}})
    expected, _ = two_passes(routing, quantiles=quantiles)
    np.testing.assert_allclose(saliency(observe_routing(routing), spec), expected, rtol=1e-12, atol=1e-12)


def test_empty_regions_and_one_position() -> None:
    routing = random_routing(5)
    low_p_with_high_h = {"p": torch.linspace(0, 1, 120), "h": torch.linspace(1, 0, 120)}
    never = type(routing)(**(vars(routing) | low_p_with_high_h))
    measured = measure_regions(observe_routing(never), saliency_spec().eaft, (Fraction(1), Fraction(1)))
    found = dict(zip(REGIONS, measured.positions.sum(0).tolist(), strict=True))
    assert found["conflict"] == 0 and found["uncertain"] > 0
    assert not np.isnan(measured.gate_norm_sum).any()
    one = repeated(routing, routing.signal.nonzero().flatten()[:1])
    expected, regions = two_passes(one)
    assert regions == ["conflict"], "a single position is its own quantile of both signals"
    np.testing.assert_allclose(
        saliency(observe_routing(one), saliency_spec("eaft-reap")), expected, rtol=1e-12, atol=1e-12
    )


def test_no_signal_at_all_ranks_every_expert_last() -> None:
    routing = random_routing(6)
    silent = type(routing)(**(vars(routing) | {"signal": torch.zeros(120, dtype=torch.bool)}))
    observation = observe_routing(silent)
    assert (saliency(observation, saliency_spec("eaft-reap")) == -np.inf).all()
    summary = summarise(
        measure_regions(observation, saliency_spec().eaft, (Fraction(1),) * 2), observation.sources, (Fraction(1),) * 2
    )
    assert summary["thresholds"]["pooled"]["p_low"] is None and summary["shares"]["all"]["conflict"] == 0.0


def test_quantile_is_the_ranked_value() -> None:
    draw = torch.Generator().manual_seed(0)
    for n in (1, 2, 3, 7, 20, 100):
        values = torch.randint(0, 9, (n,), generator=draw).float() / 8
        for level in ("0", "0.01", "0.15", "0.3333", "0.5", "0.85", "1"):
            split = int(torch.randint(0, n + 1, (1,), generator=draw))
            pieces = [values[:split].sort().values, values[split:].sort().values]
            assert quantile(pieces, (Fraction(1),) * 2, Decimal(level)) == rank_quantile(values.tolist(), level)


def test_quantile_does_not_round_the_level() -> None:
    """0.15 of 20 is exactly the third smallest; in binary floats 0.15 * 20 is 3.0000000000000004-prone territory."""
    for n in (20, 40, 60, 100, 700, 1400):
        values = torch.arange(n).float()
        for percent in range(1, 101):
            assert (
                quantile([values], (Fraction(1),), Decimal(percent) / 100) == math.ceil(Fraction(percent * n, 100)) - 1
            )


def test_weighted_quantile_equals_repetition() -> None:
    draw = torch.Generator().manual_seed(1)
    for _ in range(50):
        a, b = (torch.randint(0, 30, (n,), generator=draw).float().sort().values for n in (13, 29))
        times = torch.randint(1, 5, (2,), generator=draw).tolist()
        level = Decimal(int(torch.randint(0, 101, (1,), generator=draw))) / 100
        repeats = [piece.repeat_interleave(n) for piece, n in zip((a, b), times, strict=True)]
        alphas = tuple(Fraction(n, 7) for n in times)
        assert quantile([a, b], alphas, level) == quantile(repeats, (Fraction(1),) * 2, level)
    assert quantile([a, b], (Fraction(0), Fraction(3)), Decimal("0.5")) == quantile([b], (Fraction(1),), Decimal("0.5"))


def test_chunks_do_not_change_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    observation, spec = observe_routing(random_routing(7)), saliency_spec("eaft-reap")
    whole = saliency(observation, spec)
    monkeypatch.setattr("reapkit.selection.eaft.CHUNK_POSITIONS", 7)
    np.testing.assert_allclose(saliency(observation, spec), whole, rtol=1e-14, atol=1e-14)


def test_summary_states_shares_of_the_mix() -> None:
    observation, spec = observe_routing(random_routing(8)), saliency_spec("eaft-reap", mix={"code": 0.9, "tools": 0.1})
    alphas = source_alphas(observation, spec.mix)
    summary = summarise(measure_regions(observation, spec.eaft, alphas), observation.sources, alphas)
    assert list(summary["thresholds"]) == ["pooled"] and set(summary["shares"]) == {"all", "code", "tools"}
    for shares in summary["shares"].values():
        assert sum(shares.values()) == pytest.approx(1)
    weight = [
        float(alpha) * sum(summary["positions"][name].values())
        for alpha, name in zip(alphas, ("code", "tools"), strict=True)
    ]
    mixed = sum(
        w * summary["shares"][name]["conflict"] for w, name in zip(weight, ("code", "tools"), strict=True)
    ) / sum(weight)
    assert summary["shares"]["all"]["conflict"] == pytest.approx(mixed)


def test_without_signals_it_says_what_to_set() -> None:
    with pytest.raises(UnusableError, match=r"eaft-reap needs EAFT signals, .* Observe with observe\.eaft: true"):
        saliency(observe_routing(random_routing(9, tokens=10), trace=False), saliency_spec("eaft-reap"))


def test_signals_that_are_not_finite_are_refused() -> None:
    routing = random_routing(10)
    routing.p[routing.signal.nonzero()[0]] = math.nan
    with pytest.raises(UnusableError, match=r"the EAFT signals of 1 of .* positions are not finite"):
        saliency(observe_routing(routing), saliency_spec("eaft-reap"))
