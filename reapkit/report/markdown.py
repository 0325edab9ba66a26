"""Writes parts of Markdown from text that may hold anything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def escaped(markdown: str) -> str:
    """Markdown in which nothing is raw HTML and no line opens a block of code, whatever names and descriptions hold."""
    return re.sub(r"(?m)^(\s*)(`{3,}|~{3,})", r"\1\\\2", markdown.replace("<", "&lt;"))


def fenced(language: str, text: str) -> str:
    """A block of code that no line of its text can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table, its cells on one line each."""

    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)
