"""Compares recipes: fields that differ, and stages that cannot be shared. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from reapkit.core.errors import RecipeError
from reapkit.planning.recipe_differences import RecipeDifference, compare_recipes
from reapkit.recipe.loading import load
from reapkit.report.blocks import Note, Page, PageSection, PageTable
from reapkit.report.comparison.terms import ComparisonTerms
from reapkit.report.inspection.recognise import Found
from reapkit.report.inspection.render import Block
from reapkit.report.tables import difference_tables


def facts(found: Mapping[str, Found], terms: ComparisonTerms) -> dict[str, Any]:
    """`fields` that differ and `stages` that the second runs anew after the first; None where a model is not at
    hand."""
    if len(found) != 2:
        raise RecipeError(f"compare: found {len(found)} recipes. Give exactly two recipes.")
    left, right = (load(str(each.place)) for each in found.values())
    difference = compare_recipes(left, right, terms.make_plan)
    return {
        "fields": [{"path": path, "left": a, "right": b} for path, a, b in difference.fields],
        "stages": None if difference.stages is None else list(difference.stages),
    }


def blocks(found: Mapping[str, Any]) -> Sequence[Block | str]:
    """The fields in which they differ, and what that reruns."""
    fields = tuple((each["path"], each["left"], each["right"]) for each in found["fields"])
    return difference_tables(RecipeDifference(fields, None if found["stages"] is None else tuple(found["stages"])))


def page(found: Mapping[str, Any], places: Mapping[str, str]) -> Page:
    """The same to look at."""
    rows = [(each["path"], *(said(each[side]) for side in ("left", "right"))) for each in found["fields"]]
    stages = found["stages"]
    note = (
        "A model is not available here, so the stages that would rerun are unknown."
        if stages is None
        else f"If the first recipe has run, the second reruns: {', '.join(stages) or 'nothing'}."
    )
    inner: list[Any] = [
        Note("info", note),
        PageTable([("field", "left"), *((place, "left") for place in places.values())], rows),
    ]
    return Page(
        "How the recipes differ",
        "reapkit comparison of recipes",
        [
            PageSection(
                "fields", "Fields that differ" if rows else "The recipes have no differences", inner, "", "Fields"
            )
        ],
    )


def said(value: Any) -> str:
    """A field's value as the recipe would write it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list, bool, type(None))) else str(value)
