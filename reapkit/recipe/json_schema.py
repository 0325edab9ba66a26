"""Writes the recipe language as JSON Schema, for editors."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, cast

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from reapkit.recipe.schema import NAME_OF, Recipe

Names = Mapping[str, Mapping[str, str]]
"""Kind of record (see schema.NameOf) -> its names, each with one line of description."""


_BOUNDS = (("gt", "exclusiveMinimum"), ("ge", "minimum"), ("lt", "exclusiveMaximum"), ("le", "maximum"))
_PERCENT = {"type": "string", "pattern": r"^\s*\d+(\.\d*)?\s*%\s*$"}


class _Generator(GenerateJsonSchema):
    """Fractions are numbers, or percentages as text."""

    def decimal_schema(self, schema: Any) -> JsonSchemaValue:
        bounds = {keyword: float(schema[name]) for name, keyword in _BOUNDS if schema.get(name) is not None}
        return {"anyOf": [{"type": "number", **bounds}, _PERCENT]}

    def encode_default(self, dft: Any) -> Any:
        return float(dft) if isinstance(dft, Decimal) else super().encode_default(dft)


def recipe_schema(names: Names) -> dict[str, Any]:
    """JSON Schema 2020-12 of a recipe file, `extends` and partial children included. `names`: what editors offer
    where a recipe names a record; other names stay allowed, as users have their own."""
    schema = _unwrapped(_with_names(_bounded(Recipe.model_json_schema(schema_generator=_Generator))))
    schema["$defs"] |= {kind: _choice(known) for kind, known in names.items()}
    schema["properties"] = {
        "extends": {
            "type": "string",
            "description": "Another recipe, relative to this file; this one is merged over it.",
        },
        **schema["properties"],
    }
    required = schema.pop("required")
    schema["if"] = {"not": {"required": ["extends"]}}  # a child may leave everything to its parent
    schema["then"] = {"required": required}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "reapkit recipe", **schema}


def _bounded(schema: Any) -> Any:
    """The schema with pydantic's names of bounds, which it leaves where a field may be null, as JSON Schema's."""
    if isinstance(schema, list):
        return [_bounded(value) for value in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    fields = {key: _bounded(value) for key, value in cast("dict[str, Any]", schema).items()}
    bounds = {keyword: fields.pop(name) for name, keyword in _BOUNDS if isinstance(fields.get(name), (int, float))}
    if bounds and "anyOf" in fields:
        fields["anyOf"] = [kind | bounds if kind.get("type") == "number" else kind for kind in fields["anyOf"]]
        return fields
    return {**fields, **bounds}


def _with_names(schema: Any) -> Any:
    """The schema with a reference to its kind's names in place of each marked string."""
    if isinstance(schema, list):
        return [_with_names(value) for value in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    fields = cast("dict[str, Any]", schema)
    if NAME_OF not in fields:
        return {key: _with_names(value) for key, value in fields.items()}
    rest = {key: value for key, value in fields.items() if key not in (NAME_OF, "type")}
    return {"$ref": f"#/$defs/{fields[NAME_OF]}", **rest}


def _choice(names: Mapping[str, str]) -> dict[str, Any]:
    known = [{"const": name, "description": line} for name, line in names.items()]
    return {"anyOf": [*known, {"type": "string"}]}


def _unwrapped(schema: Any) -> Any:
    """The schema with each description on one line: where a docstring breaks its lines means nothing to its readers."""
    if isinstance(schema, dict):
        return {
            key: " ".join(value.split()) if key == "description" and isinstance(value, str) else _unwrapped(value)
            for key, value in schema.items()
        }
    return [_unwrapped(value) for value in schema] if isinstance(schema, list) else schema
