"""knockout: measures on sampled rows what the absence of each expert does to the model's own output."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from reapkit.pipeline.stages.context import Context
from reapkit.planning import stage_disk
from reapkit.planning.knockout_cost import measures_knockouts
from reapkit.planning.stage_definitions import StageDefinition


def run(context: Context) -> dict[str, Any]:
    from reapkit.evaluation.knockout.job import KnockoutJob

    started, recipe = time.time(), context.recipe
    job = KnockoutJob(
        model=str(context.model_directory.resolve()),
        calibration=str(context.inputs["calibrate"].payload.resolve()),
        work=str(context.work.resolve()),
        count=recipe.observe.knockout_tokens,
        batch_tokens=recipe.runtime.batch_tokens,
        identity=context.plan.checkpoint.identity,
        device=context.device,
        placement=context.plan.estimates.placement,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    context.ranks.begin(job.as_json())
    found = job.run(context.ranks, progress=context.progress)
    assert found is not None, "rank 0 walks through the stages, and has what all ranks measured"
    found.save(context.payload)
    layers, _, experts = found.kl.shape
    return {
        "rows": int(found.rows.sum()),
        "positions": int(found.positions.sum()),
        "tokens": found.meta["tokens"],
        "experts": layers * experts,
        "device": context.device,
        "placement": job.placement,
        "ranks": context.ranks.world,
        "seconds": round(time.time() - started, 3),
    }


def _spoken(summary: Mapping[str, Any]) -> str:
    """What the end of the stage says."""
    return f", {summary['experts']:,} experts on {summary['positions']:,} positions in {summary['rows']:,} rows"


STAGE = StageDefinition(
    name="knockout",
    version=1,
    run=run,
    writes=stage_disk.knockout,
    shows=lambda plan: ("knockouts.safetensors", "knockouts.json"),
    directory="knockout",
    fields=("observe.knockout_tokens",),
    content=lambda plan: {"model": plan.identities.model},
    inputs=lambda recipe: ("calibrate",),
    wanted=measures_knockouts,
    remark=_spoken,
)
