"""Finds a recipe's model on this machine, and identifies its content for keys. Torch-free."""

from __future__ import annotations

from pathlib import Path

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


def model_directory(model: ModelSpec, directory: Path) -> Path | None:
    """Where the model lies on this machine; None of one that does not, or not whole."""
    if model.source.startswith("builtin:"):
        return MODEL_DIRECTORY
    if is_local(model.source, directory):
        return local_path(model.source, directory)
    return cached_snapshot(model.source, model.revision)


def model_checkpoint(model: ModelSpec, directory: Path, *, download: bool = False) -> Checkpoint:
    """The model as its config and headers describe it: packaged, local, in the hub's cache, or else from the hub's
    metadata.

    `download` fetches what is missing in the cache first. Raises UnusableError naming the source and what would help.
    """
    source = model.source
    if source.startswith("builtin:"):
        if source != "builtin:demo":
            raise UnusableError(f"model.source: '{source}' is not packaged. The only packaged model is builtin:demo.")
        return Checkpoint.open(MODEL_DIRECTORY)
    if is_local(source, directory):
        path = local_path(source, directory)
        if not path.is_dir():
            raise UnusableError(
                f"model.source: {path} is not a directory. Give a model directory, a hub id or builtin:demo."
            )
        return Checkpoint.open(path)
    path = download_snapshot(source, model.revision) if download else cached_snapshot(source, model.revision)
    return Checkpoint.open(path) if path is not None else hub_checkpoint(source, model.revision)
