"""Draws a table for a terminal of any width: as columns where no word and no number breaks, else row by row, stacked.
Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

GAP, EDGES = 3, 2  # characters between two columns, and at the sides
READABLE = 20
"""The narrowest column of sentences that one likes to read."""
LONGEST_WORD = 40
"""Hashes and paths beyond it may break."""


@dataclass(frozen=True)
class TerminalColumn:
    """A column: `wraps` where its text may take several lines, `extra` where it may go before anything else does."""

    name: str
    justify: Literal["left", "right"] = "left"
    wraps: bool = False
    extra: bool = False


@dataclass
class TerminalTable:
    """Rows under columns, with a title. Cells are plain text."""

    title: str
    columns: Sequence[TerminalColumn]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add_row(self, *cells: str) -> None:
        """Raises ValueError where the row has not a cell for each column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{self.title}: {len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        every = list(range(len(self.columns)))
        for places in (every, [place for place in every if not self.columns[place].extra]):
            if self._width(places) <= options.max_width:
                yield self._drawn(places)
                return
        yield Text("\n".join([*_wrapped(self.title, options.max_width), "", *self._stacked(options.max_width)]))

    def _least(self, place: int) -> int:
        """The narrowest that a column may be."""
        column = self.columns[place]
        cells = [column.name, *(row[place] for row in self.rows)]
        longest = max(len(line) for cell in cells for line in (cell.splitlines() or [""]))
        if not column.wraps:
            return longest
        words = [len(word) for cell in cells for word in cell.split() or [""]]
        return max(min(READABLE, longest), *(min(length, LONGEST_WORD) for length in words))

    def _width(self, places: Sequence[int]) -> int:
        return sum(map(self._least, places)) + GAP * (len(places) - 1) + EDGES

    def _drawn(self, places: Sequence[int]) -> Table:
        made = Table(title=Text(self.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for place in places:
            column = self.columns[place]
            made.add_column(
                Text(column.name),
                justify=column.justify,
                overflow="fold",
                no_wrap=not column.wraps,
                min_width=self._least(place),
            )
        for row in self.rows:
            made.add_row(*(Text(row[place]) for place in places))
        return made

    def _stacked(self, width: int) -> Iterator[str]:
        """Each row as its first cell and, below it, the others with their columns' names."""
        label = max((len(column.name) for column in self.columns[1:]), default=0)
        for row in self.rows:
            numbered = f"{self.columns[0].name} {row[0]}" if row[0].isdigit() else row[0]
            yield from _wrapped(numbered.strip(), width)
            for column, cell in zip(self.columns[1:], row[1:], strict=True):
                yield from _labelled(column.name, cell, label, width)
            yield ""


def _wrapped(text: str, width: int) -> list[str]:
    return wrap(text, max(8, width), break_on_hyphens=False) or [""]


def _labelled(name: str, cell: str, label: int, width: int) -> Iterator[str]:
    """A cell beside its column's name; below it where a word would break otherwise. Nothing for an empty cell."""
    if not cell.strip():
        return
    start = f"  {name:<{label}}  " if name else "  "
    if max(map(len, cell.split())) <= width - len(start):
        first, *rest = wrap(cell, width - len(start), break_on_hyphens=False)
        yield start + first
        yield from (" " * len(start) + line for line in rest)
        return
    if name:
        yield f"  {name}"
    yield from wrap(cell, max(8, width), initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
