"""Reads every artifact of a store in full, and sets the damaged ones aside. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from reapkit.core.artifact_check import Sealed, adopt, check
from reapkit.core.artifact_store import KEY_LETTERS, MANIFEST, Artifact, Damage, Store, artifact_in, damaged_name
from reapkit.core.garbage_collection import BUSY, DAMAGED, UNFINISHED, artifact_directories
from reapkit.core.payload_files import files_below
from reapkit.core.progress import SILENT, Progress

FILES_GONE = "its files were dropped"


@dataclass(frozen=True)
class DamagedArtifact:
    """An artifact that is not as it was written, what about it, and the directory's name that it is, or would be,
    kept under."""

    artifact: str
    damage: str
    kept_as: str


@dataclass
class CheckedStore:
    """What `check_store` read: `sound` artifacts of `nbytes`, the damaged ones, and by reason what was not read."""

    sound: int = 0
    nbytes: int = 0
    damaged: list[DamagedArtifact] = field(default_factory=list)
    not_read: dict[str, list[str]] = field(default_factory=dict)

    def leave(self, reason: str, directory: Path) -> None:
        """Notes what was not read, and why."""
        self.not_read.setdefault(reason, []).append(directory.name)


def check_store(store: Store, sealed: Sealed, *, dry_run: bool = False, progress: Progress = SILENT) -> CheckedStore:
    """Every byte of every artifact against its manifest; damaged ones are set aside, `dry_run` only says which.

    One of an earlier reapkit gets the list of its files; of these, `sealed` says what it can. Raises UnusableError
    where there is no store, OSError where it is read-only.
    """
    found = CheckedStore()
    for directory in artifact_directories(store):
        if ".damaged-" in directory.name:
            found.leave(DAMAGED, directory)
            continue
        with store.idle(directory.name) as idle:
            artifact = artifact_in(directory) if idle else None
            if artifact is None:
                found.leave(UNFINISHED if idle else BUSY, directory)
                continue
            damage = _damage(artifact, directory, sealed, dry_run, progress)
            if damage is not None:
                found.damaged.append(DamagedArtifact(directory.name, str(damage), damaged_name(directory).name))
                if not dry_run:
                    store.set_aside(directory, damage.extras)
            elif not (directory / "payload").is_dir():
                found.leave(FILES_GONE, directory)
            else:
                found.sound += 1
                found.nbytes += sum(facts.st_size for facts in files_below(directory / "payload").values())
    return found


def _damage(
    artifact: Artifact | Damage, directory: Path, sealed: Sealed, dry_run: bool, progress: Progress
) -> Damage | None:
    if isinstance(artifact, Damage):
        return artifact
    if directory.name != f"{artifact.stage}-{artifact.key[:KEY_LETTERS]}":
        return Damage(MANIFEST, f"is that of {artifact.stage}-{artifact.key[:KEY_LETTERS]}")
    if artifact.files is None and artifact.has_payload:
        return adopt(artifact, sealed, progress, write=not dry_run)
    return check(artifact, full=True, progress=progress)
