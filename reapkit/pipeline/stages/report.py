"""report: writes one page that shows the run, and the model cards."""

from __future__ import annotations

from typing import Any

from reapkit.core.atomic_files import write_text
from reapkit.pipeline.stages.context import Context
from reapkit.planning.stage_definitions import StageDefinition
from reapkit.report.card import model_card
from reapkit.report.facts import facts_from
from reapkit.report.run_report import write_run_report


def run(context: Context) -> dict[str, Any]:
    facts = facts_from(context.plan, context.inputs)
    write_run_report(facts, context.payload / "report.html")
    cards = [name for stage, name in (("prune", "pruned"), ("quantize", "quantized")) if stage in context.inputs]
    for name in cards if context.recipe.output.card else ():
        write_text(context.payload / f"{name}.md", model_card(facts, name))
    return {"cards": cards if context.recipe.output.card else []}


STAGE = StageDefinition(
    name="report",
    version=4,
    run=run,
    file="report.html",
    fields=("name", "description", "output.card"),
    content=lambda plan: {"source": plan.recipe.model.source},
    inputs=lambda recipe: ("calibrate", "observe", "select", "repair", "evaluate", "prune", "quantize", "verify"),
)
