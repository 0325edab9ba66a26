"""select: decides from the observation which experts stay, without the model; one selection per candidate and
control."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reapkit.core.atomic_files import write_json
from reapkit.observation.observation import Observation
from reapkit.pipeline.stages.context import Context
from reapkit.planning import stage_disk
from reapkit.planning.stage_definitions import StageDefinition
from reapkit.selection.candidates import Candidate
from reapkit.selection.decide import select_all
from reapkit.selection.selection import Selection


def run(context: Context) -> dict[str, Any]:
    recipe, architecture = context.recipe, context.plan.checkpoint.architecture
    observation = load_observation(context)
    grid = context.plan.candidates
    chosen = dict(zip(grid, select_all(observation, recipe.saliency, recipe.prune, architecture, grid), strict=True))
    others = controls(grid, recipe.evaluate.controls)
    compared = (
        dict(
            zip(
                others, select_all(observation, recipe.saliency, recipe.prune, architecture, tuple(others)), strict=True
            )
        )
        if others
        else {}
    )
    for candidate, selection in (chosen | compared).items():
        selection.save(context.payload / "candidates" / candidate.name)
    if len(grid) == 1:
        chosen[grid[0]].save(context.payload)
    names = {
        "candidates": [candidate.name for candidate in chosen],
        "controls": {control.name: others[control] for control in compared},
    }
    write_json(context.payload / "index.json", names)
    for warning in dict.fromkeys(warning for selection in chosen.values() for warning in selection.warnings):
        context.progress.warn(f"select: {warning}")
    return names | {
        "dropped": {
            candidate.name: sum(len(layer.drop) for layer in selection.layers.values())
            for candidate, selection in chosen.items()
        }
    }


def load_observation(context: Context) -> Observation:
    """What the run observed, with the knock-outs where it measured them."""
    observation = Observation.load(context.inputs["observe"].payload)
    return (
        observation.with_knockouts(context.inputs["knockout"].payload) if "knockout" in context.inputs else observation
    )


def controls(grid: tuple[Candidate, ...], criteria: tuple[str, ...]) -> dict[Candidate, str]:
    """Each candidate's budget under other criteria: control -> the candidate it belongs to."""
    return {
        replace(candidate, name=f"{criterion}-beside-{candidate.name}", criterion=criterion): candidate.name
        for candidate in grid
        for criterion in criteria
        if criterion != candidate.criterion
    }


def load_selections(payload: Any, names: list[str]) -> dict[str, Selection]:
    """Selections by name, from the payload of select."""
    return {name: Selection.load(payload / "candidates" / name) for name in names}


STAGE = StageDefinition(
    name="select",
    version=2,
    run=run,
    writes=stage_disk.select,
    shows=lambda plan: ("index.json", "selection.json", "candidates/*/selection.json"),
    directory="selection",
    fields=(
        "saliency",
        "evaluate.controls",
        "prune.ratio",
        "prune.keep_ratio",
        "prune.keep_experts",
        "prune.candidates",
        "prune.allocation",
        "prune.layout",
        "prune.multiple_of",
        "prune.caps",
        "prune.protect",
        "prune.experts_per_token",
    ),
    content=lambda plan: {"own_criteria": plan.identities.criteria},
    inputs=lambda recipe: ("observe", "knockout"),
)
