"""observe: runs the calibration through the model once and sums every expert's statistics per source."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reapkit.checkpoint.shard_reader import ShardHashes, record_of
from reapkit.observation.observation import Observation
from reapkit.pipeline.stages.context import Context
from reapkit.planning import stage_disk
from reapkit.planning.estimates import estimate
from reapkit.planning.plan import Plan
from reapkit.planning.stage_definitions import StageDefinition
from reapkit.selection.criteria.reap import REAP
from reapkit.selection.statistics import first_half, first_half_sentence

if TYPE_CHECKING:
    from reapkit.observation.job import Job


def run(context: Context) -> dict[str, Any]:
    started = time.time()
    checkpoint = context.plan.checkpoint
    job = _job(context)
    context.ranks.begin(job.as_json())
    with ShardHashes(checkpoint.path, record_of(context.plan.store.root, checkpoint.identity)) as hashes:
        observation = job.run(context.ranks, progress=context.progress, reading=hashes.begin)
        hashes.begin(checkpoint.shards)  # also those that a resumed run had no need to read
        hashes.keep()
    assert observation is not None, "rank 0 walks through the stages, and has what all ranks observed"
    observation.save(context.payload)
    _say_how_settled(context, observation)
    count = int(observation.tokens.sum())
    never = int((observation.statistics["count"].sum(1) == 0).sum())
    return {
        "tokens": count,
        "scored_tokens": int(observation.scored_tokens.sum()),
        "never_routed": never,
        "device": context.device,
        "placement": job.placement,
        "ranks": context.ranks.world,
        "tokens_per_second": round(count / max(time.time() - started, 1e-9)),
    }


def _say_how_settled(context: Context, observation: Observation) -> None:
    """At the counts that the recipe keeps: what the first half of the rows would have kept."""
    candidate = context.plan.candidates[0]
    kept = context.plan.kept(candidate)
    half = first_half(
        observation, {layer: kept.get(layer, observation.num_experts // 2) for layer in observation.layers}
    )
    if half is not None:
        ranked = "" if candidate.criterion == REAP.name else f"ranked by {REAP.name}, "  # what snapshots can follow
        context.progress.say(f"observe: at the budget of {candidate.name}, {ranked}{first_half_sentence(half)}")


def _job(context: Context) -> Job:
    """What every rank must know. Ranks on one machine share its memory."""
    from reapkit.observation.job import Job

    recipe, share = context.recipe, context.ranks.local_world
    own = context.plan.estimates if share == 1 else estimate(context.plan, share=share)
    directory = recipe.runtime.offload_directory
    return Job(
        model=str(context.model_directory.resolve()),
        calibration=str(context.inputs["calibrate"].payload.resolve()),
        work=str(context.work.resolve()),
        spec=recipe.observe,
        batch_tokens=recipe.runtime.batch_tokens,
        identity=context.plan.checkpoint.identity,
        device=context.device,
        placement=own.placement,
        trust_remote_code=recipe.model.trust_remote_code,
        checkpoint_minutes=recipe.runtime.checkpoint_minutes,
        hidden_bytes=own.host_budget,
        offload_directory=str(Path(directory).resolve()) if directory else None,
        mtp=context.plan.mtp,
    )


def spoken(summary: Mapping[str, Any]) -> str:
    """What the end of the stage says."""
    speed = "imported" if summary["tokens_per_second"] is None else f"{summary['tokens_per_second']:,} tokens/s"
    return f", {summary['tokens']:,} tokens, {speed}"


def _content(plan: Plan) -> dict[str, Any]:
    return {"model": plan.identities.model} | ({"mtp": list(plan.mtp)} if plan.mtp else {})


STAGE = StageDefinition(
    name="observe",
    version=2,
    run=run,
    writes=stage_disk.observe,
    shows=lambda plan: ("observation.safetensors", "observation.json", "trace.safetensors"),
    directory="observation",
    fields=("observe.eaft", "observe.entropy_top_k", "observe.reroute_tokens", "observe.trace_bytes"),
    content=_content,
    inputs=lambda recipe: ("calibrate",),
    wanted=lambda plan: plan.imported is None,
    remark=spoken,
)
