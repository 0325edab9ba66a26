"""The recipe language as JSON Schema, for editors."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from reapkit.recipe.schema import Recipe


class _Generator(GenerateJsonSchema):
    """Fractions are plain numbers in a recipe, never strings."""

    def decimal_schema(self, schema: Any) -> JsonSchemaValue:
        number: JsonSchemaValue = {"type": "number"}
        for name, keyword in (
            ("gt", "exclusiveMinimum"),
            ("ge", "minimum"),
            ("lt", "exclusiveMaximum"),
            ("le", "maximum"),
        ):
            if schema.get(name) is not None:
                number[keyword] = float(schema[name])
        return number


def recipe_schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of a recipe file, `extends` and partial children included."""
    schema = _unwrapped(Recipe.model_json_schema(schema_generator=_Generator))
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


def _unwrapped(schema: Any) -> Any:
    """The schema with each description on one line: where a docstring breaks its lines means nothing to its readers."""
    if isinstance(schema, dict):
        return {
            key: " ".join(value.split()) if key == "description" and isinstance(value, str) else _unwrapped(value)
            for key, value in schema.items()
        }
    return [_unwrapped(value) for value in schema] if isinstance(schema, list) else schema
