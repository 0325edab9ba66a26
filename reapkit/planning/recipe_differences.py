"""Compares two recipes: fields that differ, and stages that cannot be shared. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reapkit.core.errors import UnusableError
from reapkit.planning.plan import Plan
from reapkit.recipe.loading import LoadedRecipe


@dataclass(frozen=True)
class RecipeDifference:
    """Fields as (path, left, right), and the stages whose keys differ; None where a model is not at hand."""

    fields: tuple[tuple[str, Any, Any], ...]
    stages: tuple[str, ...] | None


def compare_recipes(
    left: LoadedRecipe, right: LoadedRecipe, make_plan: Callable[[LoadedRecipe], Plan] | None
) -> RecipeDifference:
    """Raises RecipeError where one of them contradicts its checkpoint."""
    fields = tuple(
        (path, *values) for path, values in differing_fields([each.model_dump(mode="json") for each in (left, right)])
    )
    if make_plan is None:
        return RecipeDifference(fields, None)
    try:
        keys = [{stage.name: stage.key for stage in make_plan(each).stages} for each in (left, right)]
    except UnusableError:
        return RecipeDifference(fields, None)
    return RecipeDifference(
        fields,
        tuple(
            name
            for name in dict.fromkeys((*keys[0], *keys[1]))
            if keys[0].get(name) != keys[1].get(name) or (name in keys[0] and keys[0][name] is None)
        ),
    )


def differing_fields(recipes: Sequence[Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(path, what each says) of every field that is not the same in all: mappings by key and lists of named items by
    name, others whole."""
    yield from _differing([_by_name(recipe) for recipe in recipes], "")


def _differing(values: Sequence[Any], path: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    if all(isinstance(value, Mapping) for value in values):
        for key in dict.fromkeys(key for value in values for key in value):
            yield from _differing([_by_name(value.get(key)) for value in values], f"{path}.{key}" if path else str(key))
    elif any(value != values[0] for value in values):
        yield path, tuple(values)


def _by_name(value: Any) -> Any:
    named = isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value)
    return (
        {item["name"]: {key: inner for key, inner in item.items() if key != "name"} for item in value}
        if named
        else value
    )
