"""Where a recipe's sources are on this machine, and what names their content in keys. Torch-free."""

from __future__ import annotations

import glob
import os
from functools import cache
from pathlib import Path
from typing import Any

from reapkit import builtin
from reapkit.checkpoint import Checkpoint
from reapkit.errors import UnusableError
from reapkit.hashing import digest, digest_file
from reapkit.hub import TOKENIZER_FILES, cached_snapshot, download_snapshot, hub_checkpoint
from reapkit.recipe.schema import MixEntry, ModelSpec


def is_local(source: str, directory: Path) -> bool:
    """Whether a source names files: an existing path, or anything that can only be one."""
    return source.startswith((".", "/", "~")) or local_path(source, directory).exists() or any(mark in source for mark in "*?[")


def local_path(source: str, directory: Path) -> Path:
    """A source's path, relative ones from the recipe's folder."""
    path = Path(source).expanduser()
    return path if path.is_absolute() else directory / path


def model_checkpoint(model: ModelSpec, directory: Path, *, download: bool = False) -> Checkpoint:
    """The model as its config and headers describe it: packaged, local, in the hub's cache, or else from the hub's metadata.

    `download` fetches what is missing in the cache first. Raises UnusableError naming the source and what would help.
    """
    source = model.source
    if source.startswith("builtin:"):
        if source != "builtin:demo":
            raise UnusableError(f"model.source: '{source}' is not packaged. The only packaged model is builtin:demo.")
        return _opened(builtin.MODEL_DIRECTORY)
    if is_local(source, directory):
        path = local_path(source, directory)
        if not path.is_dir():
            raise UnusableError(f"model.source: {path} is no directory. Give a model directory, a hub id or builtin:demo.")
        return _opened(path)
    path = download_snapshot(source, model.revision) if download else cached_snapshot(source, model.revision)
    return _opened(path) if path is not None else hub_checkpoint(source, model.revision)


_LAST: dict[Path, tuple[Any, Checkpoint]] = {}
"""The checkpoint that was opened last, and its files as they were: a command plans several times, and a thousand headers take a second."""


def _opened(path: Path) -> Checkpoint:
    """`Checkpoint.open`, or what it gave the last time where no file was touched since."""
    path = Path(path)
    files = sorted((entry.name, facts.st_size, facts.st_mtime_ns, facts.st_ino, entry.is_symlink() and os.readlink(entry))
                   for entry in os.scandir(path) if entry.name.endswith((".safetensors", ".json")) and entry.is_file()
                   for facts in (entry.stat(),))
    if path not in _LAST or _LAST[path][0] != files:
        found = Checkpoint.open(path)
        _LAST.clear()
        _LAST[path] = (files, found)
    return _LAST[path][1]


def tokenizer_identity(directory: Path) -> dict[str, str]:
    """sha256 of each tokenizer file of a model directory."""
    files = sorted({file for pattern in TOKENIZER_FILES for file in directory.glob(pattern) if file.is_file()})
    return {file.name: digest_file(file) for file in files}


def template_identity(template: str | None, directory: Path) -> str | None:
    """sha256 of the recipe's own chat template. Raises UnusableError where the file is not there."""
    if template is None:
        return None
    path = local_path(template, directory)
    if not path.is_file():
        raise UnusableError(f"calibration.chat_template: {path} is no file. Paths start from the recipe's folder.")
    return digest_file(path)


def source_identity(entry: MixEntry, directory: Path) -> dict[str, Any]:
    """What names the content of a mix entry: generator version, file hashes, or hub id with its revision."""
    if entry.source.startswith("builtin:"):
        return {"builtin": entry.source.removeprefix("builtin:"), "generators": _generators_identity()}
    if is_local(entry.source, directory) and (folder := local_path(entry.source, directory)).is_dir():
        inside = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
        return {"files": {str(file.relative_to(folder)): [file.stat().st_size, file.stat().st_mtime_ns] for file in inside}}
    if is_local(entry.source, directory):
        return {"files": {Path(file).name: digest_file(Path(file)) for file in source_files(entry, directory)}}
    return {"hub": entry.source, "config": entry.config, "split": entry.split, "revision": entry.revision}


@cache
def _generators_identity() -> str:
    """The packaged generators are code: their files' hashes name what they make."""
    return digest([digest_file(file) for file in sorted(Path(builtin.__file__).parent.glob("*.py"))])


def source_files(entry: MixEntry, directory: Path) -> list[str]:
    """The local files of a mix entry, sorted. Raises UnusableError where none matches."""
    pattern = str(local_path(entry.source, directory))
    files = sorted(file for file in glob.glob(pattern, recursive=True) if Path(file).is_file())
    if not files:
        raise UnusableError(f"calibration source '{entry.name}': no file matches {pattern}. Paths start from the recipe's folder.")
    return files
