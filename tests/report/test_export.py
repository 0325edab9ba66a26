"""The exported files hold the observation's own numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from reapkit.observation.observation import MAXIMA, SUMS
from reapkit.report.export import export, prompts_hash
from reapkit.selection.saliency import saliency
from tests.support.observations import observe_routing, random_routing
from tests.support.specs import saliency_spec

CALIBRATION = {
    "rows": 12,
    "max_length": 64,
    "packing": "concat",
    "score": "completion",
    "sources": [
        {
            "name": "code",
            "source": "org/code",
            "config": "python",
            "split": "train",
            "filter": {"domain": "db"},
            "samples": 700,
            "sha256": "ab",
        },
        {
            "name": "tools",
            "source": "data/tools.jsonl",
            "config": None,
            "split": "train",
            "filter": None,
            "samples": 330,
            "sha256": "cd",
        },
    ],
}


@pytest.fixture(scope="module")
def observation():
    return observe_routing(random_routing(0, experts=10, dead=(3,)), experts=10, layers=(1, 2, 5))


def test_the_table_has_a_row_per_layer_expert_and_source(observation, tmp_path: Path) -> None:
    export(observation, tmp_path)
    table = pq.read_table(tmp_path / "saliency.parquet")
    assert table.column_names == ["layer", "expert", "source", *SUMS, *MAXIMA, "saliency_mean"]
    rows = table.to_pylist()
    assert len(rows) == 3 * 10 * 3 and len({(r["layer"], r["expert"], r["source"]) for r in rows}) == len(rows)
    for row in rows:
        layer = observation.layers.index(row["layer"])
        pick = slice(None) if row["source"] == "all" else slice(s := observation.sources.index(row["source"]), s + 1)
        for name in SUMS:
            assert row[name] == pytest.approx(observation.statistics[name][layer, pick, row["expert"]].sum().item())
        for name in MAXIMA:
            assert row[name] == observation.maxima[name][layer, pick, row["expert"]].max().item()
        assert row["saliency_mean"] == (pytest.approx(row["gate_norm_sum"] / row["count"]) if row["count"] else None)
    assert all(row["saliency_mean"] is None for row in rows if row["expert"] == 3)


@pytest.mark.parametrize("criterion", ["reap", "frequency"])
def test_the_ranking_is_by_saliency(observation, tmp_path: Path, criterion: str) -> None:
    export(observation, tmp_path, spec=saliency_spec(criterion))
    values = saliency(observation, saliency_spec(criterion))
    ranking = json.loads((tmp_path / "ranking_by_layer.json").read_text())
    assert ranking == {
        f"layer_{layer}": sorted(range(10), key=lambda e: (-values[row, e].item(), e))
        for row, layer in enumerate(observation.layers)
    }


def test_the_profile_says_what_was_observed(observation, tmp_path: Path) -> None:
    export(
        observation,
        tmp_path,
        calibration=CALIBRATION,
        model="org/toy",
        tokens_per_second=1550.7,
        reproduce="reapkit observe toy.yaml",
    )
    text = (tmp_path / "profile.md").read_text()
    code, tools = observation.scored_tokens.tolist()
    for line in (
        "# Saliency profile: org/toy",
        "- Model: `org/toy` (toy_moe)",
        "- Layers: 3 | Experts: 10 | Top-k: 2",
        f"- Total tokens processed: 120 | Kept (scored) tokens: {code + tools}",
        "- Forward throughput: 1551 tokens/s",
        f"- Prompts hash: `{prompts_hash(CALIBRATION)}`",
        "- Rows: 12 | Max row length: 64 | Packing: concat | Score: completion",
        "## Top experts by layer (top 10, ranked by Σgn / N)",
        "| layer | top_4 | top_8 |",
        "|---:|---:|---:|",
        "reapkit observe toy.yaml",
    ):
        assert line in text.splitlines()
    assert "`code` = `org/code` config `python` split `train` where {'domain': 'db'}, 700 samples: " in text
    ranking = json.loads((tmp_path / "ranking_by_layer.json").read_text())
    assert f"- layer_5: {ranking['layer_5']}" in text.splitlines()
    mass = observation.statistics["gate_norm_sum"][2].sum(0)
    top_4, top_8 = (np.sort(mass)[-size:].sum() / mass.sum() for size in (4, 8))
    assert f"| 5 | {top_4:.3f} | {top_8:.3f} |" in text.splitlines()


def test_what_is_not_known_is_left_out(observation, tmp_path: Path) -> None:
    export(observation, tmp_path)
    text = (tmp_path / "profile.md").read_text()
    assert "Prompts hash" not in text and "throughput" not in text and "Reproduce" not in text and "None" not in text


def test_equal_observations_give_equal_bytes(observation, tmp_path: Path) -> None:
    first, second = (export(observation, tmp_path / name, calibration=CALIBRATION) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_prompts_hash_follows_texts_and_order() -> None:
    swapped = CALIBRATION | {"sources": CALIBRATION["sources"][::-1]}
    assert prompts_hash(CALIBRATION) != prompts_hash(swapped) and len(prompts_hash(CALIBRATION)) == 64
