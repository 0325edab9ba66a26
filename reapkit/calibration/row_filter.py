"""Decides which rows pass a source's filter. Torch-free."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping
from typing import Any

from reapkit.recipe.schema import Condition, MixEntry

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


def passes(row: Mapping[str, Any], entry: MixEntry) -> bool:
    """Whether every filtered column holds what the filter asks for; a column that a row does not have is null."""
    return all(admits(row.get(column), wanted) for column, wanted in (entry.filter or {}).items())


def missing_column(rows: Iterable[Mapping[str, Any]], entry: MixEntry) -> str | None:
    """The first column of the filter that none of the rows has."""
    missing = dict.fromkeys(entry.filter or ())
    for row in rows:
        missing = {column: None for column in missing if column not in row}
        if not missing:
            return None
    return next(iter(missing), None)


def admits(found: Any, wanted: Any) -> bool:
    """Whether a column's value is the wanted one, one of the wanted ones, or meets all parts of a condition.

    Numbers are compared as numbers, also where the column holds them as text; true and false are none. Null is neither
    in a range nor matched.
    """
    if not isinstance(wanted, Condition):
        return _same(found, wanted) or (isinstance(wanted, (list, tuple)) and any(_same(found, one) for one in wanted))
    return (
        (not wanted.excludes or not admits(found, wanted.not_))
        and (wanted.min is None or _reaches(found, wanted.min))
        and (wanted.max is None or _reaches(found, wanted.max, up_to=True))
        and (wanted.matches is None or (isinstance(found, str) and re.search(wanted.matches, found) is not None))
    )


def _same(found: Any, wanted: Any) -> bool:
    if wanted is None or found is None:
        return found is wanted
    if isinstance(wanted, bool) or isinstance(found, bool):
        return str(found).strip().lower() == str(wanted).lower() if type(wanted) is bool else False
    if _is_number(wanted):
        return _number(found) == wanted
    return _ordered(found) == wanted


def _reaches(found: Any, bound: Any, *, up_to: bool = False) -> bool:
    """Whether a value is at least `bound` (at most, with `up_to`); never, where the two cannot be compared."""
    value = _number(found) if _is_number(bound) else _ordered(found)
    if value is None or isinstance(value, str) != isinstance(bound, str) or not isinstance(value, (int, float, str)):
        return False
    return value <= bound if up_to else value >= bound


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> int | float | None:
    """The number that a value is, or that a text spells out."""
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value):
            return None
        return int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    if isinstance(value, bool):
        return None
    try:
        return value if isinstance(value, (int, float)) else float(value)
    except (TypeError, ValueError):
        return None


def _ordered(value: Any) -> Any:
    """A date or time as text in ISO form, whose order is that of time; other values as they are."""
    return value.isoformat() if isinstance(value, (datetime.date, datetime.datetime)) else value
