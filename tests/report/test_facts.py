"""Facts come from the plan and the artifacts' small files alone."""

from __future__ import annotations

import json

import pytest

from reapkit.core.artifact_store import Artifact
from reapkit.pipeline.planned import make_plan
from reapkit.recipe.loading import load
from reapkit.report.facts import facts_from, license_of, recipe_yaml
from reapkit.report.run_report import unfinished_report
from tests.support import synthetic_report as synthetic


@pytest.fixture
def plan(tmp_path):
    return make_plan(load("demo", [f"runtime.store={tmp_path / 'store'}", "prune.ratio=0.25"]))


def artifact(root, stage: str, summary: dict, files: dict[str, dict], key: str = "k" * 64) -> Artifact:
    payload = root / stage / "payload"
    payload.mkdir(parents=True)
    for name, content in files.items():
        (payload / name).write_text(json.dumps(content))
    return Artifact(
        stage,
        key,
        root / stage,
        {
            "summary": summary,
            "seconds": 2.5,
            "warnings": [f"{stage}: look"],
            "versions": {"torch": "2.13.0"},
            "finished": "2026-01-01T00:00:00Z",
        },
    )


def artifacts(plan, root) -> dict[str, Artifact]:
    observed = synthetic.observation(experts=32)
    name = plan.candidates[0].name
    made = {
        "observe": artifact(root, "observe", {}, {}),
        "select": artifact(root, "select", {"candidates": [name]}, {}),
        "evaluate": artifact(
            root,
            "evaluate",
            {"chosen": name, "verdict": "reject", "advice": "prune less"},
            {"evaluation.json": synthetic.evaluation({name: 0.4}, observed.sources)},
        ),
    }
    observed.save(made["observe"].payload)
    synthetic.selection(observed, 8).save(made["select"].payload / "candidates" / name)
    return made


def test_facts_of_a_run_that_its_gates_stopped(plan, tmp_path):
    made = artifacts(plan, tmp_path)
    facts = facts_from(plan, made)
    assert facts.chosen == plan.candidates[0].name and facts.selection.criterion == "reap"
    assert facts.outcome.word == "reject"
    assert facts.stopped and facts.verification == {} == facts.quantization
    assert (
        set(facts.planned[facts.chosen].experts.values()) == {24}
        and facts.planned[facts.chosen].nbytes < facts.base.nbytes
    )
    assert [stage.name for stage in facts.stages if stage.state == "not reached"][-3:] == [
        "prune",
        "quantize",
        "verify",
    ]
    assert facts.warnings == ("observe: look", "select: look", "evaluate: look") and facts.versions == {
        "torch": "2.13.0"
    }
    assert facts.hub_datasets == () and not facts.model.hub


def test_the_command_repeats_the_overrides(plan):
    assert facts_from(plan, {}).command.startswith("reapkit apply demo --set prune.ratio=0.25 --set runtime.store=/")


def test_a_rejected_run_gets_its_page(plan, tmp_path):
    assert b"Rejected by its gates" in unfinished_report(plan, artifacts(plan, tmp_path))


def test_the_resolved_recipe_loads_as_the_same_recipe(tmp_path):
    recipe = load("demo", ["prune.candidates={ratio: [0.5, 0.25]}", "saliency.mix={code: 0.7, tools: 0.3}"])
    (tmp_path / "resolved.yaml").write_text(recipe_yaml(recipe))
    assert load(tmp_path / "resolved.yaml").model_dump() == recipe.model_dump()


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n# Hi", "mit"),
        ("# Hi\n---\nlicense: mit\n---\n", None),
        ("---\n: [\n---\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
    ],
)
def test_the_license_is_what_the_base_models_card_says(card, expected, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert license_of(tmp_path) == expected
    assert license_of(tmp_path / "nowhere") is None
