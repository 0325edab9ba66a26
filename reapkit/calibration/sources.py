"""Opens the sources of the mix (generators, local files, hub datasets) and decides the order of their rows.
Torch-free."""

from __future__ import annotations

import hashlib
import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from reapkit.calibration.data_files import LINES, TABLES, LocalFile, is_local_data, misplaced, source_files
from reapkit.calibration.hub_files import fetched, has_path, hub_address, pinned
from reapkit.calibration.row_filter import passes
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
from reapkit.calibration.tables import STREAM_BUFFER, open_dataset, open_saved, open_tables
from reapkit.checkpoint.hub import known_commit
from reapkit.checkpoint.locate import local_path
from reapkit.core.errors import UnusableError
from reapkit.recipe.schema import MixEntry
from reapkit.recipe.split_expression import split_parts

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
        numbers = [self.number(position) for position in positions]
        if not isinstance(self.rows, StreamedRows):
            return _read_each(self.rows, numbers)
        try:
            return list(self.rows.read(numbers))
        except ValueError as error:
            raise UnusableError(f"source '{self.name}', {error}") from None

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
    rows = _open_outside(entry, recipe_directory, seed)
    if isinstance(rows, StreamedRows):
        return Walk(entry.name, rows, f"stream shuffled over {STREAM_BUFFER} rows", None, skip if held_out else 0)
    kept = _filtered(rows, _taken(rows, entry, recipe_directory), entry)
    numbers = kept[permutation(len(kept), seed, entry.name)]
    return Walk(entry.name, rows, "permutation", numbers[::-1] if held_out else numbers)


def _open_outside(entry: MixEntry, recipe_directory: Path, seed: int) -> CountedRows | StreamedRows:
    if is_local_data(entry.source, recipe_directory):
        return _open_local(entry, recipe_directory, seed)
    address = hub_address(entry.source)
    if address is None or not address.path:
        name, revision = (entry.source, entry.revision) if address is None else (address.name, pinned(entry, address))
        if (commit := known_commit(name, "dataset", revision)) is None and revision is None:
            raise UnusableError(
                f"source '{entry.name}': the hub cannot be asked which commit {name} has, and the local cache holds"
                " none or several. Go online, or write `revision:` beside the source."
            )
        return open_dataset(entry.model_copy(update={"revision": commit or revision}), name, seed)
    return _open_files(fetched(address, entry), entry)


def _taken(rows: CountedRows, entry: MixEntry, recipe_directory: Path) -> np.ndarray:
    """The numbers of the rows that the recipe's split takes; int64. What `datasets` opens by its split is taken
    whole."""
    by_name = not is_local_data(entry.source, recipe_directory) and not has_path(entry.source)
    if by_name or local_path(entry.source, recipe_directory).is_dir():
        return np.arange(rows.total)
    return np.concatenate([np.array(part.rows(rows.total), np.int64) for part in split_parts(entry.split)])


def permutation(count: int, seed: int, name: str) -> np.ndarray:
    """0 ... count - 1 in an order that depends on count, seed and name only; int64 [count].

    Sorted by the raw output of PCG64, whose stream numpy promises to keep (its `permutation` it does not).
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    return np.argsort(np.random.PCG64(key).random_raw(count), kind="stable") if count else np.empty(0, np.int64)


def _filtered(rows: CountedRows, numbers: np.ndarray, entry: MixEntry) -> np.ndarray:
    """Those of `numbers` whose rows pass the filter; a row that cannot be read does not end the run here."""
    if not entry.filter:
        return numbers
    looked_at = rows.only(tuple(entry.filter)) if isinstance(rows, (ArrowRows, Joined)) else rows
    kept, missing, seen = [], dict.fromkeys(entry.filter), FirstValues(entry.filter)
    first: int | None = None
    for start in range(0, len(numbers), 1000):
        chunk = numbers[start : start + 1000].tolist()
        for number, row in zip(chunk, _read_each(looked_at, chunk), strict=True):
            if isinstance(row, ValueError):
                kept.append(number)  # told with the others that cannot be read
                continue
            first = number if first is None else first
            missing = {column: None for column in missing if column not in row}
            seen.add(row)
            if passes(row, entry):
                kept.append(number)
    if missing and first is not None:
        _refuse_missing(next(iter(missing)), rows, first, entry)
    if not kept:
        raise UnusableError(
            f"source '{entry.name}': none of {len(numbers)} rows passes the filter {_shown(entry)}: {seen.told()}."
            " Change or remove `filter`."
        )
    return np.array(kept)


def _read_each(rows: Rows, numbers: Sequence[int]) -> list[Mapping[str, Any] | ValueError]:
    """Rows by number, with what is wrong with a row in its place where it cannot be read."""
    try:
        return list(rows.read(numbers))
    except ValueError as error:
        if len(numbers) == 1:
            return [error]
    return [row for number in numbers for row in _read_each(rows, [number])]


def _refuse_missing(column: str, rows: Rows, number: int, entry: MixEntry) -> None:
    [row] = rows.read([number])
    raise UnusableError(
        f"source '{entry.name}', {rows.place(number)}: the filter's column '{column}' is missing; the row has"
        f" {', '.join(row)}. Filter by one of these."
    )


def _shown(entry: MixEntry) -> Any:
    return entry.model_dump(mode="json")["filter"]


class FirstValues:
    """The first values of the filtered columns, to show where no row passes."""

    MOST = 5

    def __init__(self, columns: Iterable[str]):
        self.values: dict[str, dict[str, None]] = {column: {} for column in columns}

    def add(self, row: Mapping[str, Any]) -> None:
        for column, values in self.values.items():
            if len(values) < self.MOST:
                values[repr(row.get(column))[:40]] = None

    def told(self) -> str:
        return "; ".join(f"'{column}' holds {', '.join(values)}" for column, values in self.values.items())


def _open_local(entry: MixEntry, recipe_directory: Path, seed: int) -> CountedRows | StreamedRows:
    path = local_path(entry.source, recipe_directory)
    if wrong := misplaced(entry, recipe_directory):
        field, message = wrong
        raise UnusableError(f"source '{entry.name}': {field}: {message}")
    if path.is_dir():
        return open_saved(entry, path) or open_dataset(entry, str(path), seed)
    return _open_files(source_files(entry, recipe_directory), entry)


def _open_files(paths: Sequence[Path], entry: MixEntry) -> CountedRows:
    """The rows of files in the order of their names."""
    try:
        files = [LocalFile(path) for path in paths]
    except ValueError as error:
        raise UnusableError(f"source '{entry.name}', {error}.") from None
    parts: list[CountedRows] = []
    for kind, found in groupby(files, lambda file: file.kind):
        group = list(found)
        parts += open_tables(group, entry) if kind in TABLES else [_open_file(file, entry) for file in group]
    return parts[0] if len(parts) == 1 else Joined(parts)


def _open_file(file: LocalFile, entry: MixEntry) -> CountedRows:
    """.jsonl and .ndjson: a row per line; .json: an array, or lines; .txt: a row per line; any other: the file is one
    row."""
    if file.kind in LINES:
        return LineRows(file, json_lines=True)
    if file.kind == ".json":
        return _open_json(file, entry)
    return LineRows(file, json_lines=False) if file.kind == ".txt" else Document(file)


def _open_json(file: LocalFile, entry: MixEntry) -> CountedRows:
    with file.path.open("rb") as stream:
        if not stream.read(64).removeprefix(BOM_UTF8).lstrip().startswith(b"["):
            return LineRows(file, json_lines=True)
    try:
        return Records(file.name, json.loads(file.path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise UnusableError(
            f"source '{entry.name}', {file.name}: invalid JSON ({error}). Give a JSON array of objects, or JSON lines."
        ) from None
