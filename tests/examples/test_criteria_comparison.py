"""What the comparison of criteria rests on: ratios over models, the oracle's choice, and models that can be trained."""

from __future__ import annotations

import sys
from decimal import Decimal
from math import exp, log
from pathlib import Path

import pytest
import torch

from reapkit.calibration.tokens import batches
from reapkit.model.masking import masked
from tests.support import tiny
from tests.support.paths import ROOT
from tests.support.tiny_tokens import tiny_tokens

FOLDER = ROOT / "examples" / "criteria"


@pytest.fixture(scope="module", autouse=True)
def scripts():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def test_ratios_are_geometric_means_with_the_interval_over_models() -> None:
    from table import STUDENT_T, ratio_to

    a, b = ("reroute", 0.5, "uniform", "all sources", None), ("reap", 0.5, "uniform", "all sources", None)
    found = ratio_to([{a: 0.1, b: 0.2}, {a: 0.3, b: 0.4}, {a: 0.2, b: 0.8}, {b: 1.0}], a, b)
    logs = [log(0.5), log(0.75), log(0.25)]
    mean = sum(logs) / 3
    half = STUDENT_T[2] * (sum((value - mean) ** 2 for value in logs) / 2 / 3) ** 0.5
    assert found == pytest.approx((exp(mean), exp(mean - half), exp(mean + half)))
    assert ratio_to([{a: 0.1, b: 0.2}, {a: 0.3, b: 0.4}, {b: 0.8}], a, b) is None


def test_tables_name_every_cell_and_mark_what_is_beyond_noise() -> None:
    from table import markdown

    def row(criterion: str, increase: float, mark: str, calibration: str = "all sources") -> dict:
        return {
            "criterion": criterion,
            "ratio": 0.5,
            "allocation": "uniform",
            "calibration": calibration,
            "repair": None,
            "increase": increase,
            "interval": [increase / 2, increase * 2],
            "by_source": dict.fromkeys(("code", "tools", "prose", "math"), increase),
            "against_reap": mark,
        }

    models = [
        {
            "model": name,
            "base": {"code": 1.0, "tools": 2.0},
            "rows": [row("reap", 0.2, ""), row("reroute", 0.1, "lower"), row("reap", 0.4, "", "code alone")],
        }
        for name in ("a", "b", "c")
    ]
    text = markdown(models)
    assert "| reroute | 0.50 [0.50, 0.50] |" in text and "| reroute | 0.100 [0.050, 0.200] ▼ |" in text
    whole = {**models[0], "rows": [row("reap", 0.8, "", "code alone"), row("reroute", 0.6, "", "code alone")]}
    assert "mean of 1 models | code | tools | prose | math |\n|---|---|---|---|---|\n| reap | 0.800 |" in markdown(
        [*models, whole]
    )
    assert "| reap | 0.400 | 0.400 | 0.400 | 0.400 |" in text and "a (1.50), b (1.50), c (1.50)" in text


def test_the_re_fit_on_little_calibration_is_set_beside_none() -> None:
    from small_calibration import SOURCES, Row, markdown

    rows = [
        Row(calibration, "reap", tokens, dict.fromkeys(SOURCES, value), mark)
        for calibration in ("all sources", "code alone")
        for tokens, value, mark in ((None, 0.4, ""), (500, 0.5, "higher"), (8_000, 0.2, "lower"))
    ]
    text = markdown(rows, "few samples")
    for calibration in ("all sources", "code alone"):
        table = text[text.index(f"calibrated on {calibration}") :].strip().split("\n\n")[0]
        assert table.count("\n") == 4 and "| reap | nothing | 0.400 | 0.400 | 0.400 | 0.400 | 0.400 |" in table
        assert (
            "| reap | 500 tokens | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 ▲ |" in table
            and "| 8,000 tokens |" in table
            and "0.200 ▼ |" in table
        )


def test_the_oracle_takes_the_cheapest_removal_layer_by_layer(tmp_path: Path) -> None:
    from oracle import greedy_oracle

    model, tokens = tiny.build("qwen3_moe", num_experts=4, num_experts_per_tok=2), tiny_tokens(tmp_path, score="all")
    found = greedy_oracle(model, tokens, [Decimal("0.25"), Decimal("0.5")], rows=4)
    batch = next(batches(tokens, range(4), 1 << 30))

    @torch.no_grad()
    def loss(keep: dict[int, list[int]]) -> float:
        with masked(model, keep):
            scores = model(batch.input_ids).logits.log_softmax(-1)
        kept = [(r, t) for r in range(4) for t in range(batch.input_ids.shape[1] - 1) if batch.signal[r, t]]
        return -sum(float(scores[r, t, batch.input_ids[r, t + 1]]) for r, t in kept) / len(kept)

    keep = {layer: [0, 1, 2, 3] for layer in found[Decimal("0.5")].keep}
    for ratio in (Decimal("0.25"), Decimal("0.5")):
        for layer in keep:
            without = {expert: loss({**keep, layer: [e for e in keep[layer] if e != expert]}) for expert in keep[layer]}
            keep[layer].remove(min(without, key=without.get))
        assert {layer: list(kept) for layer, kept in found[ratio].keep.items()} == keep


@pytest.mark.long
@pytest.mark.parametrize("name", ["softmax-a", "top-4-of-64", "shared-expert", "sigmoid"])
def test_every_variant_learns(name: str) -> None:
    from train_models import VARIANTS, Loads, Settings, muon_friendly, new_model, train_step

    model, settings = new_model(256, VARIANTS[name]), Settings(steps=8)
    tokens = torch.randint(3, 256, (2, 64), generator=torch.Generator().manual_seed(0))
    optimizers, loads = muon_friendly(model, settings), Loads(model)
    losses = []
    for _ in range(8):
        losses.append(train_step(model, tokens, settings, bool(loads.routers)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loads.even_out(1.0)
    assert losses[-1] < losses[0] - 1
    assert all(router.e_score_correction_bias.abs().max() > 0 for router in loads.routers) and bool(loads.routers) == (
        name == "sigmoid"
    )
