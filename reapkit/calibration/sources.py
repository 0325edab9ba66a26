"""Where rows come from: generators of the package, local files, datasets of the hub. Torch-free.

Every kind is a `Rows`: numbered rows, read by number. Which numbers are drawn, and in which order, is `Walk`'s business.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from reapkit import builtin
from reapkit.errors import UnusableError
from reapkit.recipe.schema import MixEntry
from reapkit.resolve import is_local, local_path, source_files

MAX_SAMPLE_BYTES = 8 << 20
"""A longer single sample is a mistake in the data (a whole file in one row), and tokenizing it would take gigabytes."""
STREAM_ABOVE_BYTES = 2 << 30
"""Hub datasets that are larger, or of unknown size, are streamed instead of downloaded."""
STREAM_BUFFER = 10_000
"""Rows among which a stream is shuffled."""
PACK_START = 1 << 32
"""Generated rows of held-out packs begin here, far behind any calibration, and so do not depend on its size."""


class Rows(Protocol):
    """Numbered rows. `total` is None where there is no end or it is not known."""

    total: int | None

    def read(self, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        """Rows by number. Raises ValueError beginning with the row's place."""

    def place(self, number: int) -> str:
        """What a user would call the row, e.g. `data.jsonl:17`."""


@dataclass(frozen=True)
class Walk:
    """The order in which a source's rows are tried: a seeded permutation, a generator's own order, or a shuffled stream."""

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

    def place(self, position: int) -> str:
        return f"source '{self.name}', {self.rows.place(self.number(position))}"

    def read(self, positions: Sequence[int]) -> list[Mapping[str, Any]]:
        """Rows in the order of `positions`; fewer at the end of a stream. Raises UnusableError naming source and row."""
        try:
            return self.rows.read([self.number(position) for position in positions])
        except ValueError as error:
            raise UnusableError(f"source '{self.name}', {error}") from None


def open_walk(entry: MixEntry, recipe_directory: Path, *, seed: int, held_out: bool = False, skip: int = 0) -> Walk:
    """The walk over a mix entry's rows that pass its filter.

    A calibration walks the permutation of `seed` and the entry's name from the front, held-out packs from the back, so that
    neither depends on the size of the other; they meet only where the source is too small. A stream has no back: packs begin `skip` rows in.

    Raises UnusableError naming the source.
    """
    if entry.source.startswith("builtin:"):
        rows: Rows = Generated(entry.source.removeprefix("builtin:"), seed)
        if entry.filter:
            raise UnusableError(f"source '{entry.name}': generated rows have no columns to filter. Remove `filter`.")
        return Walk(entry.name, rows, "generated", None, PACK_START if held_out else 0)
    rows = _open_files(entry, recipe_directory, seed) if is_local(entry.source, recipe_directory) else open_dataset(entry, entry.source, seed)
    if rows.total is None:
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


def _filtered(rows: Rows, entry: MixEntry) -> np.ndarray:
    if not entry.filter:
        return np.arange(rows.total)
    kept = []
    for chunk in _chunks(rows.total, 1000):
        try:
            read = rows.read(chunk)
        except ValueError as error:
            raise UnusableError(f"source '{entry.name}', {error}") from None
        kept += [number for number, row in zip(chunk, read) if passes(row, entry, rows.place(number))]
    if not kept:
        raise UnusableError(f"source '{entry.name}': none of {rows.total} rows passes the filter {entry.filter}.")
    return np.array(kept)


def _chunks(total: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, total)) for start in range(0, total, size))


def passes(row: Mapping[str, Any], entry: MixEntry, place: str) -> bool:
    """Whether every filtered column holds the value, or one of the values where the filter lists several."""
    for column, wanted in (entry.filter or {}).items():
        if column not in row:
            raise UnusableError(f"source '{entry.name}', {place}: the filter's column '{column}' is missing; the row has {', '.join(row)}.")
        found = row[column]
        if found != wanted and not (isinstance(wanted, list) and found in wanted):
            return False
    return True


class Generated:
    """Rows of a generator of the package; row i depends on its name, the seed and i alone."""

    total = None

    def __init__(self, name: str, seed: int):
        self.name, self.seed = name, seed
        try:
            builtin.generate(name, seed=seed, start=0)
        except ValueError as error:
            raise UnusableError(str(error)) from None

    def read(self, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        rows: list[Mapping[str, Any]] = []
        for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
            run_numbers = [number for _, number in run]
            rows += itertools.islice(builtin.generate(self.name, seed=self.seed, start=run_numbers[0]), len(run_numbers))
        return rows

    def place(self, number: int) -> str:
        return f"builtin:{self.name} row {number}"


class Lines:
    """One row per line that is not blank: JSON objects, or text in a column `text`. Only line offsets are in memory."""

    def __init__(self, path: Path, json_lines: bool):
        self.path, self.json_lines = path, json_lines
        starts, numbers, position = [], [], 0
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.isspace():
                    starts.append(position)
                    numbers.append(number)
                position += len(line)
        self.starts, self.numbers = np.array(starts, np.int64), np.array(numbers, np.int64)
        self.total = len(starts)

    def read(self, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        with self.path.open("rb") as stream:
            return [self._row(stream, number) for number in numbers]

    def _row(self, stream: Any, number: int) -> Mapping[str, Any]:
        stream.seek(int(self.starts[number]))
        line = stream.readline(MAX_SAMPLE_BYTES + 1)
        if len(line) > MAX_SAMPLE_BYTES:
            raise ValueError(f"{self.place(number)}: {too_long(None)}")
        text = _utf8(line, self.place(number)).rstrip("\r\n")
        if not self.json_lines:
            return {"text": text}
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{self.place(number)}: broken JSON ({error}). Every line takes one JSON object.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{self.place(number)}: a JSON {type(row).__name__}, but every line takes one JSON object.")
        return row

    def place(self, number: int) -> str:
        return f"{self.path.name}:{self.numbers[number]}"


class Records:
    """The objects of one JSON array, all in memory."""

    def __init__(self, path: Path, records: list[Any]):
        self.path, self.records, self.total = path, records, len(records)

    def read(self, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        for number in numbers:
            if not isinstance(self.records[number], dict):
                raise ValueError(f"{self.place(number)}: not a JSON object.")
        return [self.records[number] for number in numbers]

    def place(self, number: int) -> str:
        return f"{self.path.name} record {number + 1}"


class Document:
    """A whole file as one row with a column `text`."""

    total = 1

    def __init__(self, path: Path):
        self.path = path

    def read(self, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        return [self._row for _ in numbers]

    @cached_property
    def _row(self) -> Mapping[str, Any]:
        if (size := self.path.stat().st_size) > MAX_SAMPLE_BYTES:
            raise ValueError(f"{self.path.name}: {too_long(size)}")
        return {"text": _utf8(self.path.read_bytes(), self.path.name)}

    def place(self, number: int) -> str:
        return self.path.name


class Joined:
    """Several files one after another."""

    def __init__(self, parts: Sequence[Rows]):
        self.parts = parts
        self.offsets = np.cumsum([0, *(part.total for part in parts)])
        self.total = int(self.offsets[-1])

    def _locate(self, number: int) -> tuple[Rows, int]:
        part = int(np.searchsorted(self.offsets, number, side="right")) - 1
        return self.parts[part], number - int(self.offsets[part])

    def read(self, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        rows = []
        for number in numbers:
            part, local = self._locate(number)
            rows += part.read([local])
        return rows

    def place(self, number: int) -> str:
        part, local = self._locate(number)
        return part.place(local)


class Table:
    """A dataset in Arrow files, memory-mapped by `datasets`."""

    def __init__(self, dataset: Any, title: str):
        self.dataset, self.title, self.total = dataset, title, len(dataset)

    def read(self, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        columns = self.dataset[list(map(int, numbers))]
        return [dict(zip(columns, values)) for values in zip(*columns.values())]

    def place(self, number: int) -> str:
        return f"{self.title} row {number}"


class Stream:
    """A hub dataset read over the network in shuffled order; only forward reads are cheap, earlier rows start it again."""

    total = None

    def __init__(self, dataset: Any, title: str, entry: MixEntry):
        self.dataset, self.title, self.entry = dataset, title, entry
        self._iterator, self._next = iter(()), None

    def read(self, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        if not numbers:
            return []
        if self._next is None or numbers[0] < self._next:
            self._iterator, self._next = (row for row in self.dataset if passes(row, self.entry, self.title)), 0
        skipped = numbers[0] - self._next
        rows = list(itertools.islice(self._iterator, skipped, skipped + len(numbers)))
        self._next = numbers[0] + len(rows)
        return rows

    def place(self, number: int) -> str:
        return f"{self.title} streamed row {number}"


def too_long(size: int | None) -> str:
    """The message about a single sample above `MAX_SAMPLE_BYTES`."""
    found = f"{size:,} bytes" if size else f"more than {MAX_SAMPLE_BYTES:,} bytes"
    return f"one sample of {found}; at most {MAX_SAMPLE_BYTES:,} are read. Split it into several rows."


def _utf8(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 at byte {error.start} (0x{data[error.start]:02x}). Convert the file to UTF-8.") from None


def _open_files(entry: MixEntry, recipe_directory: Path, seed: int) -> Rows:
    path = local_path(entry.source, recipe_directory)
    if path.is_dir():
        return open_dataset(entry, str(path), seed)
    files = [Path(file) for file in source_files(entry, recipe_directory)]
    tables = [file for file in files if file.suffix == ".parquet"]
    parts = [_open_file(file, entry) for file in files if file.suffix != ".parquet"]
    if tables:
        parts.append(_open_parquet(tables, entry))
    return parts[0] if len(parts) == 1 else Joined(parts)


def _open_file(path: Path, entry: MixEntry) -> Rows:
    """.jsonl and .ndjson: a row per line; .json: an array, or lines; .txt: a row per line; any other: the file is one row."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return Lines(path, json_lines=True)
    if suffix == ".json":
        return _open_json(path, entry)
    return Lines(path, json_lines=False) if suffix == ".txt" else Document(path)


def _open_json(path: Path, entry: MixEntry) -> Rows:
    with path.open("rb") as stream:
        if not stream.read(64).lstrip().startswith(b"["):
            return Lines(path, json_lines=True)
    try:
        return Records(path, json.loads(path.read_bytes()))
    except ValueError as error:
        raise UnusableError(f"source '{entry.name}', {path.name}: broken JSON ({error}).") from None


def _open_parquet(files: Sequence[Path], entry: MixEntry) -> Rows:
    import datasets

    try:
        with _quiet(datasets):
            table = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except Exception as error:
        raise UnusableError(f"source '{entry.name}', {', '.join(file.name for file in files)}: {_reason(error)}") from None
    return Table(table, files[0].name if len(files) == 1 else f"{len(files)} parquet files")


def open_dataset(entry: MixEntry, path: str, seed: int) -> Rows:
    """A dataset in the hub's layout, from the hub or a local directory; streamed where it is large.

    Raises UnusableError naming source, reason and what would help.
    """
    import datasets

    try:
        with _quiet(datasets):
            builder = datasets.load_dataset_builder(path, entry.config, revision=entry.revision)
            if _bytes_of(builder, entry) > STREAM_ABOVE_BYTES:
                stream = builder.as_streaming_dataset(split=entry.split).shuffle(seed=seed, buffer_size=STREAM_BUFFER)
                return Stream(stream, entry.source, entry)
            return Table(datasets.load_dataset(path, entry.config, split=entry.split, revision=entry.revision), entry.source)
    except UnusableError:
        raise
    except Exception as error:  # datasets raises about twenty kinds here; all mean that this source cannot be read
        raise UnusableError(
            f"source '{entry.name}': {entry.source} (config {entry.config}, split {entry.split}) cannot be opened: {_reason(error)} "
            "Check the name, config and split, the network, and `hf auth login` for gated data; or give local files."
        ) from None


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
