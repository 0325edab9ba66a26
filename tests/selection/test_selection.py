"""From an observation to a decision a person can read: protection, candidates, reasons, warnings, and the file."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch

from reapkit.checkpoint.architecture import Architecture
from reapkit.core.errors import RecipeError, UnusableError
from reapkit.observation.observation import MAXIMA, SUMS, Observation, Trace
from reapkit.selection.candidates import candidates
from reapkit.selection.decide import select, select_all, super_experts
from reapkit.selection.saliency import saliency
from reapkit.selection.selection import Selection
from tests.support.observations import observe_routing, random_routing
from tests.support.specs import prune, saliency_spec

TOY = Architecture("toy_moe", 3, 8, 2)
PLAIN = {"protect": {"super_experts": False}}


def test_the_best_of_each_layer_stay_and_each_expert_says_why() -> None:
    observation = observe_routing(random_routing(0, dead=(3,)), trace=False)
    values = saliency(observation, saliency_spec())
    chosen = select(observation, saliency_spec(), prune(ratio=0.5, **PLAIN), TOY)
    for row, (layer, decided) in enumerate(chosen.layers.items()):
        best = sorted(range(8), key=lambda e: (-values[row, e].item(), e))[:4]
        assert decided.keep == tuple(sorted(best)) and sorted(decided.keep + decided.drop) == list(range(8))
        assert decided.saliency == tuple(values[row].tolist()) and set(decided.reasons) == set(range(8))
        assert decided.reasons[3] == "never routed" and layer in chosen.keep


def test_layers_are_decoder_indices() -> None:
    observation = observe_routing(random_routing(1), trace=False, layers=(3, 4, 9))
    architecture = Architecture("toy_moe", 10, 8, 2)
    spec = prune(
        ratio=0.5, layout="ragged", caps=[{"layers": "0-4", "min_experts": 6}], protect={"experts": {"9": [0, 1]}}
    )
    chosen = select(observation, saliency_spec(), spec, architecture)
    assert [len(layer.keep) for layer in chosen.layers.values()] == [6, 6, 4] and list(chosen.layers) == [3, 4, 9]
    assert {0, 1} <= set(chosen.layers[9].keep) and chosen.layers[9].reasons[1] == "protected by hand"
    assert chosen.details["protected"]["protected by hand"] == {"9": [0, 1]}


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_layer_that_a_table_routes_keeps_all_and_says_so(allocation: str) -> None:
    observation = observe_routing(random_routing(4), trace=False)
    spec = prune(ratio=0.5, layout="ragged", allocation=allocation, protect={"experts": {"1": [3]}})
    chosen = select(observation, saliency_spec(), spec, dataclasses.replace(TOY, tables=(1,)))
    assert chosen.layers[1].keep == tuple(range(8)) and chosen.table_layers == (1,)
    assert set(chosen.layers[1].reasons.values()) == {"routed by a fixed table"}
    assert sum(len(layer.drop) for layer in chosen.layers.values()) == 8
    assert Selection.from_json(chosen.to_json()).table_layers == (1,)


def test_super_experts_exceed_the_percentile_and_a_tenth_of_the_maximum_early_enough() -> None:
    values = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    values[1, 5], values[5, 7], values[6, 9], values[2, 2] = 300.0, 90.0, 200.0, 25.0
    assert super_experts(values.numpy()) == [
        [],
        [5],
        [],
        [],
        [],
        [7],
        [],
        [],
    ]  # layer 6 is too deep, 25 is below a tenth of 300
    assert super_experts(np.ones((4, 16))) == [[]] * 4


def test_a_super_expert_stays_whatever_its_saliency() -> None:
    observation = observe_routing(random_routing(2, layers=4, experts=64, tokens=60), experts=64, trace=False)
    values = saliency(observation, saliency_spec("ean"))[0]
    worst = int(np.flatnonzero(values == values.min())[-1])
    observation.maxima["activation_max"][0, 1, worst] = 1e6
    architecture = Architecture("toy_moe", 4, 64, 2)
    assert worst in select(observation, saliency_spec("ean"), prune(ratio=0.5), architecture).layers[0].keep
    assert (
        worst not in select(observation, saliency_spec("ean"), prune(ratio=0.5, **PLAIN), architecture).layers[0].keep
    )
    other_mix = saliency_spec("ean", mix={"code": 1, "tools": 0})
    assert worst not in select(observation, other_mix, prune(ratio=0.5), architecture).layers[0].keep, (
        "maxima cover weighed sources only"
    )


def test_the_core_is_the_top_of_good_contributions() -> None:
    routing = random_routing(3)
    observation = observe_routing(routing)
    chosen = select(
        observation,
        saliency_spec("frequency"),
        prune(ratio=0.5, protect={"super_experts": False, "core_per_layer": 2}),
        TOY,
    )
    p, h = routing.p[routing.signal], routing.h[routing.signal]
    low = p <= p.sort().values[-(-15 * len(p) // 100) - 1]
    n = len(p)
    good = ~(low & ((h <= h.sort().values[-(-15 * n // 100) - 1]) | (h >= h.sort().values[-(-85 * n // 100) - 1])))
    for layer in range(3):
        mass = torch.zeros(8, dtype=torch.float64)
        expert, product = (
            routing.expert[layer, routing.signal],
            (routing.gate * routing.norm)[layer, routing.signal].double(),
        )
        mass.index_add_(0, expert[good].flatten(), product[good].flatten())
        core = {e for e, why in chosen.layers[layer].reasons.items() if why == "core"}
        assert core == set(mass.topk(2).indices.tolist()) and core <= set(chosen.layers[layer].keep)


def test_the_core_needs_signals() -> None:
    with pytest.raises(UnusableError, match=r"prune\.protect\.core_per_layer need"):
        select(
            observe_routing(random_routing(3), trace=False),
            saliency_spec(),
            prune(ratio=0.5, protect={"core_per_layer": 1}),
            TOY,
        )


def test_candidates_that_differ_in_ratio_only_are_nested() -> None:
    observation = observe_routing(random_routing(4, dead=(1,)))
    spec = prune(
        layout="ragged",
        candidates={
            "ratio": [0.125, 0.25, 0.5, 0.7],
            "criterion": ["reap", "eaft-reap", "random"],
            "allocation": ["uniform", "global"],
        },
    )
    grid = candidates(spec, saliency_spec(), TOY, observation.layers)
    chosen = dict(zip(grid, select_all(observation, saliency_spec(), spec, TOY), strict=True))
    for small in grid:
        for large in grid:
            if (small.criterion, small.allocation) == (large.criterion, large.allocation) and small.ratio > large.ratio:
                assert all(set(kept) <= set(chosen[large].keep[layer]) for layer, kept in chosen[small].keep.items())
    assert {selection.details["candidate"] for selection in chosen.values()} == {candidate.name for candidate in grid}
    assert all(selection.criterion == candidate.criterion for candidate, selection in chosen.items())


def test_a_candidate_alone_equals_the_same_in_the_grid() -> None:
    observation = observe_routing(random_routing(5))
    spec = prune(
        layout="ragged",
        candidates={"ratio": [0.5, 0.25], "criterion": ["eaft-reap", "ean"], "experts_per_token": [1, 2]},
    )
    grid = candidates(spec, saliency_spec(), TOY, observation.layers)
    for candidate, selection in zip(grid, select_all(observation, saliency_spec(), spec, TOY), strict=True):
        assert select(observation, saliency_spec(), spec, TOY, candidate) == selection
        assert selection.experts_per_token == candidate.experts_per_token


def test_both_allocations_are_reported() -> None:
    observation = observe_routing(random_routing(6), trace=False)
    ragged = prune(ratio=0.5, layout="ragged", allocation="global", **PLAIN)
    uniform, spread = (select(observation, saliency_spec(), spec, TOY) for spec in (prune(ratio=0.5, **PLAIN), ragged))
    assert uniform.details["dropped_saliency"] == spread.details["dropped_saliency"]
    assert spread.details["dropped_saliency"]["global"] <= spread.details["dropped_saliency"]["uniform"]
    assert uniform.details["removed"] == spread.details["removed"] == 12
    shares = []
    for layer in uniform.layers.values():
        scale = sum(abs(s) for s in layer.saliency if s != -inf)
        shares.append(sum(layer.saliency[e] / scale for e in layer.drop if layer.saliency[e] != -inf))
    assert uniform.details["dropped_saliency"]["uniform"] == pytest.approx(sum(shares) / 3)


def with_signals(observation: Observation, p: torch.Tensor, h: torch.Tensor) -> Observation:
    return dataclasses.replace(observation, eaft=Trace(observation.eaft.source, p, h, observation.eaft.routed))


def test_a_conflict_term_that_changes_nothing_is_said() -> None:
    observation = observe_routing(random_routing(7))
    n = len(observation.eaft)
    calm = with_signals(observation, torch.linspace(0, 1, n), torch.linspace(1, 0, n))  # never wrong and sure at once
    chosen = select(calm, saliency_spec("eaft-reap"), prune(ratio=0.5), TOY)
    assert (
        chosen.details["eaft"]["changed_by_conflict"] == 0 and chosen.details["eaft"]["shares"]["all"]["conflict"] == 0
    )
    assert chosen.warnings[-1] == (
        "the conflict term of eaft-reap changed no kept expert (0.00% of positions are in "
        "conflict). Try saliency.eaft.thresholds: per-source, larger quantiles, or criterion: reap."
    )


def test_what_the_conflict_term_changed_is_counted() -> None:
    observation = observe_routing(random_routing(8))
    routed = observation.eaft.routed(0)[0]
    best = int(saliency(observation, saliency_spec())[0].argmax())
    wrong = (routed == best).any(1)
    blamed = with_signals(
        observation, np.where(wrong, np.float32(0), np.float32(1)), np.where(wrong, np.float32(0), np.float32(0.5))
    )
    spec = saliency_spec("eaft-reap", eaft={"quantiles": {"p_low": 0.01, "h_low": 0.01}})
    chosen = select(blamed, spec, prune(ratio=0.5, **PLAIN), TOY)
    assert best not in chosen.layers[0].keep and chosen.layers[0].saliency[best] < 0
    unpunished = saliency_spec(
        "eaft-reap", eaft={"quantiles": {"p_low": 0.01, "h_low": 0.01}, "weights": {"conflict": 1.0}}
    )
    neutral = select(blamed, unpunished, prune(ratio=0.5, **PLAIN), TOY)
    changed = sum(len(set(chosen.keep[layer]) - set(neutral.keep[layer])) for layer in chosen.keep)
    assert chosen.details["eaft"]["changed_by_conflict"] == changed > 0
    assert not any("conflict" in said for said in chosen.warnings)
    assert neutral.details["eaft"]["changed_by_conflict"] == 0


def test_experts_never_routed_are_listed_and_warned_about() -> None:
    chosen = select(
        observe_routing(random_routing(9, dead=(0, 6)), trace=False), saliency_spec(), prune(ratio=0.5, **PLAIN), TOY
    )
    assert all(experts[:1] == [0] and 6 in experts for experts in chosen.details["never_routed"].values())
    count = sum(map(len, chosen.details["never_routed"].values()))
    assert chosen.warnings == (
        f"{count} of 24 experts received no token (layers 0-2). Raise calibration.samples, or accept "
        f"that they rank last.",
    )


def test_near_ties_are_listed() -> None:
    observation = observe_routing(random_routing(10), trace=False)
    order = np.argsort(-saliency(observation, saliency_spec())[1]).tolist()
    kept, dropped = order[3], order[4]
    for name, factor in (("count", 1.0), ("gate_norm_sum", 1 - 1e-6)):
        observation.statistics[name][1, :, dropped] = observation.statistics[name][1, :, kept] * factor
    chosen = select(observation, saliency_spec(), prune(ratio=0.5, **PLAIN), TOY)
    [tie] = chosen.details["near_ties"]
    assert (tie["layer"], tie["kept"], tie["dropped"]) == (1, kept, dropped)
    assert tie["relative_gap"] == pytest.approx(1e-6, rel=1e-3)


def test_protection_that_does_not_fit_is_refused() -> None:
    observation = observe_routing(random_routing(11))
    spec = prune(ratio=0.7, protect={"core_per_layer": 3, "experts": {"1": [0, 1, 2]}})
    with pytest.raises(RecipeError, match=r"prune\.protect: layer 1 protects"):
        select(observation, saliency_spec(), spec, TOY)


def test_the_file_can_be_read_again_and_by_a_person(tmp_path: Path) -> None:
    observation = observe_routing(random_routing(12, dead=(5,)))
    chosen = select(
        observation,
        saliency_spec("eaft-reap", mix={"code": 0.7, "tools": 0.3}),
        prune(ratio=0.5, experts_per_token=1),
        TOY,
    )
    chosen.save(tmp_path)
    assert Selection.load(tmp_path) == chosen == Selection.load(tmp_path / "selection.json")
    text = (tmp_path / "selection.json").read_text()
    data = json.loads(text)
    assert {"criterion", "experts_per_token", "details", "layers"} <= set(data) and set(data["layers"]["1"]) == {
        "keep",
        "drop",
        "saliency",
        "reasons",
    }
    assert data["layers"]["1"]["saliency"][5] is None and "Infinity" not in text and "NaN" not in text
    assert max(map(len, text.splitlines())) < 600


@pytest.mark.parametrize(
    "broken", [{"keep": [0, 1], "drop": [1]}, {"keep": [], "drop": [0, 1]}, {"keep": [0, 3], "drop": [1]}]
)
def test_a_selection_that_contradicts_itself_is_refused(broken: dict, tmp_path: Path) -> None:
    (tmp_path / "selection.json").write_text(json.dumps({"criterion": "reap", "layers": {"4": broken}}))
    with pytest.raises(UnusableError, match="layer 4 must name each of its experts once"):
        Selection.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"criterion": "reap", "layers": 3}'])
def test_a_file_that_is_no_selection_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "selection.json").write_text(text)
    with pytest.raises(UnusableError, match="Give a selection's directory"):
        Selection.load(tmp_path)


def test_a_selection_by_hand_needs_no_saliency() -> None:
    given = Selection.from_json({"criterion": "by hand", "layers": {"2": {"keep": [1, 0], "drop": [2]}}})
    assert given.keep == {2: (0, 1)} and given.layers[2].saliency == ()


def test_reading_a_selection_needs_no_torch() -> None:
    code = "import sys, reapkit.selection.selection, reapkit.selection.allocation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("spec", [{"ratio": 0.5}, {"ratio": 0.5, "layout": "ragged", "allocation": "global"}])
def test_sixty_layers_of_512_experts_are_decided_in_two_seconds(spec: dict) -> None:
    draw = torch.Generator().manual_seed(0)
    shape = (60, 3, 512)
    observation = Observation(
        "big_moe",
        tuple(range(60)),
        512,
        10,
        ("a", "b", "c"),
        torch.tensor([900] * 3),
        torch.tensor([800] * 3),
        {name: torch.rand(shape, generator=draw, dtype=torch.float64) for name in SUMS},
        {name: torch.rand(shape, generator=draw) for name in MAXIMA},
        None,
        {},
    )
    began = time.process_time()
    chosen = select(observation, saliency_spec(), prune(**spec), Architecture("big_moe", 60, 512, 10))
    assert time.process_time() - began < 2 and chosen.details["removed"] == 60 * 256
