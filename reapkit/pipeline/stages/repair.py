"""repair: re-fits the kept experts of every candidate and control, layer by layer, to make up for the dropped ones."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from reapkit.pipeline.stages.context import Context
from reapkit.pipeline.stages.select import load_selections
from reapkit.planning import stage_disk
from reapkit.planning.stage_definitions import StageDefinition
from reapkit.pruning.refitted_weights import RepairedWeights


def run(context: Context) -> dict[str, Any]:
    from reapkit.calibration.tokens import CalibrationTokens
    from reapkit.healing.refit import repair
    from reapkit.model.streaming.layers import LayeredModel

    index = context.inputs["select"].summary
    decided = load_selections(context.inputs["select"].payload, [*index["candidates"], *index["controls"]])
    selections = {name: selection.decoder(context.plan.checkpoint.architecture) for name, selection in decided.items()}
    layered = LayeredModel(
        context.model_directory, device=context.device, trust_remote_code=context.recipe.model.trust_remote_code
    )
    found = repair(
        layered,
        CalibrationTokens.load(context.inputs["calibrate"].payload),
        selections,
        context.payload,
        batch_tokens=context.recipe.runtime.batch_tokens,
        progress=context.progress,
        **context.streaming,
    )
    for name in index["candidates"]:
        _warn(context, name, found[name])
    return {"error_left": {name: _error_left(weights) for name, weights in found.items()}}


def _error_left(weights: RepairedWeights) -> dict[str, float | None]:
    """Means over the layers: what is left of the pruned layer's error on the rows that were fitted, and on those that
    only judged."""
    layers = weights.facts["layers"].values()
    return {part: fmean(layer[part] for layer in layers) if layers else None for part in ("fitted", "held_out")}


def _warn(context: Context, name: str, weights: RepairedWeights) -> None:
    unhelped = [layer for layer, facts in weights.facts["layers"].items() if facts["strength"] is None]
    if unhelped:
        context.progress.warn(
            f"repair: {name}: {len(unhelped)} of {len(weights.facts['layers'])} layers keep their original weights,"
            " since no fit reduced the error on held-out rows. Raise calibration.samples."
        )


def load_repaired(context: Context, names: list[str]) -> Mapping[str, RepairedWeights]:
    """The re-fitted weights of candidates by name; nothing where the recipe repairs nothing."""
    if "repair" not in context.inputs:
        return {}
    return {name: RepairedWeights.load(context.inputs["repair"].payload / name) for name in names}


STAGE = StageDefinition(
    name="repair",
    version=1,
    run=run,
    writes=stage_disk.repair,
    shows=lambda plan: ("*/repair.json", "*/layer-*.safetensors"),
    directory="repair",
    fields=("prune.repair",),
    content=lambda plan: {"model": plan.identities.model},
    inputs=lambda recipe: ("calibrate", "select"),
    wanted=lambda plan: plan.recipe.prune.repair is not None,
)
