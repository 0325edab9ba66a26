"""Looks at the first row of each local source before anything runs: is the file there, is it empty, has it the columns
that the recipe names. Torch-free, and quick whatever the size of the file.
"""

from __future__ import annotations

import difflib
import json
import os
from codecs import BOM_UTF8
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from reapkit.calibration.data_files import (
    DAMAGED,
    LINES,
    PACKED,
    TABLES,
    is_local_data,
    kind_of,
    misplaced,
    saved_files,
    saved_splits,
    source_files,
    unpacked_stream,
)
from reapkit.calibration.formats import recognise, to_sample
from reapkit.calibration.row_filter import missing_column, passes
from reapkit.calibration.row_readers import MAX_SAMPLE_BYTES
from reapkit.calibration.table_files import head
from reapkit.checkpoint.locate import local_path
from reapkit.core.errors import Problem, UnusableError
from reapkit.recipe.schema import MixEntry
from reapkit.recipe.split_expression import split_parts

FILTERED_ROWS = 1000
"""Rows of which one must have a filtered column: lines may leave out what is null."""


def first_row_problems(entry: MixEntry, path: str, directory: Path) -> list[Problem]:
    """What is wrong with a source of the recipe at `path`, as far as its files' first row shows; nothing of sources
    that do not lie on this machine. Relative files start from `directory`."""
    if entry.source.startswith("builtin:") or not is_local_data(entry.source, directory):
        return []
    if wrong := misplaced(entry, directory):
        field, message = wrong
        return [Problem(f"{path}.{field}", f"found {message}")]
    try:
        files = _files(entry, directory)
    except UnusableError:
        return [Problem(f"{path}.source", _nowhere(entry.source, directory))]
    problems = [_file_problem(file, entry, path) for file in files]
    return [problem for problem in problems if problem is not None][:1]


def first_rows(entry: MixEntry, directory: Path, most: int) -> Iterator[Mapping[str, Any]]:
    """At most so many rows at the head of a local source's first file, those that can be read and pass the source's
    filter; none where `first_row_problems` has something to say, or only the whole file would tell."""
    if first_row_problems(entry, "", directory) or not (files := _files(entry, directory)):
        return
    if row := _first_row(files[0]):
        yield from (each for each in _first_rows(files[0], row, most) if passes(each, entry))


def _files(entry: MixEntry, directory: Path) -> list[Path]:
    """The files that are looked at; none of a dataset in the hub's layout, of which only `datasets` can say more.
    Raises UnusableError where there are none."""
    place = local_path(entry.source, directory)
    if not place.is_dir():
        return source_files(entry, directory)
    splits = saved_splits(place)
    folders = {} if splits is None else {splits[part.name]: None for part in split_parts(entry.split)}
    return [folder / saved_files(folder)[-1] for folder in folders]


def _nowhere(source: str, directory: Path) -> str:
    """A file that is not there, and the names beside it that are near."""
    place = local_path(source, directory)
    folder = place.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    missing = place.relative_to(folder).parts[0] if place != folder else place.name
    near = difflib.get_close_matches(missing, [found.name for found in folder.iterdir()], n=1, cutoff=0.6)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    what = "no file matches this pattern" if any(mark in source for mark in "*?[") else "the file does not exist"
    looked = os.path.normpath(folder)
    return f"found '{source}', but {what} (looked in {looked}).{hint} Paths start from the recipe's folder."


def _file_problem(file: Path, entry: MixEntry, path: str) -> Problem | None:
    try:
        row = _first_row(file)
    except (OSError, ValueError) as error:
        return Problem(f"{path}.source", f"{file.name}: {error}. Give a file of rows that can be read.")
    if row is None:
        return None
    if not row:
        return Problem(f"{path}.source", f"{file.name} has no rows. Give a file with rows, or remove this source.")
    if entry.filter and (column := missing_column(_first_rows(file, row), entry)) is not None:
        return Problem(
            f"{path}.filter.{column}",
            f"{file.name} has no column '{column}'; its first row has {', '.join(row)}. Filter by one of these.",
        )
    try:
        to_sample(row, entry.format or recognise(row))
    except ValueError as error:
        return Problem(f"{path}.format", f"{file.name}, first row: {error}.")
    return None


def _first_row(file: Path) -> Mapping[str, Any] | None:
    """The first row; an empty one where there is none, None where only the whole file would tell.

    Raises ValueError for a row that cannot be read, OSError for a file.
    """
    kind = kind_of(file)
    if kind in TABLES:
        return next(iter(rows), {}) if (rows := head(file, 1)) is not None else None
    with _readable(file) as stream:
        if kind not in (*LINES, ".json", ".txt"):
            return {"text": "a document"} if stream.read(1) else {}
        line = _next_line(stream)
    if not line:
        return {}
    if kind == ".txt":
        return {"text": line.decode("utf-8")}
    return None if kind == ".json" and line.lstrip().startswith(b"[") else _object(line)


def _first_rows(file: Path, row: Mapping[str, Any], most: int = FILTERED_ROWS) -> Iterator[Mapping[str, Any]]:
    """The first row, and those behind it that can be read, of at most so many."""
    yield row
    if kind_of(file) in TABLES:
        yield from (head(file, most) or [])[1:]
    if kind_of(file) not in (*LINES, ".json"):
        return
    with _readable(file) as stream:
        _next_line(stream)
        for _ in range(most - 1):
            if not (line := _next_line(stream)):
                return
            with suppress(ValueError):
                yield _object(line)


@contextmanager
def _readable(file: Path) -> Generator[IO[bytes]]:
    """The file's content, unpacked. What is wrong with its compression is a ValueError."""
    with unpacked_stream(file) as stream:
        try:
            yield stream
        except DAMAGED as error:
            raise ValueError(f"cannot be unpacked ({error})" if file.suffix.lower() in PACKED else str(error)) from None


def _next_line(stream: IO[bytes]) -> bytes:
    """The next line that is not blank, without a byte order mark; empty at the end."""
    while (line := stream.readline(MAX_SAMPLE_BYTES).removeprefix(BOM_UTF8)).isspace():
        pass
    return line


def _object(line: bytes) -> Mapping[str, Any]:
    row = json.loads(line.decode("utf-8"))
    if not isinstance(row, Mapping):
        raise ValueError(f"the first line is {type(row).__name__}, not an object")
    return row
