"""quantize: quantizes the pruned checkpoint with llm-compressor and keeps the source's tensor names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.hashing import digest
from reapkit.pipeline.stages.context import Context
from reapkit.planning import stage_disk
from reapkit.planning.plan import Plan
from reapkit.planning.quantization_memory import quantize_memory
from reapkit.planning.stage_definitions import StageDefinition
from reapkit.pruning.checkpoint import written_names
from reapkit.pruning.manifest import read_manifest, seal
from reapkit.recipe.schema import Recipe


def _offload(context: Context) -> Path | None:
    """Where decoder layers wait for their turn, if the model does not stay in host memory."""
    needed = quantize_memory(context.plan)
    if needed is None or not needed.offloads:
        return None
    directory = context.recipe.runtime.offload_directory
    if directory is None:
        return context.work / "offload"
    # one name per artifact and store: what a killed run left there is found and removed
    return Path(directory) / f"{context.payload.parent.name}-{digest(str(context.payload.resolve()))[:6]}"


def run(context: Context) -> dict[str, Any]:
    from reapkit.calibration.tokens import CalibrationTokens
    from reapkit.quantization.checkpoint import quantize_checkpoint

    tokens = context.inputs.get("calibrate")
    facts = quantize_checkpoint(
        context.inputs["prune"].payload,
        context.payload,
        context.recipe.quantize,
        calibration=CalibrationTokens.load(tokens.payload) if tokens else None,
        device=context.device,
        work=context.work,
        progress=context.progress,
        batch_tokens=context.recipe.runtime.batch_tokens,
        max_shard_bytes=context.recipe.output.max_shard_bytes,
        offload=_offload(context),
        trust_remote_code=context.recipe.model.trust_remote_code,
    )
    pruned = read_manifest(context.inputs["prune"].payload)
    sealed = seal(
        context.payload,
        {name: pruned.get(name) for name in ("key", "source", "keep")}
        | {"scheme": facts["scheme"], "method": facts["method"]},
        context.progress,
    )
    context.hashes.update({name: shard["sha256"] for name, shard in sealed["shards"].items()})
    quantized = Checkpoint.open(context.payload)
    return {"bytes": quantized.nbytes, **facts}


def _wanted(plan: Plan) -> bool:
    return plan.recipe.quantize.scheme is not None or plan.recipe.quantize.recipe is not None


def _inputs(recipe: Recipe) -> tuple[str, ...]:
    """Rounding to nearest reads no calibration."""
    calibrated = recipe.quantize.method != "rtn" or recipe.quantize.recipe is not None
    return ("prune", "calibrate") if calibrated else ("prune",)


STAGE = StageDefinition(
    name="quantize",
    version=5,
    run=run,
    writes=stage_disk.quantize,
    shows=lambda plan: written_names(plan.checkpoint),
    directory="quantized",
    fields=("quantize", "output.max_shard_bytes"),
    inputs=_inputs,
    wanted=_wanted,
    makes_model=True,
)
