"""packs: prepares held-out rows of the same sources, disjoint from the calibration by content, at every row length of
the recipe."""

from __future__ import annotations

from typing import Any

from reapkit.pipeline.stages.calibrate import shares, tokenizer_of_rows
from reapkit.pipeline.stages.context import Context
from reapkit.planning import stage_disk
from reapkit.planning.stage_definitions import StageDefinition


def run(context: Context) -> dict[str, Any]:
    from reapkit.calibration.prepare import prepare_packs

    recipe, found = context.recipe, {}
    for length in recipe.evaluate.packs.lengths:
        with context.sample_cache() as cache:
            summary = prepare_packs(
                context.plan.calibration,
                context.plan.evaluation,
                length,
                context.inputs["calibrate"].payload,
                context.model_directory,
                context.plan.loaded.directory,
                context.payload / str(length),
                context.progress,
                work=cache,
                trust_remote_code=recipe.model.trust_remote_code,
            )
        found[str(length)] = shares(summary)
    return found


STAGE = StageDefinition(
    name="packs",
    version=2,
    run=run,
    writes=stage_disk.packs,
    shows=lambda plan: tuple(
        f"{length}/{file}"
        for length in plan.recipe.evaluate.packs.lengths
        for file in ("tokens.safetensors", "calibration.json")
    ),
    directory="packs",
    fields=("evaluate.packs", "evaluate.extra_packs"),
    content=lambda plan: {
        "extra_sources": plan.identities.extra_sources,
        **tokenizer_of_rows(plan, plan.identities.extra_sources),
    },
    inputs=lambda recipe: ("calibrate",),
)
