"""What the page's script computes from equals what the statistics say."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from reapkit.core.formatting import percent
from reapkit.report.positions import coverage_curves, page_data, positions
from reapkit.report.view import View
from reapkit.selection import statistics
from tests.support import synthetic_report as synthetic


@pytest.fixture(scope="module")
def observed():
    return synthetic.observation()


def unpack(packed: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["base64"]), dtype=f"<{packed['dtype']}").reshape(packed["shape"])


def test_coverage_curves_equal_the_statistic_at_every_cut(observed):
    view = View.of(observed, None)
    order = statistics.removal_order(view.saliency)
    curves = coverage_curves(view.coactivation, order)
    for k in range(1, observed.num_experts):
        dropped = np.zeros_like(view.dropped)
        np.put_along_axis(dropped, order[:, :k], True, 1)
        for layer, expected in enumerate(statistics.redundancy_coverage(view.coactivation, dropped)):
            found = float(curves[layer, k])
            assert found == pytest.approx(expected, abs=1e-12) if expected is not None else found != found


def test_without_a_selection_the_least_salient_half_is_shown(observed):
    view = View.of(observed, None)
    kept = np.where(view.dropped, np.inf, view.saliency).min(1)
    gone = np.where(view.dropped, view.saliency, -np.inf).max(1)
    assert view.dropped.sum(1).tolist() == [8] * 4 and bool((gone <= kept).all())


def test_a_selection_is_shown_as_it_was_decided(observed):
    selection = synthetic.selection(observed, 6)
    view = View.of(observed, selection)
    assert {
        layer: tuple(np.flatnonzero(row).tolist()) for layer, row in zip(view.layers, view.dropped, strict=True)
    } == {layer: chosen.drop for layer, chosen in selection.layers.items()}
    data = page_data(view)
    assert np.array_equal(unpack(data["matrices"]["decided"]), view.dropped)
    assert data["positions"]["label"][-1] == "6 of 16 (38 %), as decided" and data["decidedRemoved"] == 6


def test_matrices_hold_what_the_live_charts_need(observed):
    view = View.of(observed, synthetic.selection(observed, 8))
    data = page_data(view)
    matrices = {name: unpack(packed) for name, packed in data["matrices"].items()}
    assert np.allclose(matrices["saliency"], view.saliency, rtol=1e-6) and matrices["saliency"][0, 1] == -np.inf
    assert (np.sort(matrices["rank"], axis=1) == np.arange(16)).all() and matrices["rank"][0, 5] < 2
    lifts = np.stack([matrices[f"lift{index}"] for index in range(3)])
    assert np.allclose(lifts.sum(0), 3.0) and matrices["dominant"][0, 1] == 255


def test_every_position_says_what_the_statistics_say(observed):
    view = View.of(observed, synthetic.selection(observed, 6))
    data = page_data(view)
    matrices = {name: unpack(packed) for name, packed in data["matrices"].items()}
    order = statistics.removal_order(view.saliency)
    assert len(data["positions"]["label"]) == 17 and data["positions"]["readout"][0] == "Nothing removed."
    for place in range(17):
        dropped = np.zeros_like(view.dropped)
        np.put_along_axis(dropped, order[:, :place], True, 1)
        dropped = view.dropped if place == 16 else dropped
        for name, expected in (
            ("floors", statistics.floors(view.saliency, dropped)),
            ("tail_risks", statistics.tail_risks(view.summed.gate_norm_max, dropped)),
            ("coverage", statistics.redundancy_coverage(view.coactivation, dropped)),
            ("chance", statistics.chance_coverage(dropped) if place else [None] * 4),
        ):
            known = [np.nan if value is None else value for value in expected]
            assert matrices[name][:, place] == pytest.approx(known, rel=1e-6, nan_ok=True), (name, place)
        lost = statistics.share_deleted(view.summed.gate_norm_sum[2], dropped[2])
        said = data["distribution"]["lost"][2][place]
        assert (
            said is None if matrices["floors"][2, place] != matrices["floors"][2, place] else said == percent(lost, 0)
        )
    assert data["positions"]["traffic"][:16] == pytest.approx(
        statistics.cut_curve(view.summed, view.saliency).traffic[:16]
    )


def test_the_readout_tells_what_goes(observed):
    view = View.of(observed, synthetic.selection(observed, 6))
    decided = list(positions(view))[-1]
    traffic = statistics.share_deleted(view.summed.count, view.dropped)
    covered = statistics.redundancy_coverage(view.coactivation, view.dropped)
    assert decided.readout.startswith(f"Removes {percent(traffic)} of the routed traffic and ")
    assert decided.readout.endswith(f", redundancy coverage {percent(sum(covered) / 4, 0)}.")
    assert "; random: 37.5 %. Tail risk " in decided.readout


def test_leaving_a_source_out_prunes_what_an_observation_without_it_would(observed):
    view = View.of(observed, synthetic.selection(observed, 8))
    found = view.dropped_without("tools")
    rest = [0, 2]
    count, mass = (observed.statistics[name][:, rest].sum(1) for name in ("count", "gate_norm_sum"))
    expected = np.argsort(-np.where(count > 0, mass / count, -np.inf), axis=1, kind="stable")[:, 8:]
    assert [set(np.flatnonzero(row).tolist()) for row in found] == [set(row) for row in expected.tolist()]
