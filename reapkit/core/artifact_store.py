"""Stores artifacts by key; a directory is complete once its manifest exists, which is written last. Torch-free.

<store>/<stage>-<key12>/manifest.json     the stage, its whole key, spec, inputs, seconds, versions, summary
<store>/<stage>-<key12>/payload/          what the stage made; may be dropped later, the manifest stays
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from reapkit.core import locks
from reapkit.core.atomic_files import copy_file, remove_unfinished, write_json

KEY_LETTERS = 12


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
    def summary(self) -> Mapping[str, Any]:
        """What the stage reported: small facts for tables and later decisions."""
        return self.manifest["summary"]

    def drop_payload(self) -> None:
        """Removes the files, keeps the manifest; a later stage that needs them makes them again."""
        trash = self.directory / "payload.dropped"
        if self.has_payload:
            self.payload.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


class Store:
    """The artifacts below one directory."""

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)

    def directory(self, stage: str, key: str) -> Path:
        return self.root / f"{stage}-{key[:KEY_LETTERS]}"

    def get(self, stage: str, key: str) -> Artifact | None:
        """The finished artifact of that key, or None; a directory without manifest is unfinished work."""
        directory = self.directory(stage, key)
        try:
            manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return Artifact(stage, key, directory, manifest) if manifest.get("key") == key else None

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
        was_finished = (directory / "manifest.json").exists()  # then runs share its bytes: nothing is written over them
        (directory / "manifest.json").unlink(missing_ok=True)
        if was_finished or not resume:
            shutil.rmtree(payload, ignore_errors=True)
        payload.mkdir(parents=True, exist_ok=True)
        remove_unfinished(payload)
        return payload

    def finish(self, stage: str, key: str, manifest: Mapping[str, Any]) -> Artifact:
        """Writes the manifest by rename, which makes the artifact exist."""
        directory = self.directory(stage, key)
        manifest = {**manifest, "stage": stage, "key": key}
        write_json(directory / "manifest.json", manifest)
        return Artifact(stage, key, directory, manifest)

    def artifacts(self) -> Iterator[Artifact]:
        """Every finished artifact."""
        for path in sorted(self.root.glob("*/manifest.json")):
            manifest = json.loads(path.read_text(encoding="utf-8"))
            yield Artifact(manifest["stage"], manifest["key"], path.parent, manifest)


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
