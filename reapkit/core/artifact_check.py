"""Whether an artifact's files are those that its stage wrote, looked at before anything reads them. Torch-free.

Names and sizes of all files are compared. The bytes of a file of at most READ_WHOLE are read each time; those of a
larger one where its size, modification time or inode are not those under which it was last read whole, and always with
`full`. Not seen without `full`: bytes of a larger file that change under the same size, modification time and inode.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from reapkit.core.artifact_manifest import FileFacts
from reapkit.core.artifact_store import CHECKED, READ_WHOLE, UNREADABLE, Artifact, Damage, Store, listed
from reapkit.core.payload_files import files_below, is_file, sha256_of
from reapkit.core.progress import SILENT, Progress
from reapkit.core.stat_record import StatRecord

Sealed = Callable[[Path], Mapping[str, str] | Damage]
"""What a payload says of itself: which sha256 (hex) files of it have, by their path in it."""


def glance(artifact: Artifact) -> Damage | None:
    """What names and sizes of the files tell without reading one; nothing about an artifact without a list."""
    return _looked_at(artifact)[1]


def check(artifact: Artifact, *, full: bool = False, progress: Progress = SILENT) -> Damage | None:
    """What is wrong with the artifact's files, or None. Reads as the module says, and notes what it read whole.

    Raises OSError where this user may not read a file.
    """
    there, found = _looked_at(artifact)
    if artifact.files is None or not there or (found is not None and not found.extras):
        return found
    try:
        return _contents(artifact, artifact.files, there, full, progress) or found
    except OSError as error:
        return _unreadable(artifact, error)


def damage_of(store: Store, stage: str, key: str, *, full: bool = False, progress: Progress = SILENT) -> Damage | None:
    """What is wrong with the artifact of that key, or None: also where there is none."""
    found = store.find(stage, key)
    return check(found, full=full, progress=progress) if isinstance(found, Artifact) else found


def adopt(artifact: Artifact, sealed: Sealed, progress: Progress = SILENT, *, write: bool = True) -> Damage | None:
    """Lists the files of an artifact of an earlier reapkit in its manifest; what is wrong with them, or None.

    They are read once and taken as they are, but for those of which `sealed` says what they must be. The caller holds
    the artifact's lock. Raises OSError where this user may not read a file, or write the manifest.
    """
    payload, stated = artifact.payload, sealed(artifact.payload)
    if isinstance(stated, Damage):
        return stated
    files = [payload / name for name, facts in files_below(payload).items() if is_file(facts)]
    try:
        taken = list(sha256_of(files, progress, f"sha256 {artifact.directory.name}"))
    except OSError as error:
        return _unreadable(artifact, error)
    hashes = {file.relative_to(payload).as_posix(): sha256 for file, sha256 in taken}
    for name, sha256 in stated.items():
        if hashes.get(name) != sha256:
            what = "is missing" if name not in hashes else _other_bytes(hashes[name], sha256)
            return Damage(f"payload/{name}", what)
    if write:
        listed(artifact, hashes)
    return None


def _unreadable(artifact: Artifact, error: OSError) -> Damage:
    """What the system's refusal to give a file's bytes means. Raises it again where it is about this user's rights."""
    if error.errno not in (*UNREADABLE, errno.ENOENT):
        raise error
    what = "is missing" if error.errno == errno.ENOENT else f"cannot be read ({error.strerror})"
    return Damage(str(Path(error.filename).relative_to(artifact.directory)), what)


def _looked_at(artifact: Artifact) -> tuple[Mapping[str, os.stat_result], Damage | None]:
    """The payload's files as they are, and what is wrong with names and sizes."""
    if artifact.files is None:
        return {}, None
    try:
        there = files_below(artifact.payload)
    except (FileNotFoundError, NotADirectoryError):
        dropped = artifact.was_dropped and not artifact.has_payload
        return {}, None if dropped else Damage("payload", "is missing")
    wrong = next(_wrong(artifact.files, there), None)
    return there, wrong or _extras(tuple(f"payload/{name}" for name in there if name not in artifact.files))


def _wrong(files: Mapping[str, FileFacts], there: Mapping[str, os.stat_result]) -> Iterator[Damage]:
    for name, facts in files.items():
        if name not in there:
            yield Damage(f"payload/{name}", "is missing")
        elif not is_file(there[name]):
            yield Damage(f"payload/{name}", "is no file any more")
        elif (size := there[name].st_size) != facts.nbytes:
            yield Damage(f"payload/{name}", f"has {size:,} bytes, {facts.nbytes:,} were written")


def _extras(places: tuple[str, ...]) -> Damage | None:
    if not places:
        return None
    what = "was not written by the stage" if len(places) == 1 else f"and {len(places) - 1} more were not written by it"
    return Damage(places[0], what, places)


def _contents(
    artifact: Artifact,
    files: Mapping[str, FileFacts],
    there: Mapping[str, os.stat_result],
    full: bool,
    progress: Progress,
) -> Damage | None:
    record, payload = StatRecord.of(artifact.directory / CHECKED), artifact.payload
    doubtful = [
        payload / name
        for name, facts in files.items()
        if full or facts.nbytes <= READ_WHOLE or record.sha256(name, there[name]) != facts.sha256
    ]
    found: dict[str, tuple[os.stat_result, str]] = {}
    for file, sha256 in sha256_of(doubtful, progress, f"check {artifact.directory.name}"):
        name = file.relative_to(payload).as_posix()
        if sha256 != files[name].sha256:
            return Damage(f"payload/{name}", _other_bytes(sha256, files[name].sha256))
        if files[name].nbytes > READ_WHOLE:
            found[name] = (there[name], sha256)
    if found:
        record.update(found)
    return None


def _other_bytes(found: str, written: str) -> str:
    return f"has other bytes than were written (sha256 {found[:12]}…, written {written[:12]}…)"
