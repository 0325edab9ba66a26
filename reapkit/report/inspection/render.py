"""Renders tables, lines and highlighted text for a terminal. Control characters in files are shown, not
obeyed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from reapkit.report.terminal_table import TerminalColumn, TerminalTable

Block = TerminalTable | Text | Group | Padding
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal might obey instead of showing: escape sequences, carriage returns, changes of direction."""
SCORED_STYLE = "black on green"
OPEN, CLOSE = "⟦", "⟧"
EXCERPT, LEAD = 900, 240  # characters of a sample that are shown, and of what comes before its first highlighted token


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    left: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> TerminalTable:
    """A table whose first column, and those named in `left`, hold text that may wrap unless in `whole`; the others hold
    numbers, set right."""
    made = TerminalTable(
        plain(title),
        [
            TerminalColumn(plain(name), "left" if text else "right", text and name not in whole)
            for name, text in ((name, place == 0 or name in left) for place, name in enumerate(columns))
        ],
    )
    for row in rows:
        made.add_row(*map(plain, row))
    return made


def lines(*texts: str, style: str = "") -> Text:
    """Lines of plain text; a line break within one stays."""
    return Text("\n".join(plain(text) for text in texts), style=style)


def notes(heading: str, texts: Sequence[str]) -> list[Text]:
    """`heading` and its lines, or nothing where there are none."""
    return [lines(heading, *(f"  {text}" for text in texts), "")] if texts else []


def plain(value: Any) -> str:
    """A value as one can read it: counts with thousands, None as a dash, control characters visible."""
    if value is None:
        return "-"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def all_last(by_source: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The items with the one of all sources together at the end, as in every table."""
    return sorted(by_source.items(), key=lambda item: item[0] == "all")


def excerpt(stretches: Sequence[Sequence[Any]]) -> list[tuple[str, bool]]:
    """[text, highlighted] stretches cut to what fits a screen: a little before the first highlight, then what
    follows."""
    shown, room = [], EXCERPT
    for place, (text, marked) in enumerate(stretches):
        if place == 0 and not marked and len(text) > LEAD:
            text = "…" + text[-LEAD:]
        if len(text) > room:
            shown.append((text[:room] + "…", bool(marked)))
            break
        shown.append((text, bool(marked)))
        room -= len(text)
    return shown


def highlighted(stretches: Sequence[tuple[str, bool]], *, colour: bool) -> Padding:
    """The text, indented, its marked stretches coloured or, without colour, between ⟦ and ⟧."""
    text = Text()
    for part, marked in stretches:
        part = plain(part)
        text.append(
            part if colour or not marked else f"{OPEN}{part}{CLOSE}", style=SCORED_STYLE if colour and marked else ""
        )
    text.rstrip()
    return Padding(text, (0, 0, 1, 2))
