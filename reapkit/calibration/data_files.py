"""Finds a source's local files and tells from their names what they hold; takes compression off. Torch-free."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from reapkit.checkpoint.locate import is_local, local_path
from reapkit.core.errors import UnusableError
from reapkit.recipe.schema import MixEntry
from reapkit.recipe.split_expression import split_parts

LINES = (".jsonl", ".ndjson")
TABLES = (".parquet", ".csv", ".tsv", ".arrow")
PACKED = (".gz", ".zst", ".bz2", ".xz")
DATA_SUFFIXES = (*LINES, ".json", ".txt", *TABLES, *PACKED)
"""No hub dataset is named so: a source that ends like this, in any case, is a file, also where it does not exist."""
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What unpacking a damaged file raises."""


def is_local_data(source: str, directory: Path) -> bool:
    """Whether a source names files: as `is_local`, and whatever ends like a data file or lies deeper than a hub id."""
    if "://" in source:
        return False
    deep = source.strip("/").count("/") > 1
    return is_local(source, directory) or source.lower().endswith(DATA_SUFFIXES) or deep


def source_files(entry: MixEntry, directory: Path) -> list[Path]:
    """The local files of a mix entry, sorted. Raises UnusableError where none matches."""
    return list(named_files(entry, directory).values())


def named_files(entry: MixEntry, directory: Path) -> dict[str, Path]:
    """As `source_files`, by their names below the folder in which the pattern begins."""
    path = local_path(entry.source, directory)
    found = matching(path)
    if not found:
        raise UnusableError(
            f"calibration source '{entry.name}': no file matches {path}. Paths start from the recipe's folder."
        )
    return found


def matching(path: Path) -> dict[str, Path]:
    """The files that a path or pattern names, sorted, by their names below the folder in which the pattern begins.

    What exists by its very name is meant so: `notes[1].txt`, and folders with brackets in a path.
    """
    if path.is_file():
        return {path.name: path}
    literal, parts = Path(path.anchor), list(path.parts[len(Path(path.anchor).parts) :])
    while parts and (literal / parts[0]).exists():
        literal /= parts.pop(0)
    found = sorted(glob.glob(str(Path(glob.escape(str(literal)), *parts)), recursive=True))
    return {str(Path(file).relative_to(literal)): Path(file) for file in found if Path(file).is_file()}


def kind_of(path: Path) -> str:
    """The suffix that tells what a file holds, in lower case and without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def unpacked_stream(path: Path) -> Generator[IO[bytes]]:
    """The file's content from its start, without compression. Reading raises one of `DAMAGED` where it is damaged."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa

        with pa.input_stream(str(path), compression="zstd") as stream:
            yield io.BufferedReader(cast("io.RawIOBase", stream))
    else:
        openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        with openers.get(suffix, open)(path, "rb") as stream:
            yield stream


class LocalFile:
    """A file of a source: `path` to read it at, `name` to call it by, `kind` as `kind_of` tells.

    A compressed file is unpacked into a temporary folder, which goes when nothing holds this object any more. Raises
    ValueError where it cannot be unpacked.
    """

    def __init__(self, path: Path):
        self.path, self.name, self.kind = path, path.name, kind_of(path)
        self.packed = path.suffix.lower() in PACKED
        if self.packed:
            self.path = self._unpacked(path)

    def _unpacked(self, path: Path) -> Path:
        folder = tempfile.mkdtemp(prefix="reapkit-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        place = Path(folder) / (path.stem or "data")
        with place.open("wb") as target:
            try:
                with unpacked_stream(path) as stream:
                    while block := _block(stream, path.name):
                        target.write(block)
            except (gzip.BadGzipFile, lzma.LZMAError) as error:
                raise ValueError(f"{path.name}: cannot be unpacked ({error}). Make the file anew") from None
        return place


def _block(stream: IO[bytes], name: str) -> bytes:
    try:
        return stream.read(1 << 20)
    except DAMAGED as error:
        raise ValueError(f"{name}: cannot be unpacked ({error}). Make the file anew") from None


def saved_splits(folder: Path) -> dict[str, Path] | None:
    """The splits of a folder that `save_to_disk` wrote, by name; `train`, where it holds one split only. None for other
    folders."""
    if (names := _json(folder / "dataset_dict.json").get("splits")) is not None:
        return {name: folder / name for name in names}
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        own = _json(folder / "state.json").get("_split") or "train"
        return dict.fromkeys(dict.fromkeys((own.split("[")[0], "train")), folder)
    return None


def saved_files(folder: Path) -> list[str]:
    """The files of one split that `save_to_disk` wrote, as far as its rows depend on them; others are caches."""
    state = _json(folder / "state.json")
    return ["state.json", "dataset_info.json", *(part["filename"] for part in state.get("_data_files", ()))]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def misplaced(entry: MixEntry, directory: Path) -> tuple[str, str] | None:
    """The first of a local source's fields that means nothing for it, and why."""
    path = local_path(entry.source, directory)
    if entry.revision is not None:
        return "revision", f"'{entry.revision}', but only datasets on the hub have revisions. Remove it."
    is_folder = path.is_dir()
    known = saved_splits(path) if is_folder else {"train": path}
    if known is None:
        return None  # in the hub's layout: `datasets` knows its configurations and splits
    what = "a folder that save_to_disk wrote has" if is_folder else "files have"
    if entry.config is not None:
        return "config", f"'{entry.config}', but {what} no configurations. Remove it."
    for part in split_parts(entry.split):
        if part.name not in known:
            if is_folder:
                return "split", f"'{entry.split}', but the folder has the splits {', '.join(known)}. Choose among them."
            return (
                "split",
                f"'{entry.split}', but files have no splits: all their rows are 'train'. Write train, or a part of it"
                " such as train[:1000].",
            )
    return None
