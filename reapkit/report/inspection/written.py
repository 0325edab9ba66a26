"""Checks every byte that reapkit wrote below a path: models, data of a run, artifacts of a store. Torch-free."""

from __future__ import annotations

from pathlib import Path

from reapkit.core.artifact_store import Artifact, artifact_in
from reapkit.core.as_written import artifact_around, artifact_damage, run_around, run_change
from reapkit.core.errors import UnusableError
from reapkit.core.formatting import plural
from reapkit.core.progress import SILENT, Progress
from reapkit.pruning.manifest import Finding, check_directory, written_directories


def check_written(path: Path, progress: Progress = SILENT) -> dict[Path, list[Finding]]:
    """Findings by directory: of the artifact or the run that `path` is, and of every model that it means.

    Raises UnusableError where reapkit wrote nothing there, or no record of it.
    """
    others = {**_of_artifact(path, progress), **_of_run(path)}
    try:
        models = written_directories(path)
    except UnusableError:
        if not others:
            raise
        models = []
    return others | {place: check_directory(place, progress) for place in models}


def _of_artifact(path: Path, progress: Progress) -> dict[Path, list[Finding]]:
    directory = artifact_around(path)
    if directory is None or path.resolve() not in (directory, directory / "payload"):
        return {}
    if (damage := artifact_damage(directory, full=True, progress=progress)) is not None:
        return {directory: [Finding("artifact", False, str(damage))]}
    found = artifact_in(directory)
    files = found.files if isinstance(found, Artifact) else None
    if files is None:
        return {directory: [Finding("artifact", True, "from an earlier reapkit, which listed no files")]}
    return {directory: [Finding("artifact", True, f"{plural(len(files), 'file')} as written")]}


def _of_run(path: Path) -> dict[Path, list[Finding]]:
    """The data beside the models; pages and cards may be changed."""
    run = run_around(path)
    if run is None or path.resolve() != run:
        return {}
    change = run_change(run, run, full=True)
    return {path: [Finding("data", change is None, change or "as the run wrote it")]}
