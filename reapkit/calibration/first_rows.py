"""Looks at the first row of each local source before anything runs: is the file there, is it empty, has it the columns
that the recipe names. Torch-free, and quick whatever the size of the file.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reapkit.calibration.formats import recognise, to_sample
from reapkit.calibration.identity import is_local_data, source_files
from reapkit.calibration.row_readers import MAX_SAMPLE_BYTES
from reapkit.checkpoint.locate import local_path
from reapkit.core.errors import Problem, UnusableError
from reapkit.recipe.schema import MixEntry

LINES = (".jsonl", ".ndjson")


def first_row_problems(entry: MixEntry, path: str, directory: Path) -> list[Problem]:
    """What is wrong with a source of the recipe at `path`, as far as its files' first row shows; nothing of sources
    that do not lie on this machine. Relative files start from `directory`."""
    if entry.source.startswith("builtin:") or not is_local_data(entry.source, directory):
        return []
    if local_path(entry.source, directory).is_dir():
        return []  # a dataset in the hub's layout: only `datasets` can say
    try:
        files = [Path(file) for file in source_files(entry, directory)]
    except UnusableError:
        return [Problem(f"{path}.source", _nowhere(entry.source, directory))]
    problems = [_file_problem(file, entry, path) for file in files]
    return [problem for problem in problems if problem is not None][:1]


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
    return f"found '{source}', but {what} (looked in {folder}).{hint} Paths start from the recipe's folder."


def _file_problem(file: Path, entry: MixEntry, path: str) -> Problem | None:
    try:
        row = _first_row(file)
    except (OSError, ValueError) as error:
        return Problem(f"{path}.source", f"{file.name}: {error}. Give a file of rows that can be read.")
    if row is None:
        return None
    if not row:
        return Problem(f"{path}.source", f"{file.name} has no rows. Give a file with rows, or remove this source.")
    if missing := [column for column in entry.filter or {} if column not in row]:
        return Problem(
            f"{path}.filter.{missing[0]}",
            f"{file.name} has no column '{missing[0]}'; its first row has {', '.join(row)}. Filter by one of these.",
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
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _first_of_table(file)
    if suffix not in (*LINES, ".json", ".txt"):
        return {"text": "a document"} if file.stat().st_size else {}
    with file.open("rb") as stream:
        while (line := stream.readline(MAX_SAMPLE_BYTES)).isspace():
            pass
    if not line:
        return {}
    if suffix == ".txt":
        return {"text": line.decode("utf-8")}
    if suffix == ".json" and line.lstrip().startswith(b"["):
        return None
    row = json.loads(line.decode("utf-8-sig"))
    if not isinstance(row, Mapping):
        raise ValueError(f"the first line is {type(row).__name__}, not an object")
    return row


def _first_of_table(file: Path) -> Mapping[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        rows = next(table.iter_batches(batch_size=1), None)
    except pa.ArrowInvalid as error:
        raise ValueError(f"not a parquet file ({error})") from None
    return {} if rows is None or not len(rows) else rows.to_pylist()[0]
