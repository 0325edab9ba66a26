"""Stages are records: every recipe field belongs to a stage's key or to none, and a stage is added by one record."""

from __future__ import annotations

import errno
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from reapkit.core.errors import RecipeError, StageFailed
from reapkit.pipeline.run import walk
from reapkit.pipeline.stages.context import Context
from reapkit.pipeline.stages.every_stage import STAGES
from reapkit.planning.plan import Plan, make_plan
from reapkit.planning.stage_definitions import NEVER_KEYED, StageDefinition, fields_of
from reapkit.recipe.loading import load
from reapkit.recipe.schema import Recipe
from reapkit.report.facts import facts_from
from reapkit.report.run_report import run_page
from reapkit.report.tables import plan_as_json


def leaves(model: type[BaseModel], place: str = "") -> Iterator[str]:
    """The dotted path of every field that is not a section; fields of a list's items stand under the list."""
    for name, field in model.model_fields.items():
        path = f"{place}.{name}" if place else name
        inner = [kind for kind in models_in(field.annotation) if kind is not model]
        yield from [found for kind in inner for found in leaves(kind, path)] if inner else [path]


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in typing.get_args(annotation) for kind in models_in(part)]


def under(path: str, section: str) -> bool:
    return path == section or path.startswith(f"{section}.")


KEYED = {field for stage in STAGES for field in stage.fields}


@pytest.mark.parametrize("leaf", leaves(Recipe))
def test_every_field_enters_a_key_or_none(leaf: str) -> None:
    readers = [field for field in KEYED if under(leaf, field)]
    never = [field for field in NEVER_KEYED if under(leaf, field)]
    by_content = under(leaf, "model.trust_remote_code") or under(leaf, "model.source")
    assert bool(readers) != bool(never) or (by_content and not readers), (
        f"{leaf}: list it in the `fields` of the stages that read it, or in NEVER_KEYED"
    )


@pytest.mark.parametrize("field", sorted({*KEYED, *NEVER_KEYED}))
def test_every_listed_field_exists(field: str) -> None:
    assert any(under(leaf, field) for leaf in leaves(Recipe))


def test_fields_are_the_recipes_own_values() -> None:
    recipe = load("demo")
    assert fields_of(recipe, ("prune.ratio", "quantize.group_size")) == {
        "prune.ratio": "0.5",
        "quantize.group_size": 64,
    }
    with pytest.raises(KeyError):
        fields_of(recipe, ("prune.no_such_field",))


# ---------------------------------------------------------------------------------------------- one record adds a stage


def count_letters(context: Context) -> dict[str, Any]:
    """A made-up stage: how long the recipe's description is, and how many experts the selection drops."""
    (context.payload / "letters.txt").write_text(str(len(context.recipe.description)))
    return {"dropped": context.inputs["select"].summary["dropped"]}


def said(summary: Mapping[str, Any]) -> str:
    return f", {sum(summary['dropped'].values())} experts fewer"


LETTERS = StageDefinition(
    name="letters",
    version=1,
    run=count_letters,
    directory="letters",
    fields=("description",),
    content=lambda plan: {"experts": plan.checkpoint.architecture.num_experts},
    inputs=lambda recipe: ("select", "no-such-stage"),
    remark=said,
)


def planned(tmp_path: Path, *overrides: str) -> Plan:
    small = ("calibration.samples=16", "calibration.max_length=256", "evaluate.packs={samples: 4, lengths: [256]}")
    where = (f"runtime.store={tmp_path / 'store'}", f"output.directory={tmp_path / 'run'}")
    return make_plan(load("demo", (*small, *where, *overrides)), (*STAGES, LETTERS))


def test_a_stage_is_one_record(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert plan.stage("letters").inputs == ("select",)
    assert plan.leading_to("letters") == ("calibrate", "observe", "select", "letters")
    assert "letters" in [stage["stage"] for stage in plan_as_json(plan)["stages"]]
    assert plan.stage("letters").key != planned(tmp_path, "description=another").stage("letters").key
    assert plan.stage("letters").key == planned(tmp_path, "quantize.group_size=32").stage("letters").key
    run = walk(plan, until="letters")
    assert run.executed == ["calibrate", "observe", "select", "letters"]
    assert (tmp_path / "run/letters/letters.txt").read_text() == str(len(plan.recipe.description))
    assert run.plan.stage("letters").definition.remark(run.summary("letters")) == ", 64 experts fewer"
    page = run_page(facts_from(run.plan, run.artifacts))
    shown = next(section for section in page.sections if section.id == "stages")
    assert "letters" in str(shown)
    again = walk(planned(tmp_path), until="letters")
    assert again.executed == []


def test_a_stage_that_waits_for_a_verdict_has_no_key_until_then(tmp_path: Path) -> None:
    plan = planned(tmp_path, "prune={candidates: {ratio: [0.5, 0.25]}}")
    assert plan.winner is None and plan.stage("prune").key is None and plan.stage("quantize").key is None
    decided = plan.decided(plan.candidates[1].name)
    assert decided.stage("prune").spec["candidate"] == plan.candidates[1].name
    assert decided.stage("select").key == plan.stage("select").key
    assert decided.checkpoint is plan.checkpoint and decided.machine is plan.machine


def test_placement_is_decided_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tmp_path)
    monkeypatch.setattr("reapkit.planning.estimates._host_free", lambda: 1)
    assert plan.decided(plan.candidates[0].name).estimates.placement == plan.estimates.placement == "resident"
    assert planned(tmp_path).estimates.placement == "streaming"


def test_a_copied_recipe_keeps_its_place_and_its_values(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n')
    text = "version: 1\nname: own\nmodel: {source: builtin:demo}\nprune: {ratio: 0.5}\nquantize: {scheme: null}\n"
    text += "calibration: {samples: 1, mix: [{name: rows, source: rows.jsonl}]}\n"
    (tmp_path / "own.yaml").write_text(text)
    recipe = load(tmp_path / "own.yaml")
    changed = recipe.model_copy(update={"description": "changed"})
    assert changed.directory == tmp_path and changed.description == "changed" and recipe.description == ""
    assert make_plan(changed, STAGES).recipe.description == "changed"
    with pytest.raises(RecipeError, match=r"own\.yaml"):
        raise changed.located(RecipeError([changed.problem("prune.ratio", "is wrong.")]))


def test_a_disk_that_stays_full_does_not_hide_why_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "No space left on device", "rows")

    monkeypatch.setattr("reapkit.pipeline.run_directory.write_bytes", full)
    filling = StageDefinition(name="filling", version=1, run=full, directory="filling")
    where = (f"runtime.store={tmp_path / 'store'}", f"output.directory={tmp_path / 'run'}")
    with pytest.raises(StageFailed, match="filling: rows: No space left on device"):
        walk(make_plan(load("demo", where), (filling, *STAGES)), until="filling")
