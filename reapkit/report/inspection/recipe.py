"""Inspects a recipe, with its parents merged and all defaults filled in. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from reapkit.calibration.packing import largest_remainder
from reapkit.core.formatting import narrow_percent
from reapkit.recipe.loading import load
from reapkit.recipe.schema import Recipe
from reapkit.report.facts import recipe_yaml
from reapkit.report.inspection.render import Block, lines, table


def facts(file: Path) -> dict[str, Any]:
    """Every value that is in force, which of them the recipe says itself, and the mix in numbers. Raises as `load`."""
    recipe = load(file)
    plain = yaml.safe_load(recipe_yaml(recipe))
    fields = [{"path": path, "value": value, "default": default} for path, value, default in _fields(recipe, plain)]
    return {"recipe": plain, "fields": fields, "mix": _mix(recipe)}


def _fields(model: BaseModel, plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """(path, plain value, whether it is the default) of every leaf; an entry of the mix is one leaf, without its
    defaults."""
    for name in type(model).model_fields:
        value, path = getattr(model, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            yield from _fields(value, plain[name], f"{path}.")
        elif value and isinstance(value, (list, tuple)) and isinstance(value[0], BaseModel):
            for place, (item, entry) in enumerate(zip(value, plain[name], strict=True)):
                yield (
                    f"{path}[{place}]",
                    {key: entry[key] for key in type(item).model_fields if key in item.model_fields_set},
                    False,
                )
        else:
            yield path, plain[name], name not in model.model_fields_set


def _mix(recipe: Recipe) -> list[dict[str, Any]]:
    calibration = recipe.calibration
    unit, total = calibration.asked
    weights = [entry.weight for entry in calibration.mix]
    amounts = largest_remainder(total, weights) if calibration.shared_out == unit else [None] * len(weights)
    return [
        {
            "name": entry.name,
            "source": entry.source,
            "weight": str(entry.weight),
            "share": float(entry.weight / sum(weights)),
            unit: amount,
        }
        for entry, amount in zip(calibration.mix, amounts, strict=True)
    ]


def blocks(found: Mapping[str, Any], *, colour: bool) -> list[Block]:
    """The mix in numbers, then every field."""
    recipe = found["recipe"]
    unit = "samples" if recipe["calibration"]["samples"] is not None else "tokens"
    mix = [
        (
            entry["name"],
            entry["source"],
            entry["weight"],
            narrow_percent(entry["share"]),
            "-" if entry[unit] is None else entry[unit],
        )
        for entry in found["mix"]
    ]
    fields = [
        (field["path"], _shown(field["value"]), "default" if field["default"] else "") for field in found["fields"]
    ]
    return [
        lines(f"recipe {recipe['name']}" + (f": {recipe['description']}" if recipe["description"] else "")),
        table("Calibration mix", ("source", "from", "weight", "share", unit), mix, left=("from",)),
        table("Values in force", ("field", "value", ""), fields, left=("value", ""), whole=("field",)),
    ]


def _shown(value: Any) -> str:
    """As YAML on one line; long integers with underscores, which YAML reads."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}"
    return (
        yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
        .removesuffix("\n...\n")
        .strip()
    )
