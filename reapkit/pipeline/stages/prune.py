"""prune: the winning selection is cut out of the checkpoint, files to files."""

from __future__ import annotations

from typing import Any

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.shard_reader import confirm_unchanged, record_of
from reapkit.pipeline.stages.context import Context
from reapkit.pipeline.stages.repair import load_repaired
from reapkit.planning.plan import store_of
from reapkit.pruning.checkpoint import prune_checkpoint
from reapkit.pruning.layout_check import confirm_layout
from reapkit.selection.selection import Selection


def run(context: Context) -> dict[str, Any]:
    recipe, source = context.recipe, context.plan.checkpoint
    confirm_unchanged(source.path, record_of(store_of(recipe).root, source.identity))
    selection = Selection.load(context.inputs["select"].payload / "candidates" / context.candidate)
    confirm_layout(
        source,
        context.plan.layout,
        {
            index: selection.keep.get(index, tuple(range(layer.num_experts)))
            for index, layer in context.plan.layout.layers.items()
        },
    )
    prune_checkpoint(
        source,
        selection,
        context.payload,
        max_shard_bytes=recipe.output.max_shard_bytes,
        mtp=recipe.prune.mtp,
        layout=recipe.prune.layout,
        repaired=load_repaired(context, [context.candidate]).get(context.candidate),
        progress=context.progress,
    )
    pruned = Checkpoint.open(context.payload)
    return {
        "candidate": context.candidate,
        "bytes": pruned.nbytes,
        "parameters": pruned.numel,
        "experts": {
            str(layer): len(chosen.keep) for layer, chosen in selection.decoder(source.architecture).layers.items()
        },
    }
