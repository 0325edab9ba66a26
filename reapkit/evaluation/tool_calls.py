"""Checks function calls in generated text against the JSON schemas of the prompt. Torch-free.

Works on text as chat templates of the JSON kind render it: schemas as `{"name", "parameters"}` (maybe under
`function`), calls as `{"name", "arguments"}`. Templates that write calls otherwise yield no calls, and nothing is
measured there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """Every outermost JSON object in `text`, in order; what does not parse is passed over."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            found, end = decoder.raw_decode(text, at)
        except ValueError:
            end = at + 1
        else:
            yield found
        at = text.find("{", end)


def offered_tools(prompt: str) -> dict[str, Mapping[str, Any]]:
    """Name to parameter schema of each function that `prompt` describes."""
    described = (found.get("function", found) for found in json_objects(prompt))
    return {
        each["name"]: each["parameters"]
        for each in described
        if isinstance(each, dict) and isinstance(each.get("name"), str) and isinstance(each.get("parameters"), dict)
    }


def calls(text: str) -> list[tuple[str, Any]]:
    """(name, arguments) of each call in `text`; arguments given as a JSON string are decoded where they can be."""
    return [
        (found["name"], _decoded(found["arguments"]))
        for found in json_objects(text)
        if isinstance(found.get("name"), str) and "arguments" in found
    ]


def valid_calls(text: str, tools: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether `text` calls something, and every call names an offered function with arguments that its schema
    allows."""
    found = calls(text)
    return bool(found) and all(
        name in tools and schema_problem(arguments, {"type": "object", **tools[name]}) is None
        for name, arguments in found
    )


def schema_problem(value: Any, schema: Mapping[str, Any], path: str = "$") -> str | None:
    """What is wrong with `value`, None if nothing is.

    Reads type, enum, const, required, properties, additionalProperties, items, anyOf and oneOf of JSON Schema.
    Deviation: an object whose schema lists properties has no others unless additionalProperties says so: an invented
    argument breaks a call.
    """
    allowed = schema.get("type")
    if allowed is not None and not any(
        _is_a(value, name) for name in (allowed if isinstance(allowed, list) else [allowed])
    ):
        return f"{path}: not of type {allowed}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{path}: none of {schema['enum']}"
    if "const" in schema and value != schema["const"]:
        return f"{path}: not {schema['const']!r}"
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema and all(schema_problem(value, each, path) for each in schema[keyword]):
            return f"{path}: fits no case of {keyword}"
    if isinstance(value, dict):
        return _object_problem(value, schema, path)
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return next(
            (
                problem
                for i, each in enumerate(value)
                if (problem := schema_problem(each, schema["items"], f"{path}[{i}]"))
            ),
            None,
        )
    return None


def _object_problem(value: Mapping[str, Any], schema: Mapping[str, Any], path: str) -> str | None:
    if missing := [name for name in schema.get("required") or () if name not in value]:
        return f"{path}: lacks {', '.join(missing)}"
    properties, others = (
        schema.get("properties") or {},
        schema.get("additionalProperties", not schema.get("properties")),
    )
    for name, each in value.items():
        inner = properties.get(name, others)
        if inner is False:
            return f"{path}: has no property {name}"
        if isinstance(inner, dict) and (problem := schema_problem(each, inner, f"{path}.{name}")):
            return problem
    return None


def _is_a(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES.get(name, (object,)))


def _decoded(arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except ValueError:
            return arguments
    return arguments
