"""Stores artifacts by key; a directory is complete once its manifest exists, which is written last. Torch-free.

<store>/<stage>-<key12>/manifest.json     the stage, its whole key, spec, inputs, seconds, versions, summary, files
<store>/<stage>-<key12>/payload/          what the stage made; may be dropped later (then `dropped` lies beside it)
<store>/<stage>-<key12>/checked.json      under which size, mtime and inode large files were last read whole; a cache
<store>/<stage>-<key12>.damaged-<n>/      one that was damaged, as it was found; or files that did not belong in it
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

from reapkit.core import locks
from reapkit.core.artifact_manifest import FileFacts, listed_files, manifest_text, read_manifest_text
from reapkit.core.atomic_files import copy_file, remove_unfinished, write_text
from reapkit.core.errors import StageFailed
from reapkit.core.payload_files import files_below, is_file, sha256_of
from reapkit.core.progress import SILENT, Progress
from reapkit.core.stat_record import StatRecord

KEY_LETTERS = 12
MANIFEST, CHECKED, DROPPED = "manifest.json", "checked.json", "dropped"
READ_WHOLE = 1 << 20
"""Bytes up to which a file is read whole before it is used; of larger ones `checked.json` is asked."""

UNREADABLE = (errno.EIO, errno.EISDIR)
"""Errors of reading that mean the file is not what was written, and not that this user may not read it."""


@dataclass(frozen=True)
class Artifact:
    """A finished stage's output."""

    stage: str
    key: str
    directory: Path
    manifest: Mapping[str, Any]

    @property
    def payload(self) -> Path:
        return self.directory / "payload"

    @property
    def has_payload(self) -> bool:
        return self.payload.is_dir()

    @property
    def was_dropped(self) -> bool:
        """Whether reapkit itself removed the files."""
        return (self.directory / DROPPED).exists()

    @property
    def summary(self) -> Mapping[str, Any]:
        """What the stage reported: small facts for tables and later decisions."""
        return self.manifest["summary"]

    @cached_property
    def files(self) -> Mapping[str, FileFacts] | None:
        """The payload's files by their path in it; None where an earlier reapkit wrote no list."""
        return listed_files(self.manifest)

    def drop_payload(self) -> None:
        """Removes the files, keeps the manifest; a later stage that needs them makes them again."""
        trash = self.directory / "payload.dropped"
        if self.has_payload:
            (self.directory / DROPPED).touch()  # first: files that are gone without it were lost
            self.payload.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


@dataclass(frozen=True)
class Damage:
    """What is wrong with an artifact: `file`, a path in its directory, and what about it.

    `extras`: its own files are as they were written, but these lie among them.
    """

    file: str
    what: str
    extras: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


class Store:
    """The artifacts below one directory."""

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)

    def directory(self, stage: str, key: str) -> Path:
        return self.root / f"{stage}-{key[:KEY_LETTERS]}"

    def get(self, stage: str, key: str) -> Artifact | None:
        """The finished artifact of that key, or None; a directory without manifest is unfinished work."""
        found = self.find(stage, key)
        return found if isinstance(found, Artifact) else None

    def find(self, stage: str, key: str) -> Artifact | Damage | None:
        """As `get`; the damage where the manifest is not as it was written. Says nothing about the payload."""
        found = artifact_in(self.directory(stage, key))
        if not isinstance(found, Artifact) or (found.stage, found.key) == (stage, key):
            return found
        return None if found.key != key else Damage(MANIFEST, f"is that of {found.stage}")

    @contextmanager
    def locked(self, stage: str, key: str, waiting: Any = None) -> Generator[None]:
        """Holds the artifact's exclusive lock for the block; `waiting()` is called once if another process holds it."""
        self.root.mkdir(parents=True, exist_ok=True)
        with locks.locked(self.root / f"{stage}-{key[:KEY_LETTERS]}.lock", waiting):
            yield

    @contextmanager
    def idle(self, name: str) -> Generator[bool]:
        """True, and then locked for the block, where no process is at the artifact of that directory name; False at
        once otherwise."""
        with locks.unless_held(self.root / f"{name}.lock") as idle:
            yield idle

    def begin(self, stage: str, key: str, *, resume: bool) -> Path:
        """The payload directory to write into: with `resume` as an earlier attempt left it, else empty."""
        directory = self.directory(stage, key)
        payload = directory / "payload"
        was_finished = (directory / MANIFEST).exists()  # then runs share its bytes: nothing is written over them
        unmake(directory)
        if was_finished or not resume:
            shutil.rmtree(payload, ignore_errors=True)
        payload.mkdir(parents=True, exist_ok=True)
        remove_unfinished(payload)
        return payload

    def finish(
        self,
        stage: str,
        key: str,
        manifest: Mapping[str, Any],
        *,
        hashes: Mapping[str, str] | None = None,
        progress: Progress = SILENT,
    ) -> Artifact:
        """Writes the manifest by rename, which makes the artifact exist.

        `hashes`: sha256 (hex) of files that were taken while they were written, by their path in the payload; the
        others are read once now. Raises StageFailed for a payload that holds anything but files.
        """
        directory = self.directory(stage, key)
        return listed(Artifact(stage, key, directory, {**manifest, "stage": stage, "key": key}), hashes or {}, progress)

    def set_aside(self, directory: Path, extras: Sequence[str] = ()) -> Path:
        """Takes a damaged artifact's directory, or only the files `extras` (paths in it), out of use: where to.

        What is there stays readable, and `gc` lists it. The caller holds the artifact's lock, or is its only user.
        """
        target = damaged_name(directory)
        for name in extras:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).rename(target / name)
        if not extras:
            directory.rename(target)
        return target

    def was_set_aside(self, stage: str, key: str) -> bool:
        """Whether a damaged artifact of that key is kept."""
        kept = self.root.glob(f"{self.directory(stage, key).name}.damaged-*")
        return any((directory / name).exists() for directory in kept for name in (MANIFEST, CHECKED))

    def artifacts(self) -> Iterator[Artifact]:
        """Every finished artifact."""
        for path in sorted(self.root.glob(f"*-*/{MANIFEST}")):
            found = artifact_in(path.parent)
            if isinstance(found, Artifact) and "." not in path.parent.name:
                yield found


def artifact_in(directory: Path) -> Artifact | Damage | None:
    """The artifact whose directory that is; the damage where its manifest is not as it was written; None where there
    is none."""
    return undisturbed(directory, lambda: _artifact_in(directory))


def undisturbed(directory: Path, look: Callable[[], Artifact | Damage | None]) -> Artifact | Damage | None:
    """What `look()` finds in an artifact's directory. Without its lock another run may take it away or finish it
    halfway through, which looks like damage: then it is looked at again."""
    while True:
        before = _state(directory)
        found = look()
        if not isinstance(found, Damage) or _state(directory) == before:
            return found


def _state(directory: Path) -> list[tuple[int, int] | None]:
    """What changes when files are added to the directory or its payload, or taken out, or it is another one."""
    found: list[tuple[int, int] | None] = []
    for place in (directory, directory / "payload"):
        try:
            facts = place.stat()
        except OSError:
            found.append(None)
        else:
            found.append((facts.st_ino, facts.st_mtime_ns))
    return found


def _artifact_in(directory: Path) -> Artifact | Damage | None:
    try:
        facts = read_manifest_text((directory / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        lost = (directory / CHECKED).is_file() and (directory / "payload").is_dir()  # it was finished once
        return Damage(MANIFEST, "is missing") if lost else None
    except ValueError as error:
        return Damage(MANIFEST, f"cannot be used ({error})")
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        return Damage(MANIFEST, f"cannot be read ({error.strerror})")
    return Artifact(facts["stage"], facts["key"], directory, facts)


def listed(artifact: Artifact, hashes: Mapping[str, str], progress: Progress = SILENT) -> Artifact:
    """The artifact with a manifest, written now, that lists every file of its payload. As `Store.finish`."""
    payload, found = artifact.payload, files_below(artifact.payload)
    if odd := [name for name, facts in found.items() if not is_file(facts)]:
        raise StageFailed(
            f"{payload / odd[0]}: a link, pipe or device, which no artifact can hold. Please report this."
        )
    left = [payload / name for name in found if name not in hashes]
    taken = {file.relative_to(payload).as_posix(): hashed for file, hashed in sha256_of(left, progress)}
    sha256 = {**hashes, **taken}
    files = {name: {"nbytes": facts.st_size, "sha256": sha256[name]} for name, facts in found.items()}
    text = manifest_text({**artifact.manifest, "files": files})
    write_text(artifact.directory / MANIFEST, text)
    large = {name: (facts, sha256[name]) for name, facts in found.items() if facts.st_size > READ_WHOLE}
    StatRecord(artifact.directory / CHECKED).update(large)
    return Artifact(artifact.stage, artifact.key, artifact.directory, read_manifest_text(text.encode()))


def unmake(directory: Path) -> None:
    """What is in the directory is no artifact any more; its payload stays."""
    for name in (CHECKED, MANIFEST, DROPPED):  # a manifest that is missing while CHECKED is there was lost
        (directory / name).unlink(missing_ok=True)


def damaged_name(directory: Path) -> Path:
    """Where a damaged artifact of that directory would be set aside to."""
    number = 1
    while (target := directory.with_name(f"{directory.name}.damaged-{number}")).exists():
        number += 1
    return target


def set_aside_files(root: Path, stage: str) -> set[tuple[int, int]]:
    """Device and inode of every file of a stage's damaged artifacts in the store at `root`."""
    payloads = [directory / "payload" for directory in root.glob(f"{stage}-*.damaged-*")]
    files = [facts for payload in payloads if payload.is_dir() for facts in files_below(payload).values()]
    return {(facts.st_dev, facts.st_ino) for facts in files}


def link_or_copy(source: Path, target: Path) -> None:
    """`target`, in place of what was there, with the bytes of `source`: a hard link, or a copy where there can be none
    (file systems that differ or have no links, a file that has too many). Raises OSError where the disk refuses."""
    partial = target.with_name(f".{target.name}.{uuid4().hex[:8]}.partial")
    try:
        os.link(source, partial)
    except OSError:
        copy_file(source, target)
        return
    try:
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)  # rename leaves both names where they are the same file
