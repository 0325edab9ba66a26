"""Opens the sources of the mix (generators, local files, hub datasets) and decides the order of their rows.
Torch-free."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from reapkit.calibration.identity import is_local_data, source_files
from reapkit.calibration.row_readers import (
    ArrowRows,
    CountedRows,
    Document,
    Generated,
    Joined,
    LineRows,
    Records,
    Rows,
    StreamedRows,
)
from reapkit.checkpoint.locate import local_path
from reapkit.core.errors import UnusableError
from reapkit.core.refusals import hub_cache_refusal
from reapkit.recipe.schema import MixEntry

STREAM_ABOVE_BYTES = 2 << 30
"""Hub datasets that are larger, or of unknown size, are streamed instead of downloaded."""
STREAM_BUFFER = 10_000
"""Rows among which a stream is shuffled."""
PACK_START = 1 << 32
"""The first generated row of held-out packs. No calibration reads so far, so packs do not depend on its size."""


@dataclass(frozen=True)
class Walk:
    """The order in which a source's rows are tried: a seeded permutation, a generator's own order, or a shuffled
    stream."""

    name: str
    rows: Rows
    order: str
    numbers: np.ndarray | None
    start: int = 0

    @property
    def length(self) -> int | None:
        return None if self.numbers is None else len(self.numbers)

    def number(self, position: int) -> int:
        """The row that is tried at `position` of the walk."""
        return self.start + position if self.numbers is None else int(self.numbers[position])

    @property
    def revision(self) -> str | None:
        """The hub's commit that is read, where the source is one of its datasets."""
        return self.rows.revision if isinstance(self.rows, (ArrowRows, StreamedRows)) else None

    def place(self, position: int) -> str:
        return f"source '{self.name}', {self.rows.place(self.number(position))}"

    def read_each(self, positions: Sequence[int]) -> list[Mapping[str, Any] | ValueError]:
        """As `read`, with what is wrong with a row in its place where it alone cannot be read. Raises UnusableError
        where more than single rows cannot."""
        try:
            return list(self.rows.read([self.number(position) for position in positions]))
        except ValueError as error:
            if isinstance(self.rows, StreamedRows):
                raise UnusableError(f"source '{self.name}', {error}") from None
            if len(positions) == 1:
                return [error]
        return [row for position in positions for row in self.read_each([position])]

    def read(self, positions: Sequence[int]) -> list[Mapping[str, Any]]:
        """Rows in the order of `positions`; fewer at the end of a stream. Raises UnusableError naming source and
        row."""
        try:
            return self.rows.read([self.number(position) for position in positions])
        except ValueError as error:
            raise UnusableError(f"source '{self.name}', {error}") from None


def open_walk(entry: MixEntry, recipe_directory: Path, *, seed: int, held_out: bool = False, skip: int = 0) -> Walk:
    """The walk over a mix entry's rows that pass its filter.

    A calibration walks the permutation of `seed` and the entry's name from the front, held-out packs from the back, so
    that neither depends on the size of the other; they meet only where the source is too small. A stream has no back:
    packs begin `skip` rows in.

    Raises UnusableError naming the source.
    """
    if entry.source.startswith("builtin:"):
        generated = Generated(entry.source.removeprefix("builtin:"), seed)
        if entry.filter:
            raise UnusableError(
                f"source '{entry.name}': generated rows have no columns, so they cannot be filtered. Remove `filter`."
            )
        return Walk(entry.name, generated, "generated", None, PACK_START if held_out else 0)
    local = is_local_data(entry.source, recipe_directory)
    rows = _open_files(entry, recipe_directory, seed) if local else open_dataset(entry, entry.source, seed)
    if isinstance(rows, StreamedRows):
        return Walk(entry.name, rows, f"stream shuffled over {STREAM_BUFFER} rows", None, skip if held_out else 0)
    kept = _filtered(rows, entry)
    numbers = kept[permutation(len(kept), seed, entry.name)]
    return Walk(entry.name, rows, "permutation", numbers[::-1] if held_out else numbers)


def permutation(count: int, seed: int, name: str) -> np.ndarray:
    """0 ... count - 1 in an order that depends on count, seed and name only; int64 [count].

    Sorted by the raw output of PCG64, whose stream numpy promises to keep (its `permutation` it does not).
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    return np.argsort(np.random.PCG64(key).random_raw(count), kind="stable") if count else np.empty(0, np.int64)


def _filtered(rows: CountedRows, entry: MixEntry) -> np.ndarray:
    if not entry.filter:
        return np.arange(rows.total)
    kept = []
    looked_at = rows.only(tuple(entry.filter)) if isinstance(rows, ArrowRows) else rows
    for chunk in _chunks(rows.total, 1000):
        try:
            read = looked_at.read(chunk)
        except ValueError as error:
            raise UnusableError(f"source '{entry.name}', {error}") from None
        kept += [number for number, row in zip(chunk, read, strict=True) if passes(row, entry, rows.place(number))]
    if not kept:
        raise UnusableError(
            f"source '{entry.name}': none of {rows.total} rows passes the filter {entry.filter}."
            " Change or remove `filter`."
        )
    return np.array(kept)


def _chunks(total: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, total)) for start in range(0, total, size))


def passes(row: Mapping[str, Any], entry: MixEntry, place: str) -> bool:
    """Whether every filtered column holds the value, or one of the values where the filter lists several."""
    for column, wanted in (entry.filter or {}).items():
        if column not in row:
            raise UnusableError(
                f"source '{entry.name}', {place}: the filter's column '{column}' is missing; the row has"
                f" {', '.join(row)}. Filter by one of these."
            )
        found = row[column]
        if found != wanted and not (isinstance(wanted, list) and found in wanted):
            return False
    return True


def _open_files(entry: MixEntry, recipe_directory: Path, seed: int) -> CountedRows | StreamedRows:
    path = local_path(entry.source, recipe_directory)
    if path.is_dir():
        return open_dataset(entry, str(path), seed)
    files = [Path(file) for file in source_files(entry, recipe_directory)]
    tables = [file for file in files if file.suffix == ".parquet"]
    parts = [_open_file(file, entry) for file in files if file.suffix != ".parquet"]
    if tables:
        parts.append(_open_parquet(tables, entry))
    return parts[0] if len(parts) == 1 else Joined(parts)


def _open_file(path: Path, entry: MixEntry) -> CountedRows:
    """.jsonl and .ndjson: a row per line; .json: an array, or lines; .txt: a row per line; any other: the file is one
    row."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return LineRows(path, json_lines=True)
    if suffix == ".json":
        return _open_json(path, entry)
    return LineRows(path, json_lines=False) if suffix == ".txt" else Document(path)


def _open_json(path: Path, entry: MixEntry) -> CountedRows:
    with path.open("rb") as stream:
        if not stream.read(64).lstrip().startswith(b"["):
            return LineRows(path, json_lines=True)
    try:
        return Records(path, json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise UnusableError(
            f"source '{entry.name}', {path.name}: invalid JSON ({error}). Give a JSON array of objects, or JSON lines."
        ) from None


def _open_parquet(files: Sequence[Path], entry: MixEntry) -> ArrowRows:
    import datasets

    try:
        with _quiet(datasets):
            table = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except Exception as error:
        if told := hub_cache_refusal(error):
            raise UnusableError(f"source '{entry.name}': {told}") from None
        raise UnusableError(
            f"source '{entry.name}', {', '.join(file.name for file in files)}: {_reason(error)}"
        ) from None
    return ArrowRows(table, files[0].name if len(files) == 1 else f"{len(files)} parquet files")


def open_dataset(entry: MixEntry, path: str, seed: int) -> ArrowRows | StreamedRows:
    """A dataset in the hub's layout, from the hub or a local directory; streamed where it is large.

    Raises UnusableError naming source, reason and what would help.
    """
    import datasets

    try:
        with _quiet(datasets):
            builder = datasets.load_dataset_builder(path, entry.config, revision=entry.revision)
            if _bytes_of(builder, entry) > STREAM_ABOVE_BYTES:
                stream = cast("datasets.IterableDataset", builder.as_streaming_dataset(split=entry.split))  # one split
                return StreamedRows(
                    stream.shuffle(seed=seed, buffer_size=STREAM_BUFFER),
                    entry.source,
                    lambda row: passes(row, entry, entry.source),
                    _commit(builder, entry),
                )
            table = datasets.load_dataset(path, entry.config, split=entry.split, revision=entry.revision)
            return ArrowRows(table, entry.source, _commit(builder, entry))
    except UnusableError:
        raise
    except Exception as error:  # datasets raises about twenty kinds here; all mean that this source cannot be read
        if told := hub_cache_refusal(error):
            raise UnusableError(f"source '{entry.name}': {told}") from None
        raise UnusableError(
            f"source '{entry.name}': {entry.source} (config {entry.config}, split {entry.split}) cannot be opened: "
            f"{_reason(error)} Check the name, config and split, the network, and `hf auth login` for gated data; "
            "or give local files."
        ) from None


def _commit(builder: Any, entry: MixEntry) -> str | None:
    """The commit in the hub's file addresses (hf://datasets/org/name@commit/...), else what the recipe says."""
    files = (builder.config.data_files or {}).get(entry.split) or [""]
    found = re.search(r"@([0-9a-f]{40})/", str(files[0]))
    return found.group(1) if found else entry.revision


def _bytes_of(builder: Any, entry: MixEntry) -> float:
    """Download size of the split, from the dataset card or the hub's file list; infinite where neither says."""
    if builder.info.download_size:
        return builder.info.download_size
    files = (builder.config.data_files or {}).get(entry.split)
    if not files:
        return float("inf")
    if not any(str(file).startswith("hf://") for file in files):
        return sum(Path(file).stat().st_size for file in files)
    from huggingface_hub import HfFileSystem

    hub = HfFileSystem()
    return sum(hub.info(file)["size"] for file in files[:64]) * max(1, len(files) / 64)


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """`datasets` draws bars of its own; ours are the only ones."""
    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()
