"""Filters: which values pass which condition, written out."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reapkit.calibration.row_filter import admits
from reapkit.calibration.sources import open_walk
from reapkit.core.errors import UnusableError
from reapkit.recipe.schema import MixEntry
from tests.support.words import write_lines


def entry(**filter: Any) -> MixEntry:
    return MixEntry.model_validate({"name": "data", "source": "data.jsonl", "filter": filter}, strict=False)


VALUES: list[Any] = [None, True, False, 1, 2, 2.5, 10, "2", " 10 ", "1e1", "two", "", "nan", [1, "two"], float("nan")]


@pytest.mark.parametrize(
    ("wanted", "passing"),
    [
        ("two", ["two"]),
        (2, [2, "2"]),
        (10.0, [10, " 10 ", "1e1"]),
        ("2", ["2"]),
        (True, [True]),
        (None, [None]),
        ("", [""]),
        (["two", 2, None], [None, 2, "2", "two"]),
        ([1, "two"], [1, "two", [1, "two"]]),
        ({"min": 2}, [2, 2.5, 10, "2", " 10 ", "1e1"]),
        ({"max": 2}, [1, 2, "2"]),
        ({"min": 2, "max": 2.5}, [2, 2.5, "2"]),
        ({"min": "t"}, ["two"]),
        ({"max": "2"}, [" 10 ", "1e1", "2", ""]),
        ({"not": 2, "min": 2}, [2.5, 10, " 10 ", "1e1"]),
        ({"not": ["two", None], "matches": "^[a-z]*$"}, ["", "nan"]),
        ({"matches": "w"}, ["two"]),
        ({"matches": "^\\s*1"}, [" 10 ", "1e1"]),
    ],
)
def test_which_values_pass(wanted: Any, passing: list[Any]) -> None:
    condition = entry(column=wanted).filter["column"]
    found = [value for value in VALUES if admits(value, condition)]
    assert [repr(value) for value in found] == [repr(value) for value in VALUES if _among(value, passing)]
    assert len(found) == len(passing)


def _among(value: Any, values: list[Any]) -> bool:
    return any(type(value) is type(other) and value == other for other in values)


@pytest.mark.parametrize("excluded", [None, 2, "two", [None, True]])
def test_not_is_the_opposite(excluded: Any) -> None:
    plain, negated = entry(column=excluded).filter["column"], entry(column={"not": excluded}).filter["column"]
    assert [admits(value, negated) for value in VALUES] == [not admits(value, plain) for value in VALUES]


def test_dates_are_compared_as_text_in_iso_form() -> None:
    since = entry(day={"min": "2024-03-01"}).filter["day"]
    assert [admits(day, since) for day in (datetime.date(2024, 2, 29), datetime.date(2024, 3, 1), "2024-10-01")] == [
        False,
        True,
        True,
    ]
    assert admits(datetime.datetime(2024, 3, 1, 12), since) and not admits(20240401, since)


def test_large_whole_numbers_are_compared_exactly() -> None:
    assert not admits("9007199254740993", 9007199254740992) and admits("9007199254740993", 9007199254740993)


def kept(folder: Path, **filter: Any) -> list[int]:
    walk = open_walk(entry(**filter), folder, seed=1)
    return sorted(row["n"] for row in walk.read(range(walk.length)))


def test_rows_that_leave_a_column_out_hold_null_there(tmp_path: Path) -> None:
    write_lines(tmp_path / "data.jsonl", [{"n": 0}, {"n": 1, "topic": "a"}, {"n": 2, "topic": None}])
    assert kept(tmp_path, topic=None) == [0, 2]
    assert kept(tmp_path, topic={"not": None}) == [1]
    assert kept(tmp_path, topic={"not": "a"}) == [0, 2]
    with pytest.raises(UnusableError, match=r"data\.jsonl:1: the filter's column 'topics' is missing; the row has n\."):
        kept(tmp_path, topics="a")


def test_where_no_row_passes_the_error_shows_what_there_is(tmp_path: Path) -> None:
    write_lines(tmp_path / "data.jsonl", [{"n": 0, "topic": "Math"}, {"n": 1, "topic": "code"}])
    with pytest.raises(UnusableError) as error:
        kept(tmp_path, topic={"matches": "^math"})
    assert str(error.value) == (
        "source 'data': none of 2 rows passes the filter {'topic': {'matches': '^math'}}: 'topic' holds 'Math', 'code'."
        " Change or remove `filter`."
    )
    assert kept(tmp_path, topic={"matches": "(?i)^math"}) == [0]


def test_a_row_that_cannot_be_read_does_not_end_the_filter(tmp_path: Path) -> None:
    write_lines(tmp_path / "data.jsonl", [{"n": 0, "topic": "a"}, "{", {"n": 2, "topic": "b"}])
    walk = open_walk(entry(topic="b"), tmp_path, seed=1)
    assert sorted(map(repr, walk.read_each(range(walk.length))))[1] == "{'n': 2, 'topic': 'b'}"
    assert walk.length == 2  # the broken row is told with the others that cannot be read


def test_tables_are_filtered_by_the_columns_that_they_have(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [0, 1], "stars": [3, 5]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": [2, 3], "other": ["x", "y"]}), tmp_path / "b.parquet")
    chosen = entry(stars={"min": 4}).model_copy(update={"source": "*.parquet"})
    walk = open_walk(chosen, tmp_path, seed=1)
    assert walk.read(range(walk.length)) == [{"n": 1, "stars": 5}]
