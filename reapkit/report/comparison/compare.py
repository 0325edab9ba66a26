"""Compares several observations, selections, runs or recipes: facts for machines, tables for people, one page.

Torch only where observations are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from reapkit.core.errors import RecipeError, UnusableError
from reapkit.core.formatting import plural
from reapkit.report.comparison.terms import ComparisonTerms
from reapkit.report.inspection.recognise import Found, recognise
from reapkit.report.inspection.render import Block, lines

KINDS = {"recipe": "recipes", "observation": "observations", "selection": "selections", "run": "runs"}
"""What can be compared, and the module of this package that does."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Comparison:
    """Things of one kind under the letters A, B, …, and what was found (plain JSON data)."""

    kind: str
    places: Mapping[str, str]
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Everything the tables show, exact."""
        return {"kind": self.kind, "compared": dict(self.places), **self.facts}

    def blocks(self) -> list[Block]:
        """What a terminal prints, in order."""
        legend = lines(*(f"{letter} = {place}" for letter, place in self.places.items()), "")
        return [legend, *_module(self.kind).blocks(self.facts)]

    def save_page(self, out_html: Path) -> None:
        """Writes the comparison as one HTML page that opens offline: equal facts, equal bytes."""
        from reapkit.report.page import write_page

        write_page(_module(self.kind).page(self.facts, self.places), out_html)


def compare(paths: Sequence[str | Path], terms: ComparisonTerms | None = None) -> Comparison:
    """Compares recipes, observations, selections or runs, told apart by what lies at the paths.

    Raises RecipeError for fewer than two, kinds that cannot be compared, or kinds mixed; UnusableError where one cannot
    be read or does not belong to the others' model.
    """
    terms = terms or ComparisonTerms()
    if not 2 <= len(paths) <= len(LETTERS):
        raise RecipeError(f"compare: found {plural(len(paths), 'path')}. Give 2 to {len(LETTERS)}.")
    found = [recognise(path) for path in paths]
    kind = _one_kind(paths, found)
    places = dict(zip(LETTERS, map(str, paths), strict=False))
    try:
        return Comparison(kind, places, _module(kind).facts(dict(zip(places, found, strict=True)), terms))
    except (LookupError, TypeError, ValueError, AttributeError, OSError, SafetensorError) as error:
        raise UnusableError(
            f"compare: one of these {KINDS[kind]} cannot be read ({type(error).__name__}: {error}), so it is damaged"
            " or of another version. Run `reapkit inspect` on each to find it."
        ) from error


def _one_kind(paths: Sequence[str | Path], found: Sequence[Found]) -> str:
    kinds = [each.kind for each in found]
    listed = "; ".join(f"{path}: {_named(kind)}" for path, kind in zip(paths, kinds, strict=True))
    if strange := [kind for kind in kinds if kind not in KINDS]:
        raise RecipeError(
            f"compare: {_named(strange[0])} cannot be compared. Found {listed}. Give only recipes, only observations,"
            " only selections or only runs."
        )
    if len(set(kinds)) > 1:
        inside = {"observation", "selection"} & set(kinds)
        advice = (
            f" Of a run, give {' or '.join(sorted(f'RUN/{kind}' for kind in inside))}."
            if "run" in kinds and inside
            else ""
        )
        raise RecipeError(f"compare: different kinds cannot be compared. Found {listed}.{advice}")
    return str(kinds[0])


def _named(kind: str | None) -> str:
    return "an artifact whose files were deleted" if kind is None else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _module(kind: str) -> Any:
    return import_module(f"reapkit.report.comparison.{KINDS[kind]}")
