"""The table of p and H against the exact trace: equal where an edge is the quantile, near where one is, refused
elsewhere."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from reapkit.core.errors import UnusableError
from reapkit.observation.eaft_table import EaftTable
from reapkit.observation.observation import Observation
from reapkit.selection.eaft import measure_regions, summarise
from reapkit.selection.saliency import saliency
from tests.support.observations import in_cells, observe_routing, random_routing, variants
from tests.support.specs import saliency_spec


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("thresholds", ["pooled", "per-source"])
@pytest.mark.parametrize("good", ["rest", {"p_high": 0.5, "h_mid": 0.5, "other_weight": 0.1}])
def test_at_its_exact_levels_it_is_the_trace(seed: int, thresholds: str, good) -> None:
    spec = saliency_spec("eaft-reap", eaft={"thresholds": thresholds, "good": good})
    for routing in variants(seed):
        exact = observe_routing(routing)
        table = in_cells(exact)
        np.testing.assert_allclose(saliency(table, spec), saliency(exact, spec), rtol=1e-12, atol=1e-12)
        alphas = (Fraction(1), Fraction(1))
        found, expected = (measure_regions(each, spec.eaft, alphas) for each in (table, exact))
        assert np.array_equal(found.positions, expected.positions)
        said = summarise(found, table.sources, alphas)["realised"]
        assert all(
            row[name] == pytest.approx(level)
            for row in said.values()
            for name, level in {"p_low": 0.15, "h_low": 0.15, "h_high": 0.85}.items()
        )


def large() -> Observation:
    return in_cells(observe_routing(random_routing(3, tokens=900)))


def test_between_its_edges_the_nearest_is_taken_and_said() -> None:
    spec = saliency_spec("eaft-reap", eaft={"quantiles": {"p_low": 0.16, "h_low": 0.11, "h_high": 0.89}}).eaft
    table = large()
    found = measure_regions(table, spec, (Fraction(1), Fraction(1)))
    assert {name: round(level, 2) for name, level in found.realised[0].items()} == {
        "p_low": 0.15,
        "h_low": 0.1,
        "h_high": 0.9,
    }
    borders = found.thresholds[0]
    p, h = (table_of.sum(dim) for table_of, dim in ((table.eaft.positions, 2), (table.eaft.positions, 1)))
    below = sum(
        int(row[: int((edges <= borders.p_low).sum())].sum()) for row, edges in zip(p, table.eaft.p_edges, strict=True)
    )
    assert below / len(table.eaft) == pytest.approx(found.realised[0]["p_low"])
    above = sum(
        int(row[int((edges < borders.h_high).sum()) :].sum()) for row, edges in zip(h, table.eaft.h_edges, strict=True)
    )
    assert 1 - above / len(table.eaft) == pytest.approx(found.realised[0]["h_high"])


@pytest.mark.parametrize(
    ("quantiles", "message"),
    [
        (
            {"p_low": 0.87},
            r"quantiles\.p_low 0\.87 is not available .* nearest quantile is 0\.\d+, which differs by"
            r" more than 0\.02",
        ),
        ({"h_low": 0.3}, r"quantiles\.h_low 0\.3 is not available"),
        ({"h_high": 0.7}, r"raise observe\.trace_bytes and observe again"),
    ],
)
def test_a_quantile_too_far_from_every_edge_is_refused(quantiles: dict, message: str) -> None:
    with pytest.raises(UnusableError, match=message):
        saliency(large(), saliency_spec("eaft-reap", eaft={"quantiles": quantiles}))


def test_it_is_saved_and_two_do_not_add_up(tmp_path: Path) -> None:
    table = in_cells(observe_routing(random_routing(1)))
    table.save(tmp_path)
    loaded = Observation.load(tmp_path)
    assert isinstance(loaded.eaft, EaftTable) and np.array_equal(loaded.eaft.gate_norm_sum, table.eaft.gate_norm_sum)
    with pytest.raises(
        UnusableError, match=("EAFT tables of p and H cannot be added, since every table has its own edges")
    ):
        _ = loaded + table
