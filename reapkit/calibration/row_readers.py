"""Reads numbered rows from every kind of source: generators, lines, JSON arrays, documents, Arrow tables, streams.
Torch-free."""

from __future__ import annotations

import itertools
import json
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from reapkit.calibration.builtin import generators
from reapkit.calibration.data_files import DATA_SUFFIXES, LocalFile
from reapkit.core.errors import UnusableError

MAX_SAMPLE_BYTES = 8 << 20
"""A longer single sample is a mistake in the data (a whole file in one row), and tokenizing it would take gigabytes."""


class Rows(Protocol):
    """Numbered rows."""

    def read(self, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        """Rows by number. Raises ValueError beginning with the row's place."""
        ...

    def place(self, number: int) -> str:
        """What a user would call the row, e.g. `data.jsonl:17`."""
        ...


class CountedRows(Rows, Protocol):
    """Rows with an end: `total` of them."""

    @property
    def total(self) -> int: ...


class Generated:
    """Rows of a generator of the package, without end; row i depends on its name, the seed and i alone."""

    def __init__(self, name: str, seed: int):
        self.name, self.seed = name, seed
        try:
            generators.generate(name, seed=seed, start=0)
        except ValueError as error:
            raise UnusableError(str(error)) from None

    def read(self, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        rows: list[Mapping[str, Any]] = []
        for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
            run_numbers = [number for _, number in run]
            rows += itertools.islice(
                generators.generate(self.name, seed=self.seed, start=run_numbers[0]), len(run_numbers)
            )
        return rows

    def place(self, number: int) -> str:
        return f"builtin:{self.name} row {number}"


class LineRows:
    """One row per line that is not blank: JSON objects, or text in a column `text`. Only line offsets are in memory."""

    def __init__(self, file: LocalFile, json_lines: bool):
        self.file, self.json_lines = file, json_lines
        starts, numbers, position = [], [], 0
        with file.path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.removeprefix(BOM_UTF8).strip():
                    starts.append(position)
                    numbers.append(number)
                position += len(line)
        self.starts, self.numbers = np.array(starts, np.int64), np.array(numbers, np.int64)
        self.total = len(starts)

    def read(self, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        with self.file.path.open("rb") as stream:
            return [self._row(stream, number) for number in numbers]

    def _row(self, stream: Any, number: int) -> Mapping[str, Any]:
        stream.seek(int(self.starts[number]))
        line = stream.readline(MAX_SAMPLE_BYTES + 1)
        if len(line) > MAX_SAMPLE_BYTES:
            raise ValueError(f"{self.place(number)}: {too_long(None)}")
        text = _utf8(line.removeprefix(BOM_UTF8), self.place(number)).rstrip("\r\n")
        if not self.json_lines:
            return {"text": text}
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.place(number)}: invalid JSON ({error}). Every line must hold one JSON object."
            ) from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{self.place(number)}: found a JSON {type(row).__name__}, but every line must hold one JSON object."
            )
        return row

    def place(self, number: int) -> str:
        return f"{self.file.name}:{self.numbers[number]}"


class Records:
    """The objects of one JSON array, all in memory."""

    def __init__(self, name: str, records: list[Any]):
        self.name, self.records, self.total = name, records, len(records)

    def read(self, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        for number in numbers:
            if not isinstance(self.records[number], dict):
                raise ValueError(f"{self.place(number)}: not a JSON object. Every item must be a JSON object.")
        return [self.records[number] for number in numbers]

    def place(self, number: int) -> str:
        return f"{self.name} record {number + 1}"


class Document:
    """A whole file as one row with a column `text`."""

    total = 1

    def __init__(self, file: LocalFile):
        self.file = file

    def read(self, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        return [self._row for _ in numbers]

    @cached_property
    def _row(self) -> Mapping[str, Any]:
        if (size := self.file.path.stat().st_size) > MAX_SAMPLE_BYTES:
            raise ValueError(f"{self.file.name}: {too_long(size)}")
        return {"text": _utf8(self.file.path.read_bytes().removeprefix(BOM_UTF8), self.file.name)}

    def place(self, number: int) -> str:
        return self.file.name


class Joined:
    """Several files one after another."""

    def __init__(self, parts: Sequence[CountedRows]):
        self.parts = parts
        self.offsets = np.cumsum([0, *(part.total for part in parts)])
        self.total = int(self.offsets[-1])

    def only(self, columns: Sequence[str]) -> Joined:
        """As that of `ArrowRows`, where parts are tables."""
        return Joined([part.only(columns) if isinstance(part, ArrowRows) else part for part in self.parts])

    def _locate(self, number: int) -> tuple[CountedRows, int]:
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


class ArrowRows:
    """A dataset in Arrow files, memory-mapped by `datasets`; `revision` is the hub's commit, `held` what must not go
    while it is read."""

    def __init__(self, dataset: Any, title: str, revision: str | None = None, held: Any = None):
        self.dataset, self.title, self.total, self.revision = dataset, title, len(dataset), revision
        self.held = held

    def only(self, columns: Sequence[str]) -> ArrowRows:
        """The same rows with these columns alone, where it has one of them; reading long texts just to filter takes
        minutes."""
        known = [column for column in columns if column in self.dataset.column_names]
        return ArrowRows(self.dataset.select_columns(known), self.title) if known else self

    def read(self, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        columns = self.dataset[list(map(int, numbers))]
        return [
            dict(zip(columns, map(_without_nulls, values), strict=True))
            for values in zip(*columns.values(), strict=True)
        ]

    def place(self, number: int) -> str:
        return f"{self.title} row {number}"


class StreamedRows:
    """A hub dataset read over the network in shuffled order, of unknown length; only forward reads are cheap, earlier
    rows start it again."""

    def __init__(
        self, dataset: Any, title: str, keep: Callable[[Mapping[str, Any]], bool], revision: str | None = None
    ):
        self.dataset, self.title, self.keep, self.revision = dataset, title, keep, revision
        self._iterator, self._next = iter(()), None

    def read(self, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        if not numbers:
            return []
        if self._next is None or numbers[0] < self._next:
            self._iterator, self._next = filter(self.keep, self.dataset), 0
        skipped = numbers[0] - self._next
        rows: list[Mapping[str, Any]] = [
            {column: _without_nulls(value) for column, value in row.items()}
            for row in itertools.islice(self._iterator, skipped, skipped + len(numbers))
        ]
        self._next = numbers[0] + len(rows)
        return rows

    def place(self, number: int) -> str:
        return f"{self.title} streamed row {number}"


def _without_nulls(value: Any) -> Any:
    """Columnar files give every record every key of every other record; those nulls were never written by anyone."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(item) for item in value]
    return value


def too_long(size: int | None) -> str:
    """The message about a single sample above `MAX_SAMPLE_BYTES`."""
    found = f"{size:,} bytes" if size else f"more than {MAX_SAMPLE_BYTES:,} bytes"
    return f"one sample has {found}; the limit is {MAX_SAMPLE_BYTES:,}. Split it into several rows."


def _utf8(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} (0x{data[error.start]:02x})"
        raise ValueError(
            f"{place}: not UTF-8 at {found}. Save the file as UTF-8, or give it the suffix of what it holds:"
            f" {', '.join(DATA_SUFFIXES)}."
        ) from None
