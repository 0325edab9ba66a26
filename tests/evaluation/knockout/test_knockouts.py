"""Knock-outs against a naive loop of whole forwards; killed and resumed, on two ranks, in other batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.core.errors import UnusableError
from reapkit.core.ranks import Alone
from reapkit.evaluation.knockout import resident
from reapkit.evaluation.knockout.resident import measure_knockouts
from reapkit.evaluation.knockout.sample import KnockoutSample, sampled_rows
from reapkit.evaluation.knockout.units import Unit, Units
from reapkit.model.masking import masked
from reapkit.model.routed_experts import find_experts
from reapkit.observation.knockouts import ARRAYS, Knockouts
from tests.model.test_masking import oracle
from tests.support import tiny
from tests.support.tiny_tokens import tiny_tokens

torch.set_num_threads(1)
SMALL = dict(lengths=(14, 9, 1, 11, 8, 6))
FEWER = {
    "qwen3_moe": dict(num_experts=8),
    "olmoe": dict(num_experts=8),
    "glm4_moe": dict(n_routed_experts=8),
    "deepseek_v3": dict(n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2),
    "gpt_oss": dict(num_local_experts=8),
    "gemma4_text": dict(num_experts=8),
    "llama4_text": dict(num_local_experts=8),
    "qwen3_next": dict(num_experts=8),
}
"""olmoe's gates are not renormalised, so an absence changes every token; deepseek_v3 routes by groups; gemma4 has no
block of its own; llama4's gates scale the input."""


@torch.no_grad()
def naive(model, tokens: CalibrationTokens, rows: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Sums [L, S, E] by whole forwards of single rows, each with one expert masked, in float64."""
    sites = find_experts(model)
    kl = torch.zeros(len(sites), len(tokens.sources), sites[0].num_experts, dtype=torch.float64)
    squares = torch.zeros_like(kl)
    grouped = model.config.model_type == "deepseek_v3"
    everyone = {site.layer: list(range(site.num_experts)) for site in sites}
    for number in rows:
        row, s = tokens.row(number), int(tokens.row_source[number])

        def said(row=row) -> torch.Tensor:
            return model(row.input_ids[None], use_cache=False).logits[0][row.scored].double().log_softmax(-1)

        whole = said()
        for place, site in enumerate(sites):
            for e in range(site.num_experts):
                kept = {site.layer: [other for other in range(site.num_experts) if other != e]}
                with oracle(model, everyone | kept) if grouped else masked(model, kept):
                    one = float((whole.exp() * (whole - said())).sum())
                kl[place, s, e] += one
                squares[place, s, e] += one**2
    return {"kl": kl.numpy(), "kl_sq": squares.numpy()}


def measured(model, tokens: CalibrationTokens, work: Path, **how) -> Knockouts:
    return measure_knockouts(model, tokens, 24, work_directory=work, **{"batch_tokens": 40, "identity": "m"} | how)


def assert_same(a: Knockouts, b: Knockouts) -> None:
    assert a.layers == b.layers and a.sources == b.sources
    for name in ARRAYS:
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("model_type", FEWER)
def test_they_equal_a_naive_loop_of_whole_forwards(model_type: str, tmp_path: Path) -> None:
    model = tiny.build(model_type, **FEWER[model_type])
    model.set_experts_implementation("eager")
    tokens = tiny_tokens(tmp_path / "calibration", **SMALL, groups=2, score="all")
    found = measured(model, tokens, tmp_path / "work")
    rows = sampled_rows(tokens, 24)
    expected = naive(model, tokens, rows)
    assert found.layers == tuple(site.layer for site in find_experts(model)) and expected["kl"].max() > 1e-3
    for name, values in expected.items():
        assert np.abs(getattr(found, name) - values).max() <= 1e-6 * values.max(), name
    assert found.positions.tolist() == [
        sum(int(tokens.row_lengths[row]) for row in rows if tokens.row_source[row] == s) for s in (0, 1)
    ]
    assert found.rows.sum() == len(rows) and (found.kl >= 0).all() and found.floor.max() <= 1e-9


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A model, a calibration and its undisturbed knock-outs."""
    path = tmp_path_factory.mktemp("knockouts")
    model = tiny.build("qwen3_moe", **FEWER["qwen3_moe"])
    tokens = tiny_tokens(path / "calibration", **SMALL, groups=2)
    return model, tokens, measured(model, tokens, path / "work")


def test_killed_and_run_again_it_goes_on_to_the_same_bytes(one, tmp_path: Path, monkeypatch) -> None:
    model, tokens, expected = one
    kept, keep = [], Units.keep

    def dies(self, group, site, unit):
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append((group, site.layer))
        keep(self, group, site, unit)

    monkeypatch.setattr(Units, "keep", dies)
    with pytest.raises(KeyboardInterrupt):
        measured(model, tokens, tmp_path / "work")
    first = list(kept)
    kept.clear()
    monkeypatch.setattr(Units, "keep", lambda self, *unit: (kept.append((unit[0], unit[1].layer)), keep(self, *unit)))
    found = measured(model, tokens, tmp_path / "work")
    assert len(first) == 2 and not set(first) & set(kept) and len(first) + len(kept) == 3 * 2
    assert_same(found, expected)
    for name, knockouts in (("a", found), ("b", expected)):
        knockouts.save(tmp_path / name)
    assert (tmp_path / "a/knockouts.safetensors").read_bytes() == (tmp_path / "b/knockouts.safetensors").read_bytes()


class Share(Alone):
    """A rank that takes some of the units and never waits."""

    def __init__(self, rank: int, claims: tuple[int, ...]):
        self.rank, self.world, self._claims = rank, 2, claims

    def claims(self, name: str, count: int) -> Iterator[int]:
        return iter(self._claims if self.rank else range(count))


def test_two_ranks_give_the_same_bytes(one, tmp_path: Path) -> None:
    model, tokens, expected = one
    assert measured(model, tokens, tmp_path / "work", ranks=Share(1, (0, 3, 4))) is None
    assert len(list((tmp_path / "work").rglob("knockout-*"))) == 3
    assert_same(measured(model, tokens, tmp_path / "work", ranks=Share(0, ())), expected)


def test_other_batches_change_nothing_but_the_last_bits(one, tmp_path: Path) -> None:
    model, tokens, expected = one
    alone = measured(model, tokens, tmp_path / "work", batch_tokens=1)
    assert np.abs(alone.kl - expected.kl).max() <= 1e-6 * expected.kl.max()
    assert np.array_equal(alone.positions, expected.positions)


def test_only_rows_that_see_an_expert_are_computed_without_it(one, tmp_path: Path, monkeypatch) -> None:
    """A router that renormalises leaves the tokens of others as they were: rows without a token of the expert are
    never run, and nothing of theirs is added."""
    model, tokens, expected = one
    seen = {}
    for number in sampled_rows(tokens, 24):
        row = tokens.row(number)
        with torch.no_grad():
            logits = model(row.input_ids[None], use_cache=False, output_router_logits=True).router_logits
        last = int(row.scored.nonzero().max()) + 1
        seen[number] = [set(layer[:last].topk(4).indices.flatten().tolist()) for layer in logits]
    ran, hidden_behind = [], resident.hidden_behind

    def counted(model, layers, layer, hidden, *args, **kwargs):
        ran.append((layer, len(hidden)))
        return hidden_behind(model, layers, layer, hidden, *args, **kwargs)

    monkeypatch.setattr(resident, "hidden_behind", counted)
    assert_same(measured(model, tokens, tmp_path / "work"), expected)
    for layer in range(3):
        wanted = sum(len(by_layer[layer]) for by_layer in seen.values()) + len(seen)  # one each without anything
        assert sum(count for at, count in ran if at == layer) == wanted


def test_layers_that_leave_more_behind_than_their_output_are_refused(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    model = tiny.build("gemma4_text", num_experts=8, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=kinds)
    with pytest.raises(
        UnusableError,
        match=r"begins behind layer 0 without any change .*leave more behind for later ones than their output\. Choose",
    ):
        measured(model, tiny_tokens(tmp_path / "calibration", **SMALL, groups=2), tmp_path / "work")


def test_what_is_no_number_names_the_layer(one, tmp_path: Path) -> None:
    model, tokens, _ = one
    units = Units(find_experts(model), KnockoutSample.of(tokens, 24, 40), tmp_path, torch.float32)
    unit = Unit(len(units.sample.groups[0]), 8)
    unit.kl[0, 3] = torch.nan
    with pytest.raises(UnusableError, match=r"knockout: found NaN or infinity behind layer 1\. Load the model"):
        units.keep(0, units.sites[1], unit)
    unit.kl[0, 3], unit.floor[0] = 0, 1.0
    with pytest.raises(UnusableError, match=r"layer 1 without any change says something else \(KL [\d.]+ nats per"):
        units.keep(0, units.sites[1], unit)
    assert not list(tmp_path.iterdir())


def test_a_grouped_router_without_a_bias_to_choose_by_is_refused(tmp_path: Path) -> None:
    model = tiny.build("deepseek_v2")
    with pytest.raises(UnusableError, match=r"layer 1: the router scores groups of experts and adds no bias"):
        measured(model, tiny_tokens(tmp_path / "calibration", **SMALL, groups=2), tmp_path / "work")


def test_the_model_is_left_as_it_was(one, tmp_path: Path) -> None:
    model, tokens, _ = one
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        measured(model, tokens, tmp_path / "work")
        assert torch.equal(model(ids, use_cache=False).logits, before)
    assert not any(module.__dict__.get("forward") for module in model.modules())


def test_sampled_rows_are_whole_of_every_source_and_a_function_of_the_calibration(tmp_path: Path) -> None:
    tokens = tiny_tokens(tmp_path / "calibration", lengths=(30, 7, 30, 6, 30, 5, 30, 1, 30, 8), score="all", groups=2)
    rows = sampled_rows(tokens, 60)
    taken = [sum(int(tokens.row_lengths[row]) for row in rows if tokens.row_source[row] == s) for s in (0, 1)]
    assert taken == [60, 27], "the small source whole, the large one until it has what is left"
    assert rows == tuple(sorted(set(rows))) == sampled_rows(tokens, 60)
    assert sampled_rows(tokens, 10**6) == tuple(range(10)) and len(sampled_rows(tokens, 2)) == 2
    sample = KnockoutSample.of(tokens, 60, 45)
    assert sorted(row for group in sample.groups for row in group) == list(rows)
    for number, group in enumerate(sample.groups):
        assert sample.batch(number).rows == group
        assert len(group) == 1 or len(group) * max(tokens.row_lengths[list(group)]) <= 45
