"""Recognises what a path is, by the files that only this kind has. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reapkit.core.as_written import require_as_written
from reapkit.core.errors import RecipeError, UnusableError
from reapkit.core.json_text import parse_json
from reapkit.recipe.loading import find_recipe

MARKS = {
    "run.json": "run",
    "evaluation.json": "evaluation",
    "verify.json": "verification",
    "calibration.json": "calibration",
    "observation.json": "observation",
    "selection.json": "selection",
    "config.json": "checkpoint",
}
"""The file that says what a directory is; the first that is there decides, so that a run comes before what it holds."""
LOOKED_FOR = (
    "a recipe (.yaml), a run (run.json), a calibration or packs (calibration.json), an observation (observation.json),"
    " a selection (selection.json), an evaluation (evaluation.json), a verification (verify.json), a checkpoint"
    " (config.json), a store artifact (manifest.json)"
)


@dataclass(frozen=True)
class Found:
    """What a path is: `kind` names a module of this package, `place` is what it reads.

    In a store, `artifact` says how it was made; `kind` is None where the payload is gone or says nothing more.
    """

    kind: str | None
    place: Path
    artifact: Mapping[str, Any] | None = None


def recognise(path: str | Path) -> Found:
    """Raises RecipeError where nothing lies at `path`, UnusableError where it is none of the kinds, unfinished, or not
    what reapkit wrote there."""
    place = Path(path)
    if place.is_dir():
        require_as_written(place)
        return _artifact(place) if _is_artifact(place) else _directory(place)
    if place.is_file():
        found = _file(place)
        if found.kind != "recipe":
            require_as_written(found.place)
        return found
    try:
        return Found("recipe", find_recipe(str(path)))
    except RecipeError as error:
        raise RecipeError(
            f"{path}: no such file or directory. Give {LOOKED_FOR}, or a shipped recipe's name.\n{error}"
        ) from None


def observation_at(path: str | Path) -> Path:
    """The directory with an observation's files: `path` itself, its artifact's payload, or what a run links to.

    Raises UnusableError where there is none.
    """
    found = recognise(path)
    place = found.place / "observation" if found.kind == "run" else found.place
    if found.kind not in ("run", "observation") or not (place / "observation.json").is_file():
        raise UnusableError(
            f"{path}: found no observation. Give an observation's directory, its artifact in the store, or a run that"
            " has one."
        )
    return place


def _file(file: Path) -> Found:
    if file.suffix in (".yaml", ".yml"):
        return Found("recipe", file)
    if file.name == "manifest.json":
        return recognise(file.parent)
    kind = MARKS.get(file.name)
    if kind is None:
        raise UnusableError(f"{file}: unknown kind of file. Known are {LOOKED_FOR}.")
    return Found(kind, file if kind == "selection" else file.parent)


def _directory(directory: Path) -> Found:
    kind = _kind(directory)
    if kind is None:
        names = sorted(entry.name for entry in directory.iterdir())
        if stored := [name for name in names if _is_artifact(directory / name)]:
            raise UnusableError(
                f"{directory}: a store of {len(stored)} artifacts. Inspect one of them, such as"
                f" {directory / stored[0]}."
            )
        holds = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "nothing"
        raise UnusableError(f"{directory}: unknown kind of directory (it holds {holds}). Known are {LOOKED_FOR}.")
    return Found(kind, directory)


def _kind(directory: Path) -> str | None:
    for name, kind in MARKS.items():
        if (directory / name).is_file():
            return kind
    if any(directory.glob("*/calibration.json")):
        return "packs"
    return "selection" if (directory / "index.json").is_file() and (directory / "candidates").is_dir() else None


def _is_artifact(directory: Path) -> bool:
    return (directory / "manifest.json").is_file() or any((directory / name).is_dir() for name in ("payload", "work"))


def _artifact(directory: Path) -> Found:
    if not (directory / "manifest.json").is_file():
        raise UnusableError(
            f"{directory}: the artifact is unfinished (it has no manifest). Run its recipe again to finish it, then"
            " inspect."
        )
    manifest = read_json(directory / "manifest.json", ("stage", "key", "seconds", "finished", "summary", "warnings"))
    payload = directory / "payload"
    there = payload.is_dir()
    files = sum(file.stat().st_size for file in payload.rglob("*") if file.is_file()) if there else None
    made = {name: manifest[name] for name in ("stage", "key", "finished", "seconds", "summary", "warnings")} | {
        "bytes": files
    }
    return Found(
        _kind(payload) if there else None,
        payload if there else directory,
        made | {"inputs": manifest.get("inputs", {})},
    )


def read_json(file: Path, needed: Iterable[str] = ()) -> dict[str, Any]:
    """The JSON object in `file`. Raises UnusableError where it is none or lacks one of `needed`."""
    try:
        data = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnusableError(
            f"{file}: the file cannot be read as JSON ({error}). Run the stage that wrote it again."
        ) from None
    if not isinstance(data, dict):
        raise UnusableError(
            f"{file}: found a JSON {type(data).__name__}, but a JSON object is needed. Run the stage"
            " that wrote it again."
        )
    if missing := [name for name in needed if name not in data]:
        raise UnusableError(
            f"{file}: the keys {', '.join(missing)} are missing, so the file is damaged or of another version. Run the"
            " stage that wrote it again."
        )
    return data
