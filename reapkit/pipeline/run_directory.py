"""A run's directory: what reapkit published there is written down, and nothing else in it is ever changed or removed.
Torch-free.

`.reapkit-run.json` lists every file that runs put there: what it was copied from, and its size and modification time as
it was left. A file that is not listed is the user's; so is one that was changed since. Weights share their bytes with
the store and are read-only; every other file is a copy, so that an edit reaches no other run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reapkit.core.artifact_store import Artifact, link_or_copy, set_aside_files
from reapkit.core.atomic_files import copy_file, write_bytes, write_json
from reapkit.core.errors import RecipeError, UnusableError
from reapkit.core.hashing import digest_file
from reapkit.core.locks import locked
from reapkit.core.payload_files import files_below
from reapkit.core.progress import Progress
from reapkit.core.run_record import COMING, RECORD, Published, is_below, read_record
from reapkit.pipeline.published_names import inner_names, is_planned, top_names
from reapkit.planning.plan import Plan

LOCK = ".reapkit-run.lock"
SHARED = ".safetensors"
"""Files of this kind share their bytes with the store."""
ASIDE = ".yours"
"""What is added to the name of a file that the user changed and a new run replaces."""
READ_ONLY = 0o444


@dataclass(frozen=True)
class Content:
    """What a file of the run's directory is to hold: the bytes, or a file that has them, and their sha256 (hex; "" for
    weights where it is not known)."""

    held: Path | bytes
    sha256: str

    @classmethod
    def of(cls, held: Path | bytes) -> Content:
        if isinstance(held, bytes):
            return cls(held, hashlib.sha256(held).hexdigest())
        return cls(held, "" if held.suffix == SHARED else digest_file(held))

    @property
    def signature(self) -> str:
        """What names the content without reading large files: artifacts never change once they are finished."""
        if isinstance(self.held, bytes) or self.held.suffix != SHARED:
            return self.sha256
        facts = self.held.stat()
        return f"{facts.st_dev}:{facts.st_ino}:{facts.st_size}:{facts.st_mtime_ns}"


class RunDirectory:
    """The directory of one run, opened by one process at a time (`opened`)."""

    def __init__(self, path: Path, progress: Progress):
        self.path, self._progress = path, progress
        self._files = read_record(path)
        self._damaged: set[tuple[int, int]] = set()

    @classmethod
    @contextmanager
    def opened(cls, path: Path, progress: Progress) -> Iterator[RunDirectory]:
        """The directory, made where there is none, and locked for the block against other runs of the same name."""
        path.mkdir(parents=True, exist_ok=True)
        with locked(path / LOCK, lambda: progress.say(f"{path}: another run writes there; waiting")):
            yield cls(path, progress)

    def mirror(self, artifact: Artifact, name: str, others: Mapping[str, bytes] | None = None) -> None:
        """Directory `name` as the artifact's payload, with `others` in place of its files of these names.

        What is there already is left alone, what earlier runs put there and this one has not is removed, and what the
        user put there or changed stays: a changed file that must be replaced is kept beside it.
        """
        sources = _sources(artifact) | {place: Content.of(content) for place, content in (others or {}).items()}
        self._damaged = set_aside_files(artifact.directory.parent, artifact.stage)
        self._announce(f"{name}/{place}" for place in sources)
        for place, source in sources.items():
            self._put(f"{name}/{place}", source)
        self._remove_but(name, {f"{name}/{place}" for place in sources})
        self._save()

    def put(self, name: str, content: Path | bytes) -> None:
        """One file beside the directories."""
        self._announce([name])
        self._put(name, Content.of(content))
        self._save()

    def remove(self, name: str) -> None:
        """Every file of ours below `name`, and the folders that this leaves empty."""
        self._remove_but(name, set())
        self._save()

    def earlier_stages(self) -> tuple[str, ...]:
        """The stages of the run whose results are here, as its run.json says; none without one."""
        return tuple(self._earlier())

    def holds(self, keys: Mapping[str, str]) -> bool:
        """Whether the run whose results are here has these stages with these keys."""
        earlier = self._earlier()
        return all(name in earlier and earlier[name].get("key") == key for name, key in keys.items())

    def _earlier(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "run.json").read_text(encoding="utf-8"))["stages"])
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return {}

    def _announce(self, places: Iterable[str]) -> None:
        """Writes down what is about to be written where nothing is yet: a killed run's files are known as ours."""
        fresh = [place for place in places if place not in self._files and not _is_there(self.path / place)]
        self._files |= dict.fromkeys(fresh, COMING)
        if fresh:
            self._save()

    def _put(self, place: str, source: Content) -> None:
        target, signature = self.path / place, source.signature
        known = self._files.get(place)
        if known is not None and target.exists():
            if _as_left(target, known) and known.source == signature:
                return
            if not _as_left(target, known) and not self._is_damaged(target):
                if known.source == signature:
                    self._progress.say(f"{target}: left as you changed it")
                    return
                self._set_aside(target)
        elif _is_there(target):
            raise UnusableError(
                f"{target}: reapkit did not write this file. Move it, or choose another output.directory."
            )
        _write(source.held, target)
        facts = target.stat()
        self._files[place] = Published(signature, facts.st_size, facts.st_mtime_ns, source.sha256)

    def _is_damaged(self, target: Path) -> bool:
        """Whether the file shares its bytes with an artifact that was set aside, and so is kept there."""
        facts = target.stat()
        return (facts.st_dev, facts.st_ino) in self._damaged

    def _set_aside(self, target: Path) -> None:
        kept = next(path for path in _names_beside(target) if not path.exists())
        target.rename(kept)
        self._progress.warn(f"{target}: you changed it, and this run replaces it; yours is kept as {kept.name}")

    def _remove_but(self, name: str, wanted: set[str]) -> None:
        """Files of ours at or below `name` that are not wanted; those that the user changed are let go of."""
        for place in [place for place in self._files if is_below(place, name) and place not in wanted]:
            known, target = self._files.pop(place), self.path / place
            if target.is_file() and (_as_left(target, known) or self._is_damaged(target)):
                target.unlink()
                _remove_empty(target.parent, self.path)

    def _save(self) -> None:
        write_json(self.path / RECORD, {"format": 1, "files": {k: vars(v) for k, v in sorted(self._files.items())}})


def run_directory(plan: Plan) -> Path:
    """Where a run's results appear."""
    return Path(plan.recipe.output.directory or f"runs/{plan.recipe.name}")


def refuse_foreign(plan: Plan) -> None:
    """Raises RecipeError where the run's directory holds, under a name that the run would use, what no run put
    there."""
    path = run_directory(plan)
    if found := foreign(path, top_names(plan)) or foreign_inside(path, inner_names(plan)):
        names = ", ".join(str(place) for place in found)
        raise RecipeError(
            [
                plan.loaded.problem(
                    "output.directory" if plan.recipe.output.directory else "name",
                    f"a run would write {names}, and reapkit did not make what is there. Choose another "
                    "output.directory, or move it away.",
                )
            ]
        )


def foreign(path: Path, names: Iterable[str]) -> list[Path]:
    """Which of the names that a run would write at `path` are there and hold something that reapkit did not put
    there."""
    there = [name for name in names if (path / name).is_symlink() or (path / name).exists()]
    ours = read_record(path)  # after looking: what another run makes meanwhile is recorded before it is there
    found = []
    for name in there:
        place = path / name
        alone = place.is_symlink() or (place.is_file() and name not in ours)
        filled = place.is_dir() and any(place.iterdir()) and not any(is_below(known, name) for known in ours)
        if alone or filled:
            found.append(place)
    return found


def foreign_inside(path: Path, planned: Mapping[str, tuple[str, ...]]) -> list[Path]:
    """Files that others put into our directories at `path`, by directory under the names that are planned there."""
    there = [
        (file, directory, file.relative_to(path / directory).as_posix())
        for directory in planned
        for file in sorted((path / directory).rglob("*"))
        if file.is_symlink() or file.is_file()
    ]
    ours = read_record(path)  # after looking, as above
    return [
        file
        for file, directory, name in there
        if f"{directory}/{name}" not in ours and is_planned(name, planned[directory])
    ]


def _sources(artifact: Artifact) -> dict[str, Content]:
    """The files of an artifact's payload by their path in it."""
    if artifact.files is None:
        return {name: Content.of(artifact.payload / name) for name in files_below(artifact.payload)}
    return {name: Content(artifact.payload / name, facts.sha256) for name, facts in artifact.files.items()}


def _write(source: Path | bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, bytes):
        write_bytes(target, source)
    elif source.suffix == SHARED:
        with suppress(OSError):  # a store that cannot be written to
            source.chmod(READ_ONLY)
        link_or_copy(source, target)
        target.chmod(READ_ONLY)
    else:
        copy_file(source, target)


def _as_left(target: Path, known: Published) -> bool:
    return known == COMING or known.is_as_left(target.stat())


def _is_there(target: Path) -> bool:
    return target.exists() or target.is_symlink()


def _names_beside(target: Path) -> Iterator[Path]:
    yield target.with_name(target.name + ASIDE)
    number = 2
    while True:
        yield target.with_name(f"{target.name}{ASIDE}{number}")
        number += 1


def _remove_empty(folder: Path, root: Path) -> None:
    while folder != root and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
