"""The criterion of knock-outs: its numbers, experts below the floor, layers and sources that were not measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reapkit.checkpoint.architecture import Architecture
from reapkit.core.errors import UnusableError
from reapkit.observation.knockouts import Knockouts
from reapkit.observation.observation import Observation
from reapkit.selection.decide import select
from reapkit.selection.saliency import saliency
from tests.support.observations import observe_routing, random_routing
from tests.support.specs import prune, saliency_spec

ARCHITECTURE = Architecture("qwen3_moe", 3, 8, 2)
HALF = {"ratio": 0.5, "protect": {"super_experts": False}}


def measured(floor: float = 0.0, layers: tuple[int, ...] = (0, 1, 2)) -> Knockouts:
    draw = np.random.default_rng(3)
    shape = (len(layers), 2, 8)
    kl = draw.random(shape)
    return Knockouts(
        layers, ("code", "tools"), [4, 3], [40, 25], kl, kl**2 / 3, np.full((len(layers), 2), floor), {"tokens": 90}
    )


def observed(knockouts: Knockouts | None = None) -> Observation:
    return replace(observe_routing(random_routing(0, tokens=400), trace=False), knockout=knockouts)


def test_it_is_the_mean_over_measured_positions_or_under_the_shares_of_a_mix() -> None:
    found = measured()
    observation = observed(found)
    expected = [[sum(found.kl[row, s, e] for s in (0, 1)) / (40 + 25) for e in range(8)] for row in range(3)]
    routed = observation.statistics["count"].sum(1) > 0
    values = saliency(observation, saliency_spec("knockout"))
    np.testing.assert_allclose(values, np.where(routed, expected, -np.inf), rtol=1e-12)
    alone = saliency(observation, saliency_spec("knockout", mix={"code": 0, "tools": 1}))
    thirds = saliency(observation, saliency_spec("knockout", mix={"code": 2, "tools": 1}))
    weighed = (2 * found.kl[:, 0] / 40 + found.kl[:, 1] / 25) / 3
    np.testing.assert_allclose(thirds, np.where(routed, weighed, -np.inf), rtol=1e-12)
    routed = observation.statistics["count"][:, 1] > 0
    np.testing.assert_allclose(alone, np.where(routed, found.kl[:, 1] / 25, -np.inf), rtol=1e-12)
    decision = select(observation, saliency_spec("knockout"), prune(**HALF), ARCHITECTURE)
    for row, layer in enumerate(decision.layers.values()):
        assert set(layer.drop) == set(np.argsort(expected[row])[:4].tolist())
    assert decision.details["knockout"]["below_floor"] == {} and decision.details["knockout"]["positions"] == 65
    assert not any("rounding" in warning for warning in decision.warnings)


def test_experts_below_the_floor_are_ranked_among_themselves_by_their_relative_contribution() -> None:
    plain = saliency(observed(measured()), saliency_spec("knockout"))
    floor = float(np.sort(plain[1])[3])  # three experts of layer 1 lie below it
    found = measured()
    found.floor[1] = [floor * 40, floor * 25]
    observation = observed(found)
    values = saliency(observation, saliency_spec("knockout"))
    relative = saliency(observation, saliency_spec("reap-relative"))
    assert np.array_equal(values[[0, 2]], plain[[0, 2]])
    below = np.argsort(plain[1])[:3]
    assert (values[1, below] < floor).all() and (values[1, below] > 0).all()
    assert np.array_equal(np.argsort(values[1, below]), np.argsort(relative[1, below]))
    others = np.setdiff1d(np.arange(8), below)
    assert np.array_equal(values[1, others], plain[1, others]) and values[1, others].min() >= floor
    decision = select(observation, saliency_spec("knockout"), prune(**HALF), ARCHITECTURE)
    assert decision.details["knockout"]["below_floor"] == {"1": sorted(below.tolist())}
    assert decision.details["knockout"]["floor"]["1"] == pytest.approx(floor)
    assert (
        "3 of 24 experts change the model's output by less than rounding does (layer 1); among themselves they are"
        " ranked by reap-relative." in decision.warnings
    )


def test_a_global_budget_goes_by_nats_and_not_by_shares_of_a_layer() -> None:
    found = measured()
    found.kl[2] *= 1e-3  # whose experts all are next to free
    how = prune(**HALF, allocation="global", layout="ragged")
    decision = select(observed(found), saliency_spec("knockout"), how, ARCHITECTURE)
    assert len(decision.layers[2].keep) == 2 < len(decision.layers[0].keep)


def test_layers_that_were_not_measured_are_ranked_by_their_relative_contribution() -> None:
    observation = observed(measured(layers=(0, 2)))
    values = saliency(observation, saliency_spec("knockout"))
    relative = saliency(observation, saliency_spec("reap-relative"))
    assert np.array_equal(values[1], relative[1]) and not np.array_equal(values[0], relative[0])


def test_what_was_not_measured_is_said() -> None:
    with pytest.raises(
        UnusableError, match=r"saliency\.criterion: knockout needs knock-outs, but this observation has"
    ):
        saliency(observed(), saliency_spec("knockout"))
    less = replace(measured(), positions=np.array([40, 0]))
    with pytest.raises(UnusableError, match=r"measured on no position of tools\. Raise observe\.knockout_tokens"):
        saliency(observed(less), saliency_spec("knockout"))
    saliency(observed(less), saliency_spec("knockout", mix={"code": 1}))


def test_they_are_saved_found_beside_an_observation_and_belong_to_no_sum(tmp_path: Path) -> None:
    observation, found = observed(), measured(0.01)
    observation.save(tmp_path / "run/observation")
    assert Observation.load(tmp_path / "run/observation").knockout is None
    found.save(tmp_path / "run/knockout")
    loaded = Observation.load(tmp_path / "run/observation")
    assert loaded.knockout is not None and loaded.knockout.meta == found.meta
    for name in ("rows", "positions", "kl", "kl_sq", "floor"):
        assert np.array_equal(getattr(loaded.knockout, name), getattr(found, name)), name
    assert (loaded + observation).knockout is None
    wider = found.of_sources(("more", "tools", "code"))
    assert not wider.positions[0] and np.array_equal(wider.kl[:, [2, 1]], found.kl)
    with pytest.raises(UnusableError, match="were measured on code, which the observation does not have"):
        found.of_sources(("tools",))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableError, match=r"knockouts\.json cannot be read"):
        Knockouts.load(tmp_path)
    measured().save(tmp_path)
    file = tmp_path / "knockouts.json"
    for before, after, said in (
        ('"format": 1', '"format": 2', "found knock-outs of format 2, but this version of reapkit reads format 1"),
        ('"code",', '"code", "more",', r"positions of knockouts\.safetensors has the shape|has the shape \[2\]"),
    ):
        file.write_text(file.read_text().replace(before, after))
        with pytest.raises(UnusableError, match=said):
            Knockouts.load(tmp_path)
        file.write_text(file.read_text().replace(after, before))
