"""What two recipes do differently: fields, and the stages that one cannot take from the other. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reapkit.errors import UnusableError
from reapkit.planning import STAGES, make_plan
from reapkit.recipe.loading import LoadedRecipe


@dataclass(frozen=True)
class RecipeDifference:
    """Fields as (path, left, right), and the stages whose keys differ; None where a model is not at hand."""

    fields: tuple[tuple[str, Any, Any], ...]
    stages: tuple[str, ...] | None


def compare_recipes(left: LoadedRecipe, right: LoadedRecipe) -> RecipeDifference:
    """Raises RecipeError where one of them contradicts its checkpoint."""
    fields = tuple(_fields(left.recipe.model_dump(mode="json"), right.recipe.model_dump(mode="json"), ""))
    try:
        keys = [{stage.name: stage.key for stage in make_plan(each).stages} for each in (left, right)]
    except UnusableError:
        return RecipeDifference(fields, None)
    return RecipeDifference(fields, tuple(name for name in STAGES if keys[0].get(name) != keys[1].get(name)
                                          or name in keys[0] and keys[0][name] is None))


def _fields(left: Any, right: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Mappings by key and lists of named items by name; other values whole."""
    left, right = _by_name(left), _by_name(right)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in dict.fromkeys((*left, *right)):
            yield from _fields(left.get(key), right.get(key), f"{path}.{key}" if path else str(key))
    elif left != right:
        yield path, left, right


def _by_name(value: Any) -> Any:
    named = isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value)
    return {item["name"]: {key: inner for key, inner in item.items() if key != "name"} for item in value} if named else value
