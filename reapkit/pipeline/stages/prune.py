"""prune: writes the checkpoint without the experts that the winning selection drops, file to file."""

from __future__ import annotations

from typing import Any

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.shard_reader import confirm_unchanged, record_of
from reapkit.pipeline.stages.context import Context
from reapkit.pipeline.stages.repair import load_repaired
from reapkit.planning import stage_disk
from reapkit.planning.plan import Plan
from reapkit.planning.stage_definitions import StageDefinition
from reapkit.pruning.checkpoint import prune_checkpoint, written_names
from reapkit.selection.selection import Selection


def run(context: Context) -> dict[str, Any]:
    from reapkit.pruning.layout_check import confirm_layout

    recipe, source, winner = context.recipe, context.plan.checkpoint, context.plan.winner
    assert winner is not None, "a stage runs once it has a key, and this one's names the winner"
    confirm_unchanged(source.path, record_of(context.plan.store.root, source.identity))
    selection = Selection.load(context.inputs["select"].payload / "candidates" / winner)
    confirm_layout(
        source,
        context.plan.layout,
        {
            index: selection.keep.get(index, tuple(range(layer.num_experts)))
            for index, layer in context.plan.layout.layers.items()
        },
    )
    written = prune_checkpoint(
        source,
        selection,
        context.payload,
        max_shard_bytes=recipe.output.max_shard_bytes,
        mtp=recipe.prune.mtp,
        layout=recipe.prune.layout,
        repaired=load_repaired(context, [winner]).get(winner),
        progress=context.progress,
    )
    context.hashes.update({name: shard["sha256"] for name, shard in written.shards.items()})
    pruned = Checkpoint.open(context.payload)
    return {
        "candidate": winner,
        "bytes": pruned.nbytes,
        "parameters": pruned.numel,
        "experts": {
            str(layer): len(chosen.keep) for layer, chosen in selection.decoder(source.architecture).layers.items()
        },
    }


def _content(plan: Plan) -> dict[str, Any] | None:
    return None if plan.winner is None else {"candidate": plan.winner, "model": plan.identities.model}


STAGE = StageDefinition(
    name="prune",
    version=2,
    run=run,
    writes=stage_disk.prune,
    shows=lambda plan: written_names(plan.checkpoint),
    directory="pruned",
    fields=("prune.mtp", "prune.repair", "prune.layout", "output.max_shard_bytes"),
    content=_content,
    inputs=lambda recipe: ("select", "repair"),
    waits_for=("evaluate",),
    resumes_in_place=True,
    makes_model=True,
)
