"""A metric is one record that agrees with what is computed, limited and shown; a new one is found where people look."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from reapkit.evaluation.advice import gate_lines
from reapkit.evaluation.gates import PRESETS, Gate, judge, overall, resolve
from reapkit.evaluation.generation import Continuation, Prompt
from reapkit.evaluation.generation import summarize as summarize_generation
from reapkit.evaluation.metrics.metric import Metric
from reapkit.evaluation.metrics.rows import RowIndex, regions, summarize_base, summarize_candidate, summarize_difference
from reapkit.evaluation.metrics.signals import describe
from reapkit.evaluation.metrics.table import METRICS, in_view, metric_of, metrics_table
from reapkit.evaluation.throughput import NUMBERS
from reapkit.recipe.schema import GatesSpec
from reapkit.report import comparison_sections, quality_sections, result_section
from reapkit.report.blocks import PageTable
from reapkit.report.card import model_card
from reapkit.report.comparison import runs
from reapkit.report.inspection import evaluation as inspection
from reapkit.report.tables import result_table
from tests.support import synthetic_report
from tests.support.paths import ROOT

NEW = Metric(
    "surprise",
    "surprise at the text",
    "surprised",
    "how often its brows go up",
    "lower",
    unit="share",
    digits=1,
    same_as_base=0.0,
    views=frozenset({"gates", "final", "narrow", "distances", "summary"}),
)


def test_what_is_computed_on_rows_has_a_record() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 12, 32, generator=generator), torch.randint(32, (12,), generator=generator)
    base, candidate = describe(logits[0], reference), describe(logits[1], reference, logits[0])
    index = RowIndex(torch.tensor([0, 4, 8, 12]), torch.zeros(3, dtype=torch.int64), ("code",))
    limits = regions(base, index, {"p_low": "0.15", "h_low": "0.15", "thresholds": "pooled"})
    found = (
        summarize_base(base, index, limits, 4),
        summarize_candidate(base, candidate, index, limits, limits, 4),
        summarize_difference(candidate, base, index, 4),
    )
    assert _measured(found) == {metric.name for metric in METRICS.values() if metric.kind == "distribution"}


class Speller:
    """Tokens are characters."""

    def decode(self, tokens: Any) -> str:
        return "".join(map(chr, tokens))


def test_what_is_computed_on_continuations_has_a_record() -> None:
    written = {mode: [Continuation((5,) * 9, True)] for mode in ("greedy", "sampled")}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    prompt = Prompt(0, tuple(map(ord, f"<tools>\n{json.dumps(tool)}\n</tools>")), tuple(map(ord, call)))
    found = summarize_generation(written, written, [prompt], ["tools"], tokenizer=Speller())
    assert _measured(found) == {metric.name for metric in METRICS.values() if metric.kind == "generation"}


def test_what_is_measured_with_a_clock_has_a_record() -> None:
    assert NUMBERS == ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_bytes")
    assert METRICS["decode_tokens_per_s"].show(1204.4) == "1,204 tokens/s"
    assert METRICS["peak_bytes"].show(2_500_000) == "2.5 MB"


def _measured(found: Any) -> set[str]:
    """Names of everything that is `{"value", "interval"}`, at any depth."""
    if isinstance(found, dict):
        own = {name for name, value in found.items() if isinstance(value, dict) and "interval" in value}
        return own.union(*(_measured(value) for value in found.values()))
    return set().union(*map(_measured, found)) if isinstance(found, (tuple, list)) else set()


def test_recipes_limit_what_the_table_says_they_may() -> None:
    assert [metric.name for metric in in_view("gates")] == [name for name in GatesSpec.model_fields if name != "preset"]
    assert {metric for limits in PRESETS.values() for metric in limits} <= {metric.name for metric in in_view("gates")}


def test_what_is_drawn_against_the_base_has_a_value_that_means_nothing_was_lost() -> None:
    assert all(metric.same_as_base is not None for metric in (*in_view("distances"), *in_view("gates")))
    assert {metric.name for metric in (*in_view("narrow"), *in_view("final"))} <= {
        metric.name for metric in in_view("summary")
    }


def test_values_are_shown_in_their_unit() -> None:
    assert METRICS["kl_mean"].show(0.035) == "0.0350" and METRICS["perplexity"].show(6.3) == "6.300"
    agreement = METRICS["top1_agreement"]
    assert (agreement.show(0.945), agreement.show_plain(0.945)) == ("94.5 %", "94.5%")
    assert METRICS["conflict_rate_delta"].show(-0.002) == "-0.20 %"
    assert (agreement.show(None), agreement.show(float("nan")), agreement.show_plain(None)) == ("–", "–", "-")
    assert metric_of("of_an_older_file").heading == "Of_an_older_file"


def test_the_table_in_the_readme_is_current() -> None:
    readme = (ROOT / "README.md").read_text()
    assert metrics_table() in readme, "put what reapkit.evaluation.metrics.table.metrics_table() returns into README.md"


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch):
    """A run that measured one metric more."""
    monkeypatch.setitem(METRICS, NEW.name, NEW)
    facts = synthetic_report.facts()
    gate = {"metric": NEW.name, "max": 0.5, "min": None, "source": "all", "required": True}
    evaluation = _with_new(facts.evaluation)
    evaluation["gates"].append(gate)
    for entry in (*evaluation["candidates"], evaluation["confirm"]):
        measured = entry["metrics"] or {}
        entry["gates"] = [
            result.to_json() for result in judge(measured, [Gate(**each) for each in evaluation["gates"]])
        ]
    return dataclasses.replace(facts, evaluation=evaluation, verification=_with_new(facts.verification))


def _with_new(found: Any) -> Any:
    """The same with the new metric beside every mean KL."""
    if isinstance(found, dict):
        beside = {NEW.name: found["kl_mean"]} if "kl_mean" in found else {}
        return {name: _with_new(value) for name, value in found.items()} | beside
    return [_with_new(each) for each in found] if isinstance(found, (list, tuple)) else found


def _columns(blocks: Any) -> list[list[str]]:
    """The headings of every table in blocks, folded ones included."""
    found = []
    for block in blocks:
        if isinstance(block, PageTable):
            found.append([name for name, _ in block.columns])
        found += _columns(getattr(block, "blocks", ()))
    return found


def test_a_new_metric_is_one_record_for_gates(facts) -> None:
    gates = resolve({"preset": "size-first", NEW.name: {"max": 0.01}})
    results = judge({"512": facts.verification["metrics"]["quantized"]["512"]}, gates)
    assert overall(results) == "reject"
    lines = gate_lines([result.to_json() for result in results], "reject")
    assert lines[-1] == "  surprise: how often its brows go up"


def test_a_new_metric_is_one_record_for_the_page_and_the_card(facts) -> None:
    assert any("surprised" in columns for columns in _columns(result_section.result(facts).blocks))
    quality = quality_sections.quality(facts)
    assert any("surprised" in columns for columns in _columns(quality.blocks))
    assert "Surprise at the text" in {block.title for block in quality.blocks if hasattr(block, "data")}
    assert "gate-surprise" in {chart.id for chart in quality_sections.gates(facts).blocks[0].blocks}
    control = {**facts.verification, "equal_bytes": {"scheme": "W2A16", "bytes": 9, "note": "", "metrics": None}}
    control["equal_bytes"]["metrics"] = facts.verification["metrics"]["pruned"]
    section = comparison_sections.equal_bytes(dataclasses.replace(facts, verification=control))
    assert any("surprised" in columns for columns in _columns(section.blocks))
    card = model_card(facts, "quantized")
    assert card.count("| Surprise at the text |") == 2 and "| 0.0350 | 94.5 % | 3.5 % |" in card


def test_a_new_metric_is_one_record_for_the_comparison_of_runs(facts) -> None:
    run = {"sizes": [], "verdict": "pass", "measured": "quantized", "length": "512", "name": "r", "tone": "pass"}
    quality = facts.verification["metrics"]["quantized"]["512"]
    found = {
        "runs": {"A": run | {"quality": quality}},
        "answer": "",
        "comparable": True,
        "fields": [],
        "selections": None,
    }
    headings = [column.name for block in runs.blocks(found) for column in getattr(block, "columns", ())]
    assert headings.count("surprised") == 1
    page = runs.page(found, {"A": "runs/a"})
    assert any("surprised" in columns for section in page.sections for columns in _columns(section.blocks))


def test_a_new_metric_is_one_record_for_the_terminal_and_the_docs(facts, tmp_path) -> None:
    assert "surprised" in [column.name for column in result_table(facts.verification).columns]
    (tmp_path / "evaluation.json").write_text(json.dumps(facts.evaluation))
    inspected = inspection.facts(tmp_path)
    assert all(NEW.name in row for row in inspected["rows"])
    tables = [block for block in inspection.blocks(inspected, colour=False) if hasattr(block, "columns")]
    assert sum("surprised" in [column.name for column in table.columns] for table in tables) == 3
    assert "| `surprise` | surprise at the text | how often its brows go up | lower |" in metrics_table()
