"""Finds the artifacts of a store that no run uses any more, and removes them. Torch-free.

A run is entered in `<store>/runs/` before it relies on an artifact, and stays there as long as its directory does. An
artifact is in use where such a run names it, where the run.json of a run beside the store does, where it is a
measurement that such an artifact was made of, or where its files are hard-linked from elsewhere (a run that was moved).
What another process works on is locked, and never touched.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reapkit.core.artifact_store import KEY_LETTERS, Artifact, Damage, Store, artifact_in, unmake
from reapkit.core.atomic_files import write_json
from reapkit.core.errors import UnusableError
from reapkit.core.hashing import digest
from reapkit.core.json_text import parse_json

ARTIFACT = re.compile(rf"[a-z]+-[0-9a-f]{{{KEY_LETTERS}}}(\.damaged-\d+)?")
IN_USE, LINKED, BUSY, UNFINISHED, DAMAGED = (
    "a run uses it",
    "its files are linked from elsewhere",
    "in progress",
    "unfinished, can be resumed",
    "damaged, set aside",
)

MEASURING = "measuring "
"""What the name begins with under which a run enters a measurement before its stage is finished and names it."""


@dataclass(frozen=True)
class Removed:
    """An artifact that was, or would be, removed, and the bytes that this frees."""

    artifact: str
    nbytes: int


@dataclass
class Collected:
    """What went, and by reason what stayed."""

    removed: list[Removed] = field(default_factory=list)
    kept: dict[str, list[str]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.removed)


def register(store: Store, run: Path, artifacts: Mapping[str, str]) -> None:
    """Enters that the run in directory `run` uses these artifacts, directory names by stage; an earlier one of a stage
    is let go. A store that is read-only is only read from: nothing is entered.

    Raises UnusableError where the run's directory cannot be made.
    """
    run = run.resolve()
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnusableError(
            f"{run}: the directory cannot be created ({error.strerror}). Choose another output.directory."
        ) from None
    try:
        with _registry(store):
            file = _entry(store, run)
            known = _artifacts(file) if file.is_file() else {}
            if artifacts.items() - known.items() or not file.is_file():
                write_json(file, {"directory": str(run), "artifacts": known | dict(artifacts)})
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES) or not store.root.is_dir():
            raise


def release_measurements(store: Store, run: Path) -> None:
    """Lets go of the measurements that a run entered while it measured: the finished stage names those that it is made
    of."""
    with _registry(store):
        file = _entry(store, run.resolve())
        kept = {name: artifact for name, artifact in _artifacts(file).items() if not name.startswith(MEASURING)}
        write_json(file, {"directory": str(run.resolve()), "artifacts": kept})


def collect(store: Store, *, unfinished: bool = False, damaged: bool = False, dry_run: bool = False) -> Collected:
    """Removes every artifact that no run uses, with `unfinished` also partial work that nobody is at, with `damaged`
    also what was set aside; `dry_run` only says which.

    Raises UnusableError where there is no store, or where what uses it cannot be read: then nothing is removed.
    """
    found, directories = Collected(), artifact_directories(store)
    with _registry(store):
        used = _used(store, dry_run)
        for directory in directories:
            with store.idle(directory.name.partition(".")[0]) as idle:
                if reason := BUSY if not idle else _reason_to_stay(directory, used, unfinished, damaged):
                    found.kept.setdefault(reason, []).append(directory.name)
                    continue
                found.removed.append(Removed(directory.name, _freed(directory)))
                if not dry_run:
                    unmake(directory)  # first: half of an artifact must not look like a whole one
                    shutil.rmtree(directory)
    return found


def _entry(store: Store, run: Path) -> Path:
    """The file in which a run's directory enters what it uses."""
    return store.root / "runs" / f"{digest(str(run))[:KEY_LETTERS]}.json"


def artifact_directories(store: Store) -> list[Path]:
    """Directories of artifacts, finished, unfinished and set aside. Raises UnusableError where there is no store."""
    if not store.root.is_dir():
        raise UnusableError(
            f"{store.root}: found no artifact store. Give the runtime.store of your recipes with --store."
        )
    return [path for path in sorted(store.root.iterdir()) if ARTIFACT.fullmatch(path.name) and path.is_dir()]


def _reason_to_stay(directory: Path, used: set[str], unfinished: bool, damaged: bool) -> str | None:
    if ".damaged-" in directory.name or isinstance(artifact_in(directory), Damage):
        return None if damaged else DAMAGED
    if not (directory / "manifest.json").is_file():
        return None if unfinished else UNFINISHED
    if directory.name in used:
        return IN_USE
    return LINKED if any(file.stat().st_nlink > 1 for file in _files(directory / "payload")) else None


def _files(directory: Path) -> Iterator[Path]:
    return (file for file in directory.rglob("*") if file.is_file() and not file.is_symlink())


def _freed(directory: Path) -> int:
    return sum(file.stat().st_size for file in _files(directory) if file.stat().st_nlink == 1)


def _used(store: Store, dry_run: bool) -> set[str]:
    """Artifacts that some run names. A registered run whose directory is gone is forgotten."""
    used: set[str] = set()
    for file in (store.root / "runs").glob("*.json"):
        directory = Path(_read(file)["directory"])
        if directory.is_dir():
            used |= set(_artifacts(file).values())
        elif not dry_run:
            file.unlink()
    for file in store.root.resolve().parent.glob("*/run.json"):
        used |= {str(stage["artifact"]) for stage in _read(file)["stages"].values()}
    return used | {measurement for name in used for measurement in _measurements(store.root / name)}


def _measurements(directory: Path) -> Sequence[str]:
    """What a stage's result was made of beside other stages' results."""
    found = artifact_in(directory)
    return found.manifest.get("measurements", ()) if isinstance(found, Artifact) else ()


def _artifacts(file: Path) -> dict[str, str]:
    return dict(_read(file)["artifacts"])


def _read(file: Path) -> dict[str, Any]:
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
        if not {"directory", "artifacts"} <= found.keys() and "stages" not in found:
            raise ValueError("the file names no artifacts")
    except (OSError, ValueError, AttributeError) as error:
        raise UnusableError(
            f"{file}: this list of the artifacts that a run uses cannot be read ({error}). Delete the file if that run"
            " no longer exists, then try again. Nothing was removed from the store."
        ) from None
    return found


@contextmanager
def _registry(store: Store) -> Generator[None]:
    with store.locked("runs", "registry"):
        yield
