"""Artifacts of a store, made without a stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from reapkit.core import payload_files
from reapkit.core.artifact_store import Artifact, Store

KEY = "a" * 64


def finished(store: Store, stage: str = "prune", files: Mapping[str, bytes] | None = None, **more: Any) -> Artifact:
    """The artifact of that stage with these files, as `Store.finish` leaves it."""
    payload = store.begin(stage, KEY, resume=False)
    for name, content in (files or {}).items():
        (payload / name).parent.mkdir(parents=True, exist_ok=True)
        (payload / name).write_bytes(content)
    return store.finish(stage, KEY, {"summary": {"tokens": 3}}, **more)


def without_list(artifact: Artifact) -> None:
    """Makes it one of an earlier reapkit, which listed no files."""
    manifest = artifact.directory / "manifest.json"
    facts = {name: value for name, value in artifact.manifest.items() if name not in ("sha256", "files")}
    manifest.write_text(json.dumps(facts, indent=1) + "\n")
    (artifact.directory / "checked.json").unlink()


def note_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read whole from now on, as they are."""
    names: list[str] = []
    plain = payload_files._digest

    def noted(file: Path, *others: Any) -> str:
        names.append(file.name)
        return plain(file, *others)

    monkeypatch.setattr(payload_files, "_digest", noted)
    return names
