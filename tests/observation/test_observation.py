"""Observations on disk and in sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from reapkit.core.errors import UnusableError
from reapkit.observation.observation import MAXIMA, SUMS, Observation
from reapkit.observation.resident import observe
from reapkit.recipe.schema import ObserveSpec
from reapkit.report.export import export
from reapkit.selection.saliency import saliency
from tests.support import tiny
from tests.support.specs import saliency_spec
from tests.support.tiny_tokens import tiny_tokens


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """The whole calibration, and its two halves, of one model."""
    path = tmp_path_factory.mktemp("observed")
    model, out = tiny.build("qwen3_moe"), []
    for name, part in (("whole", slice(None)), ("first", slice(0, 2)), ("second", slice(2, None))):
        tokens = tiny_tokens(path / "calibration")
        tokens.groups, tokens.snapshots = tokens.groups[part], (0, 0, 1, 2)
        out.append(observe(model, tokens, ObserveSpec(), batch_tokens=48, work_directory=path / name, identity="m"))
    return out


def test_saved_and_loaded_it_is_the_same(observed, tmp_path: Path):
    whole = observed[0]
    whole.save(tmp_path / "a")
    loaded = Observation.load(tmp_path / "a")
    for name in SUMS:
        assert np.array_equal(loaded.statistics[name], whole.statistics[name])
    for name in MAXIMA:
        assert np.array_equal(loaded.maxima[name], whole.maxima[name])
    assert np.array_equal(loaded.coactivation, whole.coactivation)
    assert (loaded.layers, loaded.sources, loaded.num_experts, loaded.meta) == (
        (0, 1, 2),
        ("code", "prose"),
        16,
        whole.meta,
    )
    assert np.array_equal(loaded.eaft.routed(2)[1], whole.eaft.routed(2)[1])
    loaded.save(tmp_path / "b")
    assert [f.read_bytes() for f in sorted((tmp_path / "a").iterdir())] == [
        f.read_bytes() for f in sorted((tmp_path / "b").iterdir())
    ]


def test_halves_add_up_to_the_whole(observed):
    whole, first, second = observed
    both = first + second
    for name in SUMS:
        assert np.allclose(both.statistics[name], whole.statistics[name], rtol=1e-12)
    for name in MAXIMA:
        assert np.array_equal(both.maxima[name], whole.maxima[name])
    assert np.array_equal(both.coactivation, whole.coactivation)
    assert np.array_equal(both.scored_tokens, whole.scored_tokens)
    assert np.array_equal(both.eaft.p, whole.eaft.p) and np.array_equal(both.eaft.source, whole.eaft.source)
    assert np.array_equal(both.eaft.routed(1)[0], whole.eaft.routed(1)[0])


def test_other_sources_stand_beside_each_other(observed, tmp_path: Path):
    _, first, second = observed
    both = first + replace(second, sources=("prose", "tools"))
    assert both.sources == ("code", "prose", "tools")
    count = both.statistics["count"]
    assert np.array_equal(count[:, 0], first.statistics["count"][:, 0])
    assert np.array_equal(count[:, 1], first.statistics["count"][:, 1] + second.statistics["count"][:, 0])
    assert np.array_equal(count[:, 2], second.statistics["count"][:, 1])
    assert both.eaft.source.tolist().count(2) == second.eaft.source.tolist().count(1)
    both.save(tmp_path / "both")
    assert np.array_equal(Observation.load(tmp_path / "both").eaft.routed(0)[0], both.eaft.routed(0)[0])


def test_an_older_observation_is_read_added_and_exported_and_lacks_what_it_did_not_measure(observed, tmp_path: Path):
    _, first, second = observed
    older = {name: values for name, values in first.statistics.items() if name != "relative_sq_sum"}
    replace(first, statistics=older).save(tmp_path / "older")
    loaded = Observation.load(tmp_path / "older")
    assert set(loaded.statistics) == {*SUMS} - {"relative_sq_sum"}
    for both in (loaded + second, second + loaded):
        assert set(both.statistics) == set(loaded.statistics)
        assert np.array_equal(both.statistics["count"], (first + second).statistics["count"])
    export(loaded, tmp_path / "exported")
    assert "relative_sq_sum" not in pq.read_table(tmp_path / "exported" / "saliency.parquet").column_names
    assert np.array_equal(saliency(loaded, saliency_spec("reap")), saliency(first, saliency_spec("reap")))
    with pytest.raises(
        UnusableError,
        match=(
            r"this observation has no relative_sq_sum; the tool that made the observation, or the version of reapkit,"
            r" did not measure it\. Choose a criterion that does not need it, or observe with this version of reapkit\."
        ),
    ):
        saliency(loaded, saliency_spec("reap-relative"))


def test_different_models_do_not_add(observed):
    whole = observed[0]
    with pytest.raises(
        UnusableError, match="observations of different models cannot be added: model is m here and other there"
    ):
        whole + replace(whole, meta={**whole.meta, "model": "other"})


def test_a_directory_without_an_observation_is_refused(tmp_path: Path):
    with pytest.raises(UnusableError, match=r"observation\.json cannot be read"):
        Observation.load(tmp_path)
