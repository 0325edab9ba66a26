"""Where a recipe's sources are on this machine, and what names their content in keys. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.hub import cached_snapshot, download_snapshot, hub_checkpoint
from reapkit.core.errors import UnusableError
from reapkit.recipe.schema import ModelSpec

MODEL_DIRECTORY = Path(__file__).parents[1] / "calibration/builtin/demo_model"
"""The packaged demo model."""


def is_local(source: str, directory: Path) -> bool:
    """Whether a source names files: an existing path, or anything that can only be one."""
    return (
        source.startswith((".", "/", "~"))
        or local_path(source, directory).exists()
        or any(mark in source for mark in "*?[")
    )


def local_path(source: str, directory: Path) -> Path:
    """A source's path, relative ones from the recipe's folder."""
    path = Path(source).expanduser()
    return path if path.is_absolute() else directory / path


def model_checkpoint(model: ModelSpec, directory: Path, *, download: bool = False) -> Checkpoint:
    """The model as its config and headers describe it: packaged, local, in the hub's cache, or else from the hub's
    metadata.

    `download` fetches what is missing in the cache first. Raises UnusableError naming the source and what would help.
    """
    source = model.source
    if source.startswith("builtin:"):
        if source != "builtin:demo":
            raise UnusableError(f"model.source: '{source}' is not packaged. The only packaged model is builtin:demo.")
        return _opened(MODEL_DIRECTORY)
    if is_local(source, directory):
        path = local_path(source, directory)
        if not path.is_dir():
            raise UnusableError(
                f"model.source: {path} is no directory. Give a model directory, a hub id or builtin:demo."
            )
        return _opened(path)
    path = download_snapshot(source, model.revision) if download else cached_snapshot(source, model.revision)
    return _opened(path) if path is not None else hub_checkpoint(source, model.revision)


_LAST: dict[Path, tuple[Any, Checkpoint]] = {}
"""The checkpoint that was opened last, and its files as they were: a command plans several times, and a thousand
headers take a second."""


def _opened(path: Path) -> Checkpoint:
    """`Checkpoint.open`, or what it gave the last time where no file was touched since."""
    path = Path(path)
    files = sorted(
        (entry.name, facts.st_size, facts.st_mtime_ns, facts.st_ino, entry.is_symlink() and os.readlink(entry))
        for entry in os.scandir(path)
        if entry.name.endswith((".safetensors", ".json")) and entry.is_file()
        for facts in (entry.stat(),)
    )
    if path not in _LAST or _LAST[path][0] != files:
        found = Checkpoint.open(path)
        _LAST.clear()
        _LAST[path] = (files, found)
    return _LAST[path][1]
