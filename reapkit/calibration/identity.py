"""Identifies a calibration's inputs by content, for keys: tokenizer, chat template and the sources of the mix.
Torch-free."""

from __future__ import annotations

import glob
from functools import cache
from pathlib import Path
from typing import Any

from reapkit.calibration.builtin import generators
from reapkit.checkpoint.hub import TOKENIZER_FILES
from reapkit.checkpoint.locate import is_local, local_path
from reapkit.core.errors import UnusableError
from reapkit.core.hashing import digest, digest_file
from reapkit.recipe.schema import MixEntry


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
        raise UnusableError(f"calibration.chat_template: {path} is not a file. Paths start from the recipe's folder.")
    return digest_file(path)


def source_identity(entry: MixEntry, directory: Path) -> dict[str, Any]:
    """What names the content of a mix entry: generator version, file hashes, or hub id with its revision; and, of rows
    that others wrote, the rules by which they are read."""
    if entry.source.startswith("builtin:"):
        return {"builtin": entry.source.removeprefix("builtin:"), "generators": _generators_identity()}
    return {**_outside_identity(entry, directory), "reading": READING}


def _outside_identity(entry: MixEntry, directory: Path) -> dict[str, Any]:
    if is_local_data(entry.source, directory) and (folder := local_path(entry.source, directory)).is_dir():
        inside = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
        return {
            "files": {str(file.relative_to(folder)): [file.stat().st_size, file.stat().st_mtime_ns] for file in inside}
        }
    if is_local_data(entry.source, directory):
        return {"files": {Path(file).name: digest_file(Path(file)) for file in source_files(entry, directory)}}
    return {"hub": entry.source, "config": entry.config, "split": entry.split, "revision": entry.revision}


READING = 2
"""The version of the rules by which rows become samples; raised when the same row gives another sample."""
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".csv", ".tsv", ".arrow", ".gz", ".zst")
"""No hub dataset is named so: a source that ends like this is a file, also where it does not exist."""


@cache
def _generators_identity() -> str:
    """The packaged generators are code and tables: their files' hashes name what they make."""
    here = Path(generators.__file__).parent
    return digest([digest_file(file) for file in sorted([*here.glob("*.py"), *here.glob("*.yaml")])])


def is_local_data(source: str, directory: Path) -> bool:
    """Whether a source names files: as `is_local`, and whatever ends like a data file or lies deeper than a hub id."""
    if "://" in source:
        return False
    deep = source.strip("/").count("/") > 1
    return is_local(source, directory) or source.lower().endswith(DATA_SUFFIXES) or deep


def source_files(entry: MixEntry, directory: Path) -> list[str]:
    """The local files of a mix entry, sorted. Raises UnusableError where none matches."""
    pattern = str(local_path(entry.source, directory))
    files = sorted(file for file in glob.glob(pattern, recursive=True) if Path(file).is_file())
    if not files:
        raise UnusableError(
            f"calibration source '{entry.name}': no file matches {pattern}. Paths start from the recipe's folder."
        )
    return files
