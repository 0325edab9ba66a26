"""Everything that evaluation can do, at once, on the packaged model: `pytest -m long -s tests/test_whole_evaluation.py`
prints the time."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from collections.abc import Iterator

import pytest

from reapkit.pipeline.run import Run, apply
from reapkit.recipe.loading import load
from tests.support.paths import ROOT

RECIPE = ROOT / "examples" / "evaluation" / "recipe.yaml"
has_lm_eval = importlib.util.find_spec("lm_eval") is not None

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    root, started = tmp_path_factory.mktemp("whole"), time.monotonic()
    without = () if has_lm_eval else ("evaluate.lm_eval=null",)
    with contextlib.chdir(ROOT):  # the task file names its data from here
        run = apply(load(RECIPE, (*without, f"runtime.store={root / 'store'}", f"output.directory={root / 'run'}")))
        seconds = {name: round(artifact.manifest["seconds"]) for name, artifact in run.artifacts.items()}
        print(
            f"\nthe whole evaluation{'' if has_lm_eval else ', without lm-eval,'} took {time.monotonic() - started:.0f}"
            f" s: {seconds}"
        )
        yield run


def test_every_kind_of_evidence_is_there(run: Run) -> None:
    evaluation = json.loads((run.directory / "evaluation" / "evaluation.json").read_text())
    chosen = next(entry for entry in evaluation["candidates"] if entry["name"] == evaluation["chosen"])
    assert [entry["name"] for entry in evaluation["candidates"]] == ["reap-r0.75", "reap-r0.5", "reap-r0.25"]
    assert {control["criterion"] for control in evaluation["controls"]} == {"random", "frequency"}
    assert all(control["against"]["512"]["all"]["kl_mean_delta"]["interval"] for control in evaluation["controls"])
    assert set(chosen["metrics"]) == {"256", "512"} and set(chosen["metrics"]["512"]) == {
        "all",
        "code",
        "tools",
        "math",
        "prose",
    }
    assert evaluation["outside"] == ["prose"] and evaluation["confirm"]["candidate"] == chosen["name"]
    assert {"loop_share", "unfinished_share", "greedy_tool_call_validity", "sampled_tool_call_validity"} <= set(
        chosen["generation"]["tools"]
    )
    assert chosen["generation"]["tools"]["tool_prompts"] > 0
    assert ("kl_mean", "code", 0.4) in {(gate["metric"], gate["source"], gate["max"]) for gate in chosen["gates"]}


def test_the_written_directories_are_measured_in_every_way(run: Run) -> None:
    found = json.loads((run.directory / "verify.json").read_text())
    assert list(found["metrics"]) == ["base", "pruned", "quantized"] and found["verdict"] == "pass"
    speeds = {row["model"]: row for row in found["throughput"] if row["engine"] == "transformers"}
    assert set(speeds) == {"base", "quantized"} and all(
        row["prefill_tokens_per_s"] > 0 < row["peak_bytes"] for row in speeds.values()
    )
    assert found["equal_bytes"]["metrics"]["512"]["prose"]["kl_mean"]["value"] > 0
    assert (
        found["lm_eval"] is None
        if not has_lm_eval
        else 0 <= found["lm_eval"]["quantized"]["tasks"]["next_word"]["acc"] <= 1
    )


def test_the_page_shows_all_of_it(run: Run) -> None:
    page = (run.directory / "report.html").read_text()
    for words in (
        "reap against other criteria at the same budget",
        "The same size by quantizing alone",
        "Speed and memory",
        "prose",
        "greedy tool call validity",
    ):
        assert words in page, words
    assert not has_lm_eval or "next_word" in page
    assert "### Speed and memory" in (run.directory / "quantized" / "README.md").read_text()
