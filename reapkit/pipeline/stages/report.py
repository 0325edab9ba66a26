"""report: writes one page that shows the run, and the model cards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reapkit.core.atomic_files import write_text
from reapkit.pipeline.stages.context import Context
from reapkit.planning import stage_disk
from reapkit.planning.stage_definitions import StageDefinition
from reapkit.report.card import WrittenModel, model_card
from reapkit.report.facts import facts_from
from reapkit.report.run_report import write_run_report

MODELS: Mapping[str, WrittenModel] = {"prune": "pruned", "quantize": "quantized"}
"""The stages that make a model, and what is made."""


def run(context: Context) -> dict[str, Any]:
    facts = facts_from(context.plan, context.inputs)
    write_run_report(facts, context.payload / "report.html")
    cards: list[WrittenModel] = [
        name for stage, name in MODELS.items() if stage in context.inputs and context.recipe.output.card
    ]
    for name in cards:
        write_text(context.payload / f"{name}.md", model_card(facts, name))
    return {"cards": cards}


STAGE = StageDefinition(
    name="report",
    version=9,
    run=run,
    writes=stage_disk.report,
    file="report.html",
    fields=("name", "description", "output.card"),
    content=lambda plan: {"source": plan.recipe.model.source},
    inputs=lambda recipe: (
        "calibrate",
        "observe",
        "knockout",
        "select",
        "repair",
        "evaluate",
        "prune",
        "quantize",
        "verify",
    ),
)
