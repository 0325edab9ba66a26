"""Defines the parts of a page: sections of blocks, plain data that the template renders and escapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar

LEFT, RIGHT = "left", "right"
"""How a table's columns are aligned."""


@dataclass(frozen=True)
class PageTable:
    """Rows of cells under columns of (name, LEFT | RIGHT)."""

    kind: ClassVar[str] = "table"
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    note: str = ""
    narrow: bool = False

    @property
    def headed(self) -> bool:
        """Whether any column has a name to show."""
        return any(name for name, _ in self.columns)


@dataclass(frozen=True)
class Chart:
    """A plotly figure with the sentence that says what to see in it. `live`: the name of the script that redraws it on
    the page.

    Colours are names of the stylesheet (`--accent`), so that one figure serves light and dark. `choices`: (option,
    label, values).
    """

    kind: ClassVar[str] = "chart"
    id: str
    title: str
    sentence: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)
    height: int = 320
    live: str = ""
    choices: Sequence[tuple[str, str, Sequence[tuple[str, str]]]] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> dict[str, Any]:
        return {"data": list(self.data), "layout": dict(self.layout), **self.extra}


@dataclass(frozen=True)
class Grid:
    """Blocks side by side where the screen is wide enough: three to a line, `wide` two."""

    kind: ClassVar[str] = "grid"
    blocks: Sequence[Any]
    wide: bool = False


@dataclass(frozen=True)
class Tiles:
    """Key figures: (label, value, note)."""

    kind: ClassVar[str] = "tiles"
    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Note:
    """A callout; `tone` is good, warn, bad or info."""

    kind: ClassVar[str] = "note"
    tone: str
    text: str = ""
    title: str = ""
    items: Sequence[str] = ()


@dataclass(frozen=True)
class Code:
    """Text to copy."""

    kind: ClassVar[str] = "code"
    text: str
    caption: str = ""


@dataclass(frozen=True)
class Folded:
    """Blocks behind a summary line."""

    kind: ClassVar[str] = "folded"
    summary: str
    blocks: Sequence[Any]


@dataclass(frozen=True)
class Slider:
    """How many experts per layer go, 0 to experts - 1; `decided` labels the button that returns to the recipe's own
    decision."""

    label: str
    experts: int
    start: int
    decided: str = ""


@dataclass(frozen=True)
class PageSection:
    """A heading, a lead sentence and blocks; `short` is its name in the navigation. `follows`: its charts obey the
    page's slider."""

    id: str
    title: str
    blocks: Sequence[Any]
    lead: str = ""
    short: str = ""
    follows: bool = False


@dataclass(frozen=True)
class Page:
    """A whole page. `badge` is (tone, text); `data` is what the live charts compute from; `slider` stays in sight over
    what follows it."""

    title: str
    eyebrow: str
    sections: Sequence[PageSection]
    subtitle: str = ""
    badge: tuple[str, str] | None = None
    footer: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    slider: Slider | None = None

    @property
    def groups(self) -> list[tuple[bool, list[PageSection]]]:
        """Sections in order, those that follow the slider together."""
        return [
            (follows, list(group)) for follows, group in groupby(self.sections, key=lambda section: section.follows)
        ]

    @property
    def has_charts(self) -> bool:
        return any(_has_chart(block) for section in self.sections for block in section.blocks)


def _has_chart(block: Any) -> bool:
    return isinstance(block, Chart) or any(_has_chart(inner) for inner in getattr(block, "blocks", ()))
