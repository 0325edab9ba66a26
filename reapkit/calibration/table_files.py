"""Looks into table files (parquet, Arrow, CSV, TSV) without reading them whole: their columns and first row.
Torch-free."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from reapkit.calibration.data_files import DAMAGED, PACKED, kind_of, unpacked_stream

SEPARATORS = {".csv": ",", ".tsv": "\t"}
AS_WRITTEN = {"keep_default_na": False, "index_col": False, "encoding": "utf-8-sig"}
"""How pandas reads a CSV file without changing it: a cell that says NA is the text NA."""


def columns(path: Path) -> Any:
    """The file's columns with their types, to be compared with those of other files; of CSV their names. Raises
    ValueError where the file cannot be read."""
    with _explained(path):
        if kind_of(path) in SEPARATORS:
            with unpacked_stream(path) as stream:
                return _csv(stream, path, 0).columns.tolist()
        if kind_of(path) == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_schema(path).remove_metadata()
        with path.open("rb") as stream:
            return _arrow(stream)[0].remove_metadata()


def head(path: Path, most: int) -> list[Mapping[str, Any]] | None:
    """At most so many of the first rows; None where only the whole file would tell. Raises ValueError where the file
    cannot be read."""
    with _explained(path), unpacked_stream(path) as stream:
        if kind_of(path) in SEPARATORS:
            rows = _csv(stream, path, most).to_dict("records")
        elif path.suffix.lower() in PACKED:
            return None  # such tables are read from their end
        elif kind_of(path) == ".arrow":
            batch = next((batch for batch in _arrow(stream)[1] if len(batch)), None)
            rows = [] if batch is None else batch.slice(0, most).to_pylist()
        else:
            import pyarrow.parquet as pq

            batch = next(pq.ParquetFile(path).iter_batches(batch_size=most), None)
            rows = [] if batch is None else batch.to_pylist()
    return [{str(name): value for name, value in row.items()} for row in rows]


def _csv(stream: IO[bytes], path: Path, rows: int) -> Any:
    import pandas as pd

    try:
        return pd.read_csv(stream, sep=SEPARATORS[kind_of(path)], nrows=rows, dtype=str, **cast(Any, AS_WRITTEN))
    except pd.errors.EmptyDataError:
        return pd.DataFrame()


def _arrow(stream: IO[bytes]) -> tuple[Any, Any]:
    """Schema and batches; of a stream, or of a file with an index at its end."""
    import pyarrow as pa

    try:
        reader = pa.ipc.open_stream(stream)
    except pa.ArrowInvalid:
        stream.seek(0)
        reader = pa.ipc.open_file(stream)
        return reader.schema, (reader.get_batch(number) for number in range(reader.num_record_batches))
    return reader.schema, reader


@contextmanager
def _explained(path: Path) -> Generator[None]:
    import pyarrow as pa

    kind = kind_of(path).lstrip(".")
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"not {'an' if kind == 'arrow' else 'a'} {kind} file ({error})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason}, byte 0x{error.object[error.start]:02x})") from None
    except DAMAGED as error:
        raise ValueError(f"cannot be read ({error})") from None
