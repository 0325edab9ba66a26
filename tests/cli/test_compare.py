"""compare: observations, selections and runs beside each other, in numbers counted here by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reapkit.selection.selection import LayerSelection, Selection
from tests.support.browser import assert_readable, chromium
from tests.support.command import command
from tests.support.observations import observe_routing, random_routing
from tests.support.paths import ROOT

__all__ = ["chromium"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Observations of 40 and 400 tokens, of another model and of another source; two selections; two runs."""
    root = tmp_path_factory.mktemp("compare")
    large = observe_routing(random_routing(1, tokens=400, score_all=True), trace=False)
    large.save(root / "large")
    observe_routing(random_routing(1, tokens=40, score_all=True), trace=False).save(root / "small")
    replace(large, meta={"model": "another"}).save(root / "other")
    observe_routing(random_routing(2, tokens=400, score_all=True), trace=False, sources=("code", "prose")).save(
        root / "sources"
    )
    _selection({0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}).save(root / "first")
    _selection({0: (0, 1, 2, 4), 1: (0, 1, 2, 3)}).save(root / "second")
    _write_run(root / "run-a", 0.5, 0.20, (0.18, 0.22))
    _write_run(root / "run-b", 0.25, 0.05, (0.04, 0.06))
    return root


def _selection(keep: dict[int, tuple[int, ...]]) -> Selection:
    return Selection(
        "reap",
        {
            layer: LayerSelection(kept, tuple(sorted(set(range(8)) - set(kept))), (1.0,) * 8)
            for layer, kept in keep.items()
        },
        details={"ratio": "0.5"},
    )


def _write_run(directory: Path, ratio: float, kl: float, interval: tuple[float, float], packs: str = "p") -> None:
    directory.mkdir()
    measured = {
        "perplexity_ratio": {"value": 1 + kl, "interval": [1, 2]},
        "kl_mean": {"value": kl, "interval": list(interval)},
        "top1_agreement": {"value": 0.8, "interval": [0.7, 0.9]},
    }
    rows = [
        {"name": name, "experts": "8", "bytes": 1000, "parameters": 500, "perplexity": 2.0}
        for name in ("base", "pruned")
    ]
    stage = {"artifact": "x", "executed": True, "seconds": 1.0, "summary": {}}
    (directory / "run.json").write_text(
        json.dumps(
            {"name": "r", "model": "m", "stages": {"packs": stage | {"key": packs}, "verify": stage | {"key": "v"}}}
        )
    )
    (directory / "verify.json").write_text(
        json.dumps(
            {
                "verdict": "pass",
                "rows": rows,
                "metrics": {"base": {}, "pruned": {"64": {"all": measured, "code": measured}}},
            }
        )
    )
    (directory / "recipe.resolved.yaml").write_text(
        f"name: r\nprune: {{ratio: {ratio}}}\nruntime: {{store: {directory}}}\n"
    )


def compared(*arguments: object) -> dict:
    done = command("compare", *arguments, "--json")
    assert done.code == 0, done.stderr
    return done.json()


def test_observations_say_whether_the_calibration_is_large_enough(root: Path) -> None:
    found = compared(root / "small", root / "large", "--ratio", "0.5")
    pair = found["pairs"]["A-B"]
    kept = {
        name: [set(sorted(range(8), key=lambda e: (-row[e], e))[:4]) for row in _reap(root / name)]
        for name in ("small", "large")
    }
    shares = [len(a & b) / 4 for a, b in zip(kept["small"], kept["large"], strict=True)]
    assert [layer["share"] for layer in pair["layers"].values()] == shares and pair["share"]["min"] == min(shares) < 1
    assert [layer["jaccard"] for layer in pair["layers"].values()] == [
        len(a & b) / len(a | b) for a, b in zip(kept["small"], kept["large"], strict=True)
    ]
    assert pair["chance"] == 0.5 and all(-1 <= layer["rank_correlation"] < 1 for layer in pair["layers"].values())
    assert (
        "not large enough; the decision depends on which rows were read. Raise calibration.samples." in found["answer"]
    )
    assert "of other rows, or of fewer" in compared(root / "large", root / "large")["answer"]
    assert "The sources differ" in compared(root / "large", root / "sources", "--criterion", "frequency")["answer"]
    assert list(compared(root / "small", root / "large", root / "sources")["pairs"]) == ["A-B", "A-C", "B-C"]


def _reap(directory: Path) -> list[list[float]]:
    from reapkit.observation.observation import Observation

    statistics = Observation.load(directory).statistics
    mean = statistics["gate_norm_sum"].sum(1) / statistics["count"].sum(
        1
    )  # 0/0 where an expert was never routed to: it ranks last
    return np.nan_to_num(mean, nan=-1.0).tolist()


def test_other_models_are_refused_unless_told(root: Path) -> None:
    done = command("compare", root / "large", root / "other")
    assert done.code == 3
    assert "Experts of different models need not correspond. To compare anyway, add --different-models." in done.stderr
    found = compared(root / "large", root / "other", "--different-models")
    assert found["different_models"] and found["pairs"]["A-B"]["share"]["mean"] == 1


def test_selections_name_the_experts_that_differ(root: Path) -> None:
    found = compared(root / "first", root / "second" / "selection.json")
    assert found["pairs"]["A-B"]["layers"]["0"] == {"kept": [4, 4], "share": 0.75, "jaccard": 0.6, "only": [[3], [4]]}
    assert (
        found["answer"]
        == "87.5 % of the kept experts are the same (lowest: layer 0, 75.0 %; random sets: 50 %); 1 expert differs."
    )
    assert compared(root / "first", root / "first")["answer"] == "The selections keep the same experts."


def test_runs_are_ranked_only_where_their_numbers_can_be(root: Path) -> None:
    found = compared(root / "run-a", root / "run-b")
    assert (
        found["answer"]
        == "B is closest to the base: mean KL 0.0500 (0.0400 to 0.0600), next A with 0.2000 (0.1800 to 0.2200); the"
        " intervals do not touch."
    )
    assert found["fields"] == [{"path": "prune.ratio", "values": {"A": 0.5, "B": 0.25}}]
    shutil.rmtree(root / "run-c", ignore_errors=True)
    _write_run(root / "run-c", 0.5, 0.21, (0.19, 0.3))
    assert "the intervals touch, so this may be noise" in compared(root / "run-a", root / "run-c")["answer"]
    shutil.rmtree(root / "run-c")
    _write_run(root / "run-c", 0.5, 0.21, (0.19, 0.3), packs="others")
    assert "different held-out rows" in compared(root / "run-a", root / "run-c")["answer"]


def test_a_mask_is_not_ranked_as_if_it_were_a_written_model(root: Path, tmp_path: Path) -> None:
    stopped = Path(shutil.copytree(root / "run-b", tmp_path / "stopped"))
    metrics = json.loads((stopped / "verify.json").read_text())["metrics"]["pruned"]
    (stopped / "verify.json").unlink()
    (stopped / "evaluation").mkdir()
    (stopped / "evaluation" / "evaluation.json").write_text(
        json.dumps(
            {"verdict": "reject", "chosen": "c", "confirm": None, "candidates": [{"name": "c", "metrics": metrics}]}
        )
    )
    assert compared(root / "run-a", stopped)["answer"].endswith(
        "but B was measured as a mask on its base before any quantization, A as the pruned directory."
    )


@pytest.mark.parametrize(
    ("names", "code", "said"),
    [
        (("run-a", "first"), 2, "run-a: a run; {root}/first: a selection. Of a run, give RUN/selection."),
        (("large",), 2, "compare: found 1 path. Give 2 to 26."),
        (("large", "nowhere"), 2, "nowhere: no such file or directory"),
        (("large", "large", "--ratio", "1.5"), 2, "--ratio: found '1.5'. Allowed: a number between 0 and 1"),
        (
            ("large", "large", "--ratio", "0.01"),
            2,
            "--ratio: 0.01 removes 0 of 8 experts per layer. Choose a ratio that removes 1 to 7.",
        ),
        (("large", "large", "--criterion", "reep"), 2, "--criterion: found 'reep'. Known: "),
    ],
)
def test_what_cannot_be_compared_is_named(root: Path, names: tuple[str, ...], code: int, said: str) -> None:
    places = [str(root / name) if (root / name).exists() or name == "nowhere" else name for name in names]
    done = command("compare", *places)
    assert done.code == code and said.format(root=root) in done.stderr


@pytest.mark.parametrize("names", [("small", "large", "sources"), ("first", "second"), ("run-a", "run-b")])
def test_tables_fit_and_pages_stand_alone(root: Path, names: tuple[str, ...], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = subprocess.run(
        [sys.executable, "-m", "reapkit", "compare", *names, "--html", str(page)],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"COLUMNS": "80", "TERM": "dumb", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines() if str(page) not in line) <= 80
    html = page.read_text()
    assert 'class="chart"' in html and not re.search(r'(?:src|href)="https?:', html)


@pytest.mark.parametrize("names", [("small", "large"), ("first", "second"), ("run-a", "run-b")])
def test_the_pages_can_be_read_in_a_browser(chromium, root: Path, names: tuple[str, ...], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert command("compare", *(root / name for name in names), "--html", page, "--json").code == 0
    assert_readable(chromium, page)
