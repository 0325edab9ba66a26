"""Whether what a command is given is still what reapkit wrote there: an artifact of a store, or files of a run.
Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reapkit.core.artifact_check import check
from reapkit.core.artifact_store import MANIFEST, Artifact, Damage, artifact_in
from reapkit.core.errors import UnusableError
from reapkit.core.progress import SILENT, Progress
from reapkit.core.run_record import RECORD, changed_file

RESULTS = ("calibration", "packs", "observation", "selection", "repair", "evaluation", "verify.json")
RUN_DATA = ("run.json", "recipe.resolved.yaml", *RESULTS)
"""What commands read of a run; pages, cards and models are the user's to change, and `verify` tells."""


def require_as_written(place: Path) -> None:
    """Raises UnusableError where `place` is, or lies in, an artifact that is damaged or a run whose files there were
    changed. Checks as a run does: large files by size and time."""
    if (directory := artifact_around(place)) is not None and (damage := artifact_damage(directory)) is not None:
        raise UnusableError(
            f"{directory}: the artifact is damaged: {damage}. Apply its recipe again, which makes it anew."
        )
    if (run := run_around(place)) is not None and (change := run_change(run, place)) is not None:
        raise UnusableError(
            f"{run}: {change}. Delete what is there of it and apply the run's recipe again, which writes it anew. If"
            " the change is yours, copy the directory elsewhere and give the copy."
        )


def artifact_around(place: Path) -> Path | None:
    """The artifact's directory that `place` is or lies in, or None."""
    for directory in (place.resolve(), *place.resolve().parents):
        if (directory / MANIFEST).is_file() and (directory / "payload").is_dir():
            return directory
    return None


def artifact_damage(directory: Path, *, full: bool = False, progress: Progress = SILENT) -> Damage | None:
    """What is wrong with the artifact in that directory, or None."""
    found = artifact_in(directory)
    return check(found, full=full, progress=progress) if isinstance(found, Artifact) else found


def run_around(place: Path) -> Path | None:
    """The run's directory that `place` is or lies in, or None."""
    return next((each for each in (place.resolve(), *place.resolve().parents) if (each / RECORD).is_file()), None)


def run_change(run: Path, place: Path, *, names: Sequence[str] = RUN_DATA, full: bool = False) -> str | None:
    """What differs from what the run wrote, of the data at or below `place`, or None."""
    below = place.resolve().relative_to(run).as_posix()
    if below == ".":
        changes = (changed_file(run, name, full=full) for name in names)
        return next((change for change in changes if change is not None), None)
    return changed_file(run, below, full=full) if below.partition("/")[0] in names else None
