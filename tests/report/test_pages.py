"""Pages stand alone, say something about every chart, and survive whatever a run could not fill."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from reapkit.observation.observation import Reroute
from reapkit.report.blocks import Chart, PageTable
from reapkit.report.card import model_card
from reapkit.report.observation_report import observation_page, write_observation_report
from reapkit.report.page import as_json, render
from reapkit.report.reroute_section import reroute_section
from reapkit.report.run_report import run_page, write_run_report
from reapkit.report.size_curve import measured_cuts, size_curves
from reapkit.report.view import View
from tests.support import synthetic_report as synthetic
from tests.support.observations import in_cells


def blocks(page):
    def walk(items):
        for item in items:
            yield item
            yield from walk(getattr(item, "blocks", ()))

    return [block for section in page.sections for block in walk(section.blocks)]


def text(page) -> str:
    """The page's words without its style, script and data."""
    html = render(page)
    return re.sub(r"<(style|script)\b.*?</\1>", "", html, flags=re.S)


@pytest.fixture(scope="module")
def observed():
    return synthetic.observation()


@pytest.fixture(scope="module")
def finished(observed):
    return synthetic.facts(observed=observed)


def test_a_page_needs_nothing_from_elsewhere_and_equal_facts_give_equal_bytes(finished, tmp_path):
    for name in ("one.html", "two.html"):
        write_run_report(finished, tmp_path / name)
    html = (tmp_path / "one.html").read_text()
    assert html == (tmp_path / "two.html").read_text()
    frame = re.sub(r"<script\b.*?</script>", "", html, flags=re.S)
    assert (
        not re.findall(r"""(?:src|href)\s*=\s*["']?(?!#|data:)[^"'> ]+""", frame)
        and "@import" not in frame
        and "url(" not in frame
    )


def test_observation_page_has_every_section_and_a_sentence_for_every_chart(observed):
    page = observation_page(observed)
    assert [section.id for section in page.sections] == [
        "recorded",
        "cut",
        "experts",
        "drivers",
        "layers",
        "distributions",
        "sources",
        "eaft",
        "convergence",
        "never",
    ]
    charts = [block for block in blocks(page) if isinstance(block, Chart)]
    assert len(charts) == 14 and len({chart.id for chart in charts}) == 14
    assert all(chart.sentence.endswith(".") and re.search(r"\d", chart.sentence) for chart in charts)


def test_removal_paths_are_drawn_with_the_numbers_they_hold(observed):
    draw = torch.Generator().manual_seed(0)
    layers, experts = len(observed.layers), observed.num_experts
    order = torch.stack(
        [torch.stack([torch.randperm(experts, generator=draw) for _ in range(4)]) for _ in range(layers)]
    )
    error = torch.rand(layers, 4, experts, generator=draw, dtype=torch.float64).cumsum(-1) / 100
    order[..., -2:], error[..., -2:] = -1, 0
    paths = Reroute(torch.tensor([5, 6, 7]), order, error, torch.zeros(layers, 3, experts, dtype=torch.float64))
    section = reroute_section(View.of(observed, None), paths)
    half = error[:, -1, experts // 2 - 1]
    worst = int(half.argmax())
    assert (
        f"by {100 * float(half.mean()):.2f}" in section.blocks[0].sentence
        and f"in layer {worst}." in section.blocks[0].sentence
    )
    assert section.blocks[0].data[0]["y"] == error[:, -1, : experts - 2].mean(0).tolist()
    assert "5 of code, 6 of tools and 7 of prose" in section.lead


@pytest.mark.parametrize("lacking", ["coactivation", "trace", "sources", "experts"])
def test_an_observation_without_some_part_leaves_only_that_part_out(lacking):
    observed = synthetic.observation(
        coactivation=lacking != "coactivation",
        trace=lacking != "trace",
        sources=1 if lacking == "sources" else 3,
        experts=8 if lacking == "experts" else 16,
    )
    page = observation_page(observed)
    ids = [section.id for section in page.sections]
    assert ("eaft" in ids) == (lacking != "trace") and ("sources" in ids) == (lacking != "sources")
    assert ("coverage" in [block.id for block in blocks(page) if isinstance(block, Chart)]) == (
        lacking != "coactivation"
    )
    assert "nan" not in text(page).lower().split()


def test_numbers_in_the_sentences_are_those_of_the_statistics(observed):
    from reapkit.core.formatting import percent
    from reapkit.selection import statistics

    selection = synthetic.selection(observed, 8)
    metrics = statistics.report_metrics(observed, selection)
    cut = next(
        block for block in blocks(observation_page(observed, selection)) if getattr(block, "id", "") == "cut-curve"
    )
    assert (
        percent(metrics["traffic_deleted"]) in cut.sentence
        and percent(metrics["saliency_mass_deleted"]) in cut.sentence
    )
    balance = next(
        block for block in blocks(observation_page(observed, selection)) if getattr(block, "id", "") == "balance"
    )
    assert balance.data[0]["y"] == metrics["balance_cv"]


def test_what_leaving_a_source_out_would_prune_is_named(observed):
    view = View.of(observed, None)
    found = next(
        block
        for block in blocks(observation_page(observed))
        if getattr(block, "summary", "").startswith("Which experts would be removed")
    )
    named = {(name, layer): experts for name, layer, experts in found.blocks[0].rows}
    for name in observed.sources:
        for layer, gone, now in zip(view.layers, view.dropped_without(name), view.dropped, strict=True):
            expected = [str(expert) for expert in range(16) if gone[expert] and not now[expert]]
            assert re.findall(r"\d+", named.get((name, layer), "")) == expected
    assert any(named)


def test_what_comes_from_data_cannot_break_out_of_the_page(observed):
    hostile = "</script><img src=x onerror=alert(1)>"
    named = dataclasses.replace(observed, sources=(hostile, *observed.sources[1:]))
    html = render(observation_page(named))
    assert "<img" not in html and hostile not in html
    assert json.loads(str(as_json({"name": hostile, "rate": float("nan")}))) == {"name": hostile, "rate": None}


def test_a_final_model_that_its_own_gates_passed_is_called_passed(observed):
    facts = synthetic.facts(observed=observed)
    judged = {**facts.verification, "verdict": "pass"}
    words = text(run_page(dataclasses.replace(facts, verification=judged)))
    assert "Passed its gates" in words and "The final model passes evaluate.gates_quantized" in words
    assert "does not keep" not in words


def test_a_finished_run_shows_sizes_quality_and_how_to_repeat_it(finished):
    words = text(run_page(finished))
    for expected in (
        "7.3\u00a0MB → 1.9\u00a0MB",
        "Pruning passed; quantized, it may break the same limits",
        "Limits that the final directory does not keep",
        "perplexity_ratio 1.05 [1.036, 1.064] (all, 512 tokens), limit ≤ 1.05: undecided",
        "reapkit apply small.yaml --set prune.ratio=0.5",
        "W3A16",
        "&lt;a&gt; list",
        "<mark>def f(x)",
        "observe: 2 of 64 experts received no scored token",
        "largest difference 3e-6",
    ):
        assert expected in words
    ids = [section.id for section in run_page(finished).sections]
    assert ids[:6] == ["result", "gates", "quality", "decision", "quantization", "calibration"] and ids[-3:] == [
        "proofs",
        "stages",
        "reproduce",
    ]


def test_quantization_shows_the_measured_error_of_every_layer(finished):
    chart = next(block for block in blocks(run_page(finished)) if getattr(block, "id", "") == "quantization-error")
    assert chart.data[0]["x"] == [0, 1, 2, 3] and chart.data[0]["y"] == pytest.approx([0.2, 0.21, 0.22, 0.23])
    assert "21.5 % of their norm in the mean layer, by 23.0 % in layer 3 and by 20.0 % in layer 0." in chart.sentence
    unmeasured = [
        {**proof, "measured": False, "detail": "not measured: awq", "by_layer": None}
        for proof in finished.verification["proofs"]
    ]
    words = text(run_page(dataclasses.replace(finished, verification={**finished.verification, "proofs": unmeasured})))
    assert "The rounding error of single layers was not measured: awq." in words and "quantization-error" not in words


def test_a_rejected_run_names_gate_source_amount_and_what_to_change(observed):
    page = run_page(synthetic.facts(rejected=True, observed=observed, losses={"ratio-0.5": 0.3, "ratio-0.4": 0.2}))
    words = text(page)
    for expected in (
        "Rejected by its gates",
        "nothing was written",
        "limit ≤ 1.05: reject, 0.26 beyond it",
        "agentic alone",
        "prune less",
    ):
        assert expected in words
    table = next(
        block
        for block in blocks(page)
        if isinstance(block, PageTable) and block.title.startswith("ratio-0.5, gate by gate")
    )
    assert table.rows[0][:6] == (
        "perplexity ratio",
        "all",
        "512",
        "at most 1.050",
        "1.300 (1.236 to 1.364)",
        "0.250 beyond",
    )
    assert "quantization" not in [section.id for section in page.sections] and "not reached" in words


def test_what_was_tried_after_a_rejection_stands_in_the_table_and_its_advice_can_be_pasted(observed):
    rejected = synthetic.facts(rejected=True, observed=observed)
    [entry] = rejected.evaluation["candidates"]
    search = [
        {**entry, "name": "ratio-0.25", "removed": 0.25},
        {**entry, "name": "ratio-0.125", "removed": 0.125, "verdict": "pass", "gates": []},
    ]
    found = {
        **rejected.evaluation,
        "search": search,
        "advice": "It is rejected.\n    --set 'prune.candidates.ratio=[0.125]'\n    --set other=1",
    }
    page = run_page(dataclasses.replace(rejected, evaluation=found))
    table = next(
        block for block in blocks(page) if isinstance(block, PageTable) and block.title.startswith("Every candidate")
    )
    assert [(row[0], row[4].split(":")[0]) for row in table.rows[1:]] == [
        ("ratio-0.25", "tried after the rejection"),
        ("ratio-0.125", "tried after the rejection"),
    ]
    assert "reapkit apply small.yaml --set prune.ratio=0.5 --set &#39;prune.candidates.ratio=[0.125]&#39;" in text(page)
    assert "to paste" not in text(run_page(synthetic.facts(observed=observed)))


def test_a_control_that_does_better_is_pointed_out(finished):
    evaluation = {
        **finished.evaluation,
        "controls": [
            {
                "name": "control-frequency",
                "criterion": "frequency",
                "experts": "8",
                "metrics": {"512": synthetic.groups(0.01, synthetic.SOURCES[:3])},
            }
        ],
    }
    assert "On this model and mix, try saliency.criterion: frequency." in text(
        run_page(dataclasses.replace(finished, evaluation=evaluation))
    )
    assert "loses less" not in text(run_page(finished))


def test_a_run_stopped_early_still_has_a_page(observed, tmp_path):
    stopped = dataclasses.replace(
        synthetic.facts(rejected=True, observed=observed),
        chosen=None,
        observation=None,
        selections={},
        evaluation={},
        calibration={},
        stages=(),
        warnings=(),
        versions={},
    )
    write_run_report(stopped, tmp_path / "report.html")
    assert [section.id for section in run_page(stopped).sections] == ["result", "stages", "reproduce"]


def test_observation_report_is_written_whole(observed, tmp_path):
    write_observation_report(observed, synthetic.selection(observed, 4), tmp_path / "new" / "observation.html")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["observation.html"]


def test_free_continuations_are_shown_where_they_were_measured(finished):
    loops = {"rows": 8, "loop_share": synthetic.measured(0.2, 0.1), "loop_share_delta": synthetic.measured(0.1, 0.1)}
    evaluation = {
        **finished.evaluation,
        "base_generation": {"all": {"rows": 8, "loop_share": synthetic.measured(0.1, 0.05)}},
        "candidates": [{**finished.evaluation["candidates"][0], "generation": {"all": loops}}],
    }
    measured = dataclasses.replace(finished, evaluation=evaluation)
    assert "20.0 % (10.0 % to 30.0 %)" in text(run_page(measured)) and "Free continuations" not in text(
        run_page(finished)
    )
    card = model_card(measured, "pruned")
    assert (
        "20.0 % (10.0 % to 30.0 %) of the pruned model's (as a mask)" in card and "Free generation (loops" not in card
    )


def test_continuations_of_the_quantized_model_stand_beside_base_and_mask(finished):
    shares = {"all": {"rows": 8, "loop_share": synthetic.measured(0.2, 0.1)}}
    example = {"source": "code", "prompt": "sort", "base": "sorted(x)", "candidate": "sorted(y)"}
    evaluation = {
        **finished.evaluation,
        "base_generation": {"all": {"rows": 8, "loop_share": synthetic.measured(0.1, 0.05)}},
        "candidates": [{**finished.evaluation["candidates"][0], "generation": shares, "examples": [example]}],
    }
    written = {
        "generation": {"all": {"rows": 8, "loop_share": synthetic.measured(0.4, 0.1)}},
        "examples": [{"source": "code", "prompt": "sort", "text": "sorted(z)"}],
    }
    given = dataclasses.replace(
        finished, evaluation=evaluation, verification={**finished.verification, "continuations": written}
    )
    tables = [block for block in blocks(run_page(given)) if isinstance(block, PageTable)]
    [shares_table] = [table for table in tables if table.title.startswith("Free continuations")]
    assert [name for name, _ in shares_table.columns][-3:] == ["base", "ratio-0.5 (mask)", "quantized"]
    assert shares_table.rows[0][-1] == "40.0 % (30.0 % to 50.0 %)"
    [texts] = [table for table in tables if ("prompt", "left") in table.columns]
    assert [str(cell) for cell in texts.rows[0][1:]] == [
        f"<pre>{said}</pre>" for said in ("sort", "sorted(x)", "sorted(y)", "sorted(z)")
    ]
    assert "40.0 % (30.0 % to 50.0 %) of this one's." in model_card(given, "quantized")
    assert "of this one's" not in model_card(given, "pruned")


def sized(facts, sizes: dict[str, int], *, search: dict[str, float] | None = None):
    """The facts with these bytes per candidate; `search`: losses of cuts tried after a rejection."""
    names = facts.evaluation["candidates"]
    planned = {
        entry["name"]: dataclasses.replace(facts.planned[entry["name"]], nbytes=sizes[entry["name"]]) for entry in names
    }
    tried = [
        {
            **synthetic.evaluation({name: loss}, synthetic.SOURCES[:3])["candidates"][0],
            "bytes": sizes[name],
            "removed": float(name.rpartition("-r")[2]),
        }
        for name, loss in (search or {}).items()
    ]
    evaluation = {**facts.evaluation, "search": tried or None}
    return dataclasses.replace(facts, planned=planned, evaluation=evaluation)


def test_every_measured_size_stands_on_the_curve_with_its_interval_and_the_limit(observed):
    facts = sized(
        synthetic.facts(rejected=True, observed=observed, losses={"reap-r0.5": 0.3, "random-r0.5": 0.4}),
        {"reap-r0.5": 4_000_000, "random-r0.5": 4_000_000, "reap-r0.25": 5_500_000, "reap-r0.125": 6_500_000},
        search={"reap-r0.25": 0.1, "reap-r0.125": 0.01},
    )
    kl, perplexity = size_curves(facts)
    reap, random, base = kl.data
    assert (reap["name"], random["name"]) == ("reap", "random")
    assert reap["x"] == [6.5, 5.5, 4.0] and reap["y"] == pytest.approx([0.007, 0.07, 0.21])
    assert reap["error_y"]["array"] == pytest.approx([0.002, 0.011, 0.031])
    assert (base["x"], base["y"]) == ([7.3], [0.0])
    assert [shape["y0"] for shape in kl.layout["shapes"]] == [0.05]
    assert reap["marker"]["color"] == ["--good", "--bad", "--bad"]
    assert kl.sentence.startswith("From 6.5 MB to 4 MB (base: 7.3 MB)") and "6.5 MB (reap-r0.125)" in kl.sentence
    assert [shape["y0"] for shape in perplexity.layout["shapes"]] == [1.05]
    assert {"size-kl-mean", "size-perplexity-ratio"} <= {getattr(block, "id", "") for block in blocks(run_page(facts))}


def test_one_size_makes_no_curve(finished):
    assert size_curves(finished) == []


def test_cuts_searched_on_the_confirm_rows_are_not_joined_with_those_of_other_rows(observed):
    facts = synthetic.facts(observed=observed, losses={"reap-r0.5": 0.01})
    [entry] = facts.evaluation["candidates"]
    worse = {"512": synthetic.groups(0.3, synthetic.SOURCES[:3])}
    evaluation = {
        **facts.evaluation,
        "verdict": "reject",
        "confirm": {**facts.evaluation["confirm"], "metrics": worse, "verdict": "reject"},
        "search": [{**entry, "name": "reap-r0.25", "bytes": 5_000_000, "metrics": {"512": synthetic.groups(0.1, ())}}],
    }
    cuts = measured_cuts(dataclasses.replace(facts, evaluation=evaluation), "kl_mean")
    assert [(cut.name, cut.measured["value"], cut.verdict) for cut in cuts] == [
        ("reap-r0.25", pytest.approx(0.07), "pass"),
        ("reap-r0.5", pytest.approx(0.21), "reject"),
    ]


def test_an_observation_of_few_rows_says_so(observed) -> None:
    nothing = {name: np.zeros_like(tensor) for name, tensor in observed.snapshots.items()}
    assert "Too few rows were read" in text(observation_page(dataclasses.replace(observed, snapshots=nothing)))


def test_an_observation_with_a_table_shows_its_cells(observed) -> None:
    page = observation_page(in_cells(observed))
    assert [block.id for block in blocks(page) if isinstance(block, Chart) and block.id == "regions"] == ["regions"]
