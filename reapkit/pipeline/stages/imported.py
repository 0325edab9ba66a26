"""observe, for an observation that was made elsewhere: copies its files unchanged."""

from __future__ import annotations

from typing import Any

from reapkit.core.atomic_files import copy_file
from reapkit.observation.external import ImportedObservation
from reapkit.pipeline.stages.context import Context
from reapkit.pipeline.stages.observe import spoken
from reapkit.planning.disk_use import STORE, DiskUse, on_disk
from reapkit.planning.plan import Plan
from reapkit.planning.stage_definitions import StageDefinition


def run(context: Context) -> dict[str, Any]:
    imported = _imported(context.plan)
    for file in imported.files:
        copy_file(file, context.payload / file.name)  # no link: they are the user's, who may edit them
    context.progress.warn(f"observe: {imported.differences([entry.name for entry in context.recipe.calibration.mix])}")
    facts = imported.facts
    return {
        "tokens": sum(facts["tokens"]),
        "scored_tokens": sum(facts["scored_tokens"]),
        "device": facts["meta"].get("device"),
        "placement": facts["meta"].get("placement"),
        "tokens_per_second": None,
        "imported": {
            "directory": str(imported.directory),
            "content": imported.content,
            "sources": dict(zip(facts["sources"], facts["scored_tokens"], strict=True)),
        },
    }


def _imported(plan: Plan) -> ImportedObservation:
    assert plan.imported is not None, "the stage belongs to plans with an imported observation"
    return plan.imported


def _writes(plan: Plan) -> tuple[DiskUse, ...]:
    size = sum(on_disk(file.stat().st_size) for file in _imported(plan).files)
    return (DiskUse(STORE, size, linked=size, is_exact=True),)


STAGE = StageDefinition(
    name="observe",
    version=1,
    run=run,
    writes=_writes,
    shows=lambda plan: ("observation.safetensors", "observation.json", "trace.safetensors"),
    directory="observation",
    content=lambda plan: {"imported": _imported(plan).content, "model": plan.identities.model},
    wanted=lambda plan: plan.imported is not None,
    remark=spoken,
)
