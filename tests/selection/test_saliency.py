"""Criteria against a naive double loop over positions and slots; dead experts, mixes and users' own functions."""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pytest
import torch

from reapkit.core.errors import RecipeError, UnusableError
from reapkit.selection.saliency import formula, saliency
from reapkit.selection.totals import Totals, totals
from tests.support.observations import observe_routing, random_routing, repeated
from tests.support.specs import saliency_spec

NAIVE = {  # (what a slot adds, of gate, norm and the residual stream's norm, and whether a mean is taken)
    "reap": (lambda g, n, r: g * n, True),
    "reap-relative": (lambda g, n, r: (g * n / r) ** 2, False),
    "ean": (lambda g, n, r: n, False),
    "ean-mean": (lambda g, n, r: n, True),
    "frequency": (lambda g, n, r: 1.0, False),
    "weighted-frequency": (lambda g, n, r: g, False),
}


def naive(
    routing, criterion: str, *, mean: bool | None = None, prior: float = 0.0, experts: int = 8
) -> list[list[float]]:
    adds, by_mean = NAIVE[criterion]
    mean = by_mean if mean is None else mean
    expert, gate, norm, scored, residual = (
        getattr(routing, name).tolist() for name in ("expert", "gate", "norm", "scored", "residual")
    )
    rows = []
    for layer in range(len(expert)):
        sums, counts = [0.0] * experts, [0] * experts
        for t in range(len(scored)):
            for slot, e in enumerate(expert[layer][t]):
                if scored[t]:
                    sums[e] += adds(gate[layer][t][slot], norm[layer][t][slot], residual[layer][t])
                    counts[e] += 1
        rows.append([-math.inf if not n else s / (n + prior) if mean else s for s, n in zip(sums, counts, strict=True)])
    return rows


@pytest.mark.parametrize("criterion", NAIVE)
def test_against_a_naive_double_loop(criterion: str) -> None:
    routing = random_routing(1, dead=(3,))
    found = saliency(observe_routing(routing, trace=False), saliency_spec(criterion))
    np.testing.assert_allclose(found, naive(routing, criterion), rtol=1e-12, atol=0)


def test_a_sum_by_nature_is_divided_by_nothing() -> None:
    observation = observe_routing(random_routing(1), trace=False)
    plain = saliency(observation, saliency_spec("reap-relative"))
    for values in ({"reduction": "mean"}, {"reduction": "sum"}, {"prior_count": 7.5}):
        assert np.array_equal(saliency(observation, saliency_spec("reap-relative", **values)), plain)
        assert formula(saliency_spec("reap-relative", **values)) == "Σ(gn/‖r‖)²"


@pytest.mark.parametrize("criterion", ["reap", "ean-mean"])
def test_reduction_and_prior_count(criterion: str) -> None:
    routing = random_routing(2, dead=(0,))
    observation = observe_routing(routing, trace=False)
    for values, expected in (
        ({"reduction": "sum"}, naive(routing, criterion, mean=False)),
        ({"prior_count": 7.5}, naive(routing, criterion, prior=7.5)),
        ({"reduction": "sum", "prior_count": 7.5}, naive(routing, criterion, mean=False)),
    ):
        found = saliency(observation, saliency_spec(criterion, **values))
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "criterion", ["reap", "reap-relative", "ean", "ean-mean", "frequency", "weighted-frequency", "random", "eaft-reap"]
)
def test_experts_never_routed_rank_last_and_never_become_nan(criterion: str) -> None:
    found = saliency(observe_routing(random_routing(3, dead=(2, 5))), saliency_spec(criterion))
    assert not np.isnan(found).any()
    assert (found[:, [2, 5]] == -np.inf).all()
    assert set(np.argsort(-found, axis=1)[:, :5].ravel().tolist()).isdisjoint({2, 5})


def test_random_is_seeded_by_layer_and_known_on_every_platform() -> None:
    observation = observe_routing(random_routing(4, tokens=400), trace=False)
    one, again, other = (saliency(observation, saliency_spec("random", seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert one[0, 0].item() == 0.7259748788500867  # Python's own generator, whose sequence is a promise
    assert not np.array_equal(one[0], one[1])


def test_a_mix_equals_an_observation_with_those_shares() -> None:
    """Every position of `code` three times over: the mix of those shares must give the same saliency, for means
    exactly."""
    routing = random_routing(5, dead=(1,))
    observation = observe_routing(routing)
    code, tools = observation.scored_tokens.tolist()
    where = torch.cat([torch.arange(len(routing.source))] + [(routing.source == 0).nonzero().flatten()] * 2)
    thrice = observe_routing(repeated(routing, where))
    shares = {"code": 3 * code, "tools": tools}
    for criterion in ("reap", "ean-mean", "eaft-reap"):
        mixed, real = (saliency(o, saliency_spec(criterion, mix=m)) for o, m in ((observation, shares), (thrice, None)))
        np.testing.assert_allclose(mixed, real, rtol=1e-12, atol=1e-12)
    for criterion in ("frequency", "ean", "weighted-frequency"):  # sums: the same up to the common factor of the shares
        mixed, real = (saliency(o, saliency_spec(criterion, mix=m)) for o, m in ((observation, shares), (thrice, None)))
        np.testing.assert_allclose(mixed * (3 * code + tools), real, rtol=1e-12, atol=1e-12)


def test_a_mix_of_one_source_is_that_source_alone_prior_count_included() -> None:
    routing = random_routing(6)
    alone = observe_routing(repeated(routing, (routing.source == 1).nonzero().flatten()))
    observation = observe_routing(routing)
    for criterion in ("reap", "eaft-reap"):
        mixed = saliency(observation, saliency_spec(criterion, mix={"tools": 5}, prior_count=3))
        np.testing.assert_allclose(
            mixed, saliency(alone, saliency_spec(criterion, prior_count=3)), rtol=1e-12, atol=1e-12
        )
    assert np.array_equal(totals(observation, {"tools": Decimal(1)}).norm_max, totals(alone).norm_max), (
        "maxima cover sources with weight only"
    )


def test_a_mix_of_the_observed_shares_changes_nothing() -> None:
    observation = observe_routing(random_routing(7))
    shares = dict(zip(observation.sources, observation.scored_tokens.tolist(), strict=True))
    found = saliency(observation, saliency_spec(mix=shares, prior_count=11))
    np.testing.assert_allclose(found, saliency(observation, saliency_spec(prior_count=11)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("mix", "says"),
    [
        ({"cod": 1}, "saliency.mix.cod: is not a source of the observation. Known: code, tools."),
        ({"code": -1, "tools": 2}, "saliency.mix.code: found -1, which is negative. Give a share of 0 or more."),
        ({"code": 0}, "saliency.mix: every weight is 0. Give at least one source a share."),
    ],
)
def test_mixes_that_cannot_be(mix: dict, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        saliency(observe_routing(random_routing(8, tokens=20)), saliency_spec(mix=mix))
    assert str(error.value) == says


def test_a_source_without_scored_tokens_cannot_carry_weight() -> None:
    observation = observe_routing(random_routing(8, tokens=20, sources=1))
    with pytest.raises(
        RecipeError,
        match=r"saliency\.mix\.tools: has weight 0\.5, but the observation has no scored token of this source\.",
    ):
        saliency(observation, saliency_spec(mix={"code": 0.5, "tools": 0.5}))


def test_a_function_of_ones_own(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_criterion.py").write_text(
        "def spiky(totals, spec):\n    return totals.gate_norm_max_scored / "
        "totals.count\n\ndef flat(totals, spec):\n    return totals.count[0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    observation = observe_routing(random_routing(9, dead=(4,)))
    found, summed = saliency(observation, saliency_spec("own_criterion:spiky")), totals(observation)
    alive = summed.count > 0
    assert (
        np.array_equal(found[alive], (summed.gate_norm_max_scored[alive] / summed.count[alive]))
        and (found[:, 4] == -np.inf).all()
    )
    with pytest.raises(
        UnusableError,
        match=r"'own_criterion:flat' returned an array of shape \[8\]; it must return .* \[3, "
        r"8\]",
    ):
        saliency(observation, saliency_spec("own_criterion:flat"))
    with pytest.raises(RecipeError, match="'own_criterion:gone' cannot be imported"):
        saliency(observation, saliency_spec("own_criterion:gone"))


def test_an_overflow_is_named_not_ranked() -> None:
    observation = observe_routing(random_routing(10))
    observation.statistics["gate_norm_sum"][1, 0, 6] = math.nan
    observation.statistics["gate_norm_sum"][2, 0, 7] = math.inf
    with pytest.raises(
        UnusableError,
        match=r"reap is not a finite number for 2 of 24 experts \(layer 1 expert 6, layer 2 "
        r"expert 7\)",
    ):
        saliency(observation, saliency_spec())


def test_totals_do_not_depend_on_the_kind_of_sum() -> None:
    observation = observe_routing(random_routing(11))
    summed = totals(observation)
    assert isinstance(summed, Totals) and summed.mean_alpha == 1.0
    assert np.array_equal(summed.count, observation.statistics["count"].sum(1))
    assert np.array_equal(summed.activation_max, observation.maxima["activation_max"].max(1))


def test_formulas_in_words() -> None:
    said = [
        formula(saliency_spec(*given[:1], **given[1]))
        for given in (
            ("reap", {}),
            ("reap", {"reduction": "sum"}),
            ("ean-mean", {"prior_count": 2.5}),
            ("ean", {"prior_count": 9}),
            ("eaft-reap", {}),
        )
    ]
    assert said == ["Σgn / N", "Σgn", "Σn / (N + 2.5)", "Σn", "Σwgn / N"]
