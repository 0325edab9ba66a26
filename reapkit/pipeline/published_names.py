"""The names under which a run shows its results, known before it runs: what is there under one of them and is not ours
would be in its way. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from reapkit.core.payload_files import files_below
from reapkit.planning.plan import Plan
from reapkit.planning.stage_definitions import Stage

FILES = ("recipe.resolved.yaml", "lock.json", "run.json", "run.failed.json", "report.rejected.html")
"""What a run writes beside its stages' results."""


def top_names(plan: Plan) -> tuple[str, ...]:
    """Of everything at the top of a run's directory, also of stages that this recipe leaves out."""
    directories = [definition.directory for definition in plan.definitions if definition.directory is not None]
    models = [f"{each.directory}.rejected" for each in plan.definitions if each.makes_model]
    files = [definition.file for definition in plan.definitions if definition.file is not None]
    return tuple(dict.fromkeys((*directories, *models, *files, *FILES)))


def inner_names(plan: Plan) -> dict[str, tuple[str, ...]]:
    """By directory the names of the files in it, relative to it: as they are where the stage is finished, else patterns
    of what it will write."""
    found = {}
    for stage in plan.stages:
        if stage.definition.directory is not None:
            names = tuple(_names(plan, stage))
            found[stage.definition.directory] = names
            if stage.definition.makes_model:
                found[f"{stage.definition.directory}.rejected"] = names
    return found


def is_planned(name: str, planned: tuple[str, ...]) -> bool:
    """Whether a file of this name, relative to its directory, would be in the way."""
    return any(fnmatchcase(name, pattern) for pattern in planned)


def _names(plan: Plan, stage: Stage) -> Iterator[str]:
    if stage.artifact is not None and stage.artifact.has_payload and not stage.must_run:
        yield from files_below(stage.artifact.payload)
    else:
        yield from stage.definition.shows(plan)
    if stage.definition.makes_model:
        yield "README.md"
