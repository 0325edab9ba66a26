"""Selections by removal paths: prefixes, protection, groups, one budget over all layers, weights by source."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from reapkit.checkpoint.architecture import Architecture
from reapkit.core.errors import RecipeError, UnusableError
from reapkit.observation.observation import Observation, Reroute
from reapkit.selection.decide import select, select_all
from reapkit.selection.saliency import saliency
from tests.support.observations import observe_routing, random_routing
from tests.support.specs import prune, saliency_spec

TOY = Architecture("toy_moe", 3, 8, 2)
PLAIN = {"protect": {"super_experts": False}}
REROUTE = saliency_spec("reroute")


def observed(seed: int = 0, dead: tuple[int, ...] = ()) -> Observation:
    """Three layers of eight experts, two sources; paths end when two are left, later removals cost more."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.stack([torch.randperm(8, generator=draw) for _ in range(4)]) for _ in range(3)])
    error = torch.rand(3, 4, 8, generator=draw, dtype=torch.float64).sort(-1).values.cumsum(-1)
    order[..., 6:], error[..., 6:] = -1, 0
    single = torch.rand(3, 2, 8, generator=draw, dtype=torch.float64)
    observation = observe_routing(random_routing(seed, dead=dead, tokens=600), trace=False)
    return dataclasses.replace(observation, reroute=Reroute(torch.tensor([30, 10]), order, error, single))


def path(observation: Observation, layer: int, number: int = 3) -> list[int]:
    return [expert for expert in observation.reroute.order[layer, number].tolist() if expert >= 0]


def test_uniform_drops_the_first_of_each_path_and_ratios_are_nested() -> None:
    observation = observed()
    spec = prune(candidates={"ratio": [0.25, 0.5, 0.75]}, **PLAIN)
    chosen = {len(next(iter(one.layers.values())).drop): one for one in select_all(observation, REROUTE, spec, TOY)}
    assert sorted(chosen) == [2, 4, 6]
    for count, one in chosen.items():
        for layer, decided in one.layers.items():
            assert set(decided.drop) == set(path(observation, layer)[:count])
            assert all(decided.reasons[expert] == "removal path" for expert in range(8))
    assert chosen[4].layers[0].saliency[path(observation, 0)[2]] == pytest.approx(
        observation.reroute.error[0, 3, 2].item()
    )


def test_protected_experts_are_skipped() -> None:
    observation = observed()
    first = path(observation, 1)[0]
    chosen = select(
        observation, REROUTE, prune(ratio=0.5, protect={"super_experts": False, "experts": {"1": [first]}}), TOY
    )
    assert (
        set(chosen.layers[1].drop) == set(path(observation, 1)[1:5])
        and chosen.layers[1].reasons[first] == "protected by hand"
    )


def test_groups_lose_equal_numbers_in_path_order() -> None:
    observation = observed()
    grouped = Architecture("toy_moe", 3, 8, 2, n_group=2, topk_group=1)
    for layer, decided in select(observation, REROUTE, prune(ratio=0.5, **PLAIN), grouped).layers.items():
        for group in (range(4), range(4, 8)):
            ranked = [e for e in path(observation, layer) if e in group] + [
                e for e in group if e not in path(observation, layer)
            ][::-1]
            assert {e for e in decided.drop if e in group} == set(ranked[:2])


def test_global_spends_the_budget_on_the_smallest_increases_of_all_layers() -> None:
    observation = observed(1)
    spec = prune(ratio=0.5, allocation="global", layout="ragged", caps=[{"layers": "0", "min_experts": 6}], **PLAIN)
    chosen = select(observation, REROUTE, spec, TOY)
    steps = []
    for layer in range(3):
        error = observation.reroute.error[layer, 3, :6]
        steps += [(cost, layer) for cost in np.diff(error, prepend=0.0).tolist()[: 2 if layer == 0 else 6]]
    steps.sort()  # increases grow along these paths, so the smallest of all are prefixes
    budget = 8 - 6 + 4 + 4
    counts = [sum(layer == one for _, one in steps[:budget]) for layer in range(3)]
    assert [len(chosen.layers[layer].drop) for layer in range(3)] == counts
    assert all(set(chosen.layers[layer].drop) == set(path(observation, layer)[: counts[layer]]) for layer in range(3))


def test_a_single_source_has_its_own_path_and_other_weights_are_refused() -> None:
    observation = observed()
    spec = prune(ratio=0.5, **PLAIN)
    chosen = select(observation, saliency_spec("reroute", mix={observation.sources[1]: 1}), spec, TOY)
    assert all(set(decided.drop) == set(path(observation, layer, 1)[:4]) for layer, decided in chosen.layers.items())
    even = select(observation, saliency_spec("reroute", mix=dict.fromkeys(observation.sources, 0.5)), spec, TOY)
    assert all(set(decided.drop) == set(path(observation, layer, 2)[:4]) for layer, decided in even.layers.items())
    with pytest.raises(
        RecipeError,
        match=(
            r"saliency\.mix: reroute needs removal paths, and these were measured only for the shares of the"
            r" calibration, for equal weights"
        ),
    ):
        select(
            observation,
            saliency_spec("reroute", mix=dict(zip(observation.sources, (0.6, 0.4), strict=True))),
            spec,
            TOY,
        )


def test_single_removals_are_weighed_by_source() -> None:
    observation = observed()
    found = saliency(
        observation,
        saliency_spec(criterion="reroute-single", mix={observation.sources[0]: 0.25, observation.sources[1]: 0.75}),
    )
    expected = 0.25 * observation.reroute.single[:, 0] / 30 + 0.75 * observation.reroute.single[:, 1] / 10
    np.testing.assert_allclose(found, expected)
    chosen = select(
        observation, saliency_spec("reroute-single", mix={observation.sources[0]: 1}), prune(ratio=0.5, **PLAIN), TOY
    )
    for layer, decided in chosen.layers.items():
        values = decided.saliency
        assert set(decided.drop) == set(sorted(range(8), key=values.__getitem__)[:4])
        assert (
            max(values[e] for e in decided.drop) == sorted((observation.reroute.single[layer, 0] / 30).tolist())[3]
            or -float("inf") in values
        )


def test_never_routed_experts_say_so_and_the_path_decides() -> None:
    observation = observed(dead=(3,))
    chosen = select(observation, REROUTE, prune(ratio=0.5, **PLAIN), TOY)
    assert chosen.details["never_routed"] == {str(layer): [3] for layer in range(3)}
    assert all(set(decided.drop) == set(path(observation, layer)[:4]) for layer, decided in chosen.layers.items())


def test_what_was_not_measured_is_refused() -> None:
    bare = observe_routing(random_routing(0), trace=False)
    with pytest.raises(
        UnusableError,
        match=(
            r"reroute needs removal paths, but this observation has none .* Observe with observe\.reroute_tokens: 8192"
        ),
    ):
        select(bare, REROUTE, prune(ratio=0.5, **PLAIN), TOY)
    observation = observed()
    empty = dataclasses.replace(
        observation, reroute=dataclasses.replace(observation.reroute, tokens=torch.tensor([40, 0]))
    )
    with pytest.raises(
        UnusableError,
        match=f"the reroute sample holds no token of {observation.sources[1]}. Raise observe.reroute_tokens",
    ):
        select(empty, saliency_spec("reroute", mix={observation.sources[1]: 1}), prune(ratio=0.5, **PLAIN), TOY)
    with pytest.raises(UnusableError, match=f"holds no token of {observation.sources[1]}"):
        select(empty, REROUTE, prune(ratio=0.5, **PLAIN), TOY)
    chosen = select(empty, saliency_spec("reroute", mix={observation.sources[0]: 1}), prune(ratio=0.5, **PLAIN), TOY)
    assert all(set(decided.drop) == set(path(observation, layer, 0)[:4]) for layer, decided in chosen.layers.items())
