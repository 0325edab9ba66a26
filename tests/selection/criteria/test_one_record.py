"""One record makes a criterion: schema, reference, plan, decision, report and card know it; nothing else names it."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator

import numpy as np
import pytest

from reapkit.checkpoint.architecture import Architecture
from reapkit.core.errors import RecipeError, UnusableError
from reapkit.observation.knockouts import Knockouts
from reapkit.observation.materials import EAFT_SIGNALS, MATERIALS
from reapkit.observation.observation import Observation, Reroute
from reapkit.pipeline.planned import make_plan
from reapkit.recipe.loading import load
from reapkit.report.card import model_card
from reapkit.report.page import render
from reapkit.report.run_report import run_page
from reapkit.selection.criteria.criterion import Criterion, Remarks
from reapkit.selection.criteria.registry import BUILTIN
from reapkit.selection.decide import select
from reapkit.selection.saliency import saliency
from tests.support import synthetic_report as synthetic
from tests.support.command import command
from tests.support.criteria import registered
from tests.support.house import House
from tests.support.observations import observe_routing, random_routing
from tests.support.paths import ROOT
from tests.support.specs import prune, saliency_spec

PACKAGE = ROOT / "reapkit"
MODULES = House(PACKAGE).modules
NAME = "largest-contribution"
HALF = {"ratio": 0.5, "protect": {"super_experts": False}}


@pytest.fixture
def added() -> Iterator[Criterion]:
    record = Criterion(
        name=NAME,
        summary="largest gate x norm of the expert's output",
        explanation="the largest g · ‖f(x)‖₂ over the positions routed to the expert",
        symbols="max gn",
        function=lambda evidence, spec: evidence.totals.gate_norm_max_scored,
        columns=("gate_norm_max_scored",),
        materials=(EAFT_SIGNALS,),
        citations=("@article{largest2026,\n  title={The Largest Contribution}\n}",),
        remarks=lambda evidence, spec, kept, kept_by: Remarks(
            {
                "changed_by_negation": sum(
                    len(set(kept[layer]) - set(other))
                    for layer, other in kept_by(-BUILTIN[NAME].saliency(evidence, spec)).items()
                )
            },
            ["the largest contribution was one token's."],
        ),
    )
    with registered(record):
        yield record
    assert NAME not in BUILTIN


def test_schema_and_reference_offer_it(added: Criterion) -> None:
    line = "max gn: largest gate x norm of the expert's output."
    schema = command("schema").json()
    assert {"const": NAME, "description": line} in schema["$defs"]["criterion"]["anyOf"]
    for section in ("SaliencySpec", "CandidatesSpec", "EvaluateSpec"):
        assert json.dumps(schema["$defs"][section]).count('"#/$defs/criterion"') == 1, section
    assert f"| `{NAME}` | {line} |" in command("schema", "--markdown").stdout


def test_a_plan_takes_it_by_name_and_refuses_it_where_the_observation_would_lack_what_it_needs(
    added: Criterion, tmp_path
) -> None:
    demo = ROOT / "recipes/demo.yaml"
    store = f"runtime.store={tmp_path}"
    assert make_plan(load(demo, [store, f"saliency.criterion={NAME}"])).candidates[0].criterion == NAME
    for place in (
        "saliency.criterion={}",
        "evaluate.controls=[{}]",
        "prune={{candidates: {{criterion: [{}]}}, ratio: 0.5}}",
    ):
        with pytest.raises(
            RecipeError,
            match=(
                rf": {NAME} is measured during the observation, but observe.eaft is false. Set it to"
                r" true.$"
            ),
        ):
            make_plan(load(demo, [store, "observe.eaft=false", place.format(NAME)]))
    with pytest.raises(RecipeError, match=f"found 'largest-contributions'.* Known: .*, {NAME}, .* mean '{NAME}'"):
        make_plan(load(demo, [store, "saliency.criterion=largest-contributions"]))


def test_decision_report_and_card_follow_it(added: Criterion) -> None:
    observed = synthetic.observation()
    architecture = Architecture("qwen3_moe", len(observed.layers), observed.num_experts, 2)
    decision = select(observed, saliency_spec(NAME), prune(**HALF), architecture)
    largest = observed.maxima["gate_norm_max_scored"].max(1)
    for row, layer in enumerate(decision.layers.values()):
        assert min(largest[row, list(layer.keep)]) >= max(largest[row, list(layer.drop)])
    assert decision.criterion == NAME and decision.details["formula"] == "max gn"
    assert decision.details["changed_by_negation"] == sum(len(layer.keep) for layer in decision.layers.values())
    assert "the largest contribution was one token's." in decision.warnings
    facts = synthetic.facts(observed=observed)
    facts = dataclasses.replace(facts, selections=dict.fromkeys(facts.selections, decision))
    words = re.sub(r"<(style|script)\b.*?</\1>", "", render(run_page(facts)), flags=re.S)
    assert f"{NAME}: max gn" in words and f"Saliency here is max gn ({NAME})." in words
    assert f"the decision of {NAME} cannot be recomputed from sums alone" in words
    card = model_card(facts, "pruned")
    assert f"a saliency by `{NAME}` (`max gn`): the largest g · ‖f(x)‖₂ over" in card
    assert f"- {NAME}\n" in card and "@article{largest2026" in card and "2510.13999" not in card


def test_what_the_observation_lacks_is_said(added: Criterion) -> None:
    observed = synthetic.observation()
    architecture = Architecture("qwen3_moe", len(observed.layers), observed.num_experts, 2)
    untraced = dataclasses.replace(observed, eaft=None)
    without = {name: values for name, values in observed.maxima.items() if name != "gate_norm_max_scored"}
    for lacking, message in (
        (untraced, f"saliency.criterion: {NAME} needs EAFT signals, but this observation has none"),
        (dataclasses.replace(observed, maxima=without), "this observation has no gate_norm_max_scored"),
    ):
        with pytest.raises(UnusableError, match=message):
            select(lacking, saliency_spec(NAME), prune(**HALF), architecture)


ELSEWHERE = {
    ("recipe.schema", "reap"): "the default of saliency.criterion",
    ("selection.foreign_formats", "reap"): "a column of another program's files",
    ("observation.materials", "reroute"): "the attribute of an observation that holds its paths",
    ("observation.reroute_sample", "reroute"): "the progress of sampling",
    ("report.inspection.observation", "reroute"): "a fact of an observation",
    ("report.reroute_section", "reroute"): "the section of a page",
    ("report.cut_sections", "random"): "a line to compare a cut with",
    ("evaluation.knockout.job", "knockout"): "what other ranks are asked for",
    ("evaluation.knockout.resident", "knockout"): "the progress of measuring",
    ("observation.materials", "knockout"): "the attribute of an observation that holds them, and the stage",
    ("observation.observation", "knockout"): "the folder beside an observation",
    ("pipeline.stages.evaluate", "knockout"): "a stage",
    ("pipeline.stages.knockout", "knockout"): "a stage",
    ("pipeline.stages.report", "knockout"): "a stage",
    ("pipeline.stages.select", "knockout"): "a stage",
    ("planning.plan", "knockout"): "a stage",
    ("report.facts", "knockout"): "a stage",
}
"""(module, string) -> what else the string names there."""


def test_no_other_module_spells_a_criterions_name() -> None:
    """Whole strings for every name; names that are no English word also within a longer text."""
    unmistakable = re.compile("|".join(rf"(?<![\w-]){re.escape(name)}(?![\w-])" for name in BUILTIN if "-" in name))
    found = set()
    for module, path in MODULES.items():
        short = module.removeprefix("reapkit.")
        if path.is_relative_to(PACKAGE / "selection" / "criteria") or short.startswith("calibration.builtin."):
            continue  # the records themselves; words and snippets of generated text
        tree = ast.parse(path.read_text())
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                names = {node.value} & BUILTIN.keys() | set(unmistakable.findall(node.value))
                found |= {(short, name) for name in names}
    assert found == ELSEWHERE.keys()


def test_each_name_stands_in_one_record_module() -> None:
    modules = [path for path in MODULES.values() if path.is_relative_to(PACKAGE / "selection" / "criteria")]
    for name in BUILTIN:
        assert sum(f'"{name}"' in path.read_text() for path in modules) == 1, name


def observe_with_paths() -> Observation:
    """Two layers with removal paths and knock-outs, one without, and an exact trace."""
    draw = np.random.default_rng(0)
    order = np.stack([draw.permuted(np.tile(np.arange(8), (4, 1)), axis=1) for _ in range(3)])
    order[2] = -1
    paths = Reroute(np.array([30, 10]), order, np.sort(draw.random((3, 4, 8))), draw.random((3, 2, 8)))
    kl = draw.random((2, 2, 8))
    knockouts = Knockouts((0, 1), ("code", "tools"), [4, 4], [30, 30], kl, kl**2, draw.random((2, 2)) / 2)
    return dataclasses.replace(observe_routing(random_routing(0, tokens=600)), reroute=paths, knockout=knockouts)


@pytest.mark.parametrize("name", BUILTIN)
def test_a_record_names_the_columns_that_it_reads_and_the_materials_that_it_needs(name: str) -> None:
    observed = observe_with_paths()
    record, spec = BUILTIN[name], saliency_spec(name)
    assert set(record.columns) <= observed.statistics.keys() | observed.maxima.keys()
    kept = {"count", *record.columns}
    bare = dataclasses.replace(
        observed,
        statistics={column: values for column, values in observed.statistics.items() if column in kept},
        maxima={column: values for column, values in observed.maxima.items() if column in kept},
        coactivation=None,
        snapshots={},
        **{material.field: None for material in MATERIALS if material not in record.materials},
    )
    assert np.array_equal(saliency(bare, spec), saliency(observed, spec))
    for column in record.columns:
        less = {kind: values for kind, values in bare.statistics.items() if kind != column}
        with pytest.raises(UnusableError, match=f"this observation has no {column}"):
            saliency(dataclasses.replace(bare, statistics=less), spec)
    for material in record.materials:
        with pytest.raises(UnusableError, match=f"{name} needs {material.what}"):
            saliency(dataclasses.replace(bare, **{material.field: None}), spec)
