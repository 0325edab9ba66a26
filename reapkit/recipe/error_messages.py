"""Turns pydantic's errors into sentences: where the problem is, what was found, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from reapkit.core.errors import Problem
from reapkit.recipe.as_written import hint
from reapkit.recipe.schema import Recipe
from reapkit.recipe.yaml_tree import Node

_KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "finite_number": "a finite number",
    "decimal_type": "a number",
    "decimal_parsing": "a number",
    "is_instance_of": "a mapping",
}
_PATTERNS = {
    "name": "letters, digits, '.', '_' and '-' only, beginning with a letter or digit",
    "layers": "write layers as 7, 0-3, 60- or a list such as [0, 7]",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def closest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for a near miss, else nothing."""
    match = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""


def shown(value: Any) -> str:
    """A found value as the user wrote it, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def problems_of(errors: Sequence[ErrorDetails], root: Node) -> list[Problem]:
    """One problem per place, in the order of the file."""
    found: dict[tuple[str, str], Problem] = {}
    unknown = [str(error["loc"][-1]) for error in errors if error["type"] == "extra_forbidden"]
    for error in errors:
        if error["type"] == "too_short" and error.get("input"):
            continue  # its items were refused one by one, each with its own message
        if error["type"] == "missing" and difflib.get_close_matches(str(error["loc"][-1]), unknown, n=1, cutoff=0.6):
            continue  # it is there, misspelt, and said to be so
        problem = _problem(error, root)
        found.setdefault((problem.path, problem.message), problem)
    return list(found.values())


def _problem(error: ErrorDetails, root: Node) -> Problem:
    node, path, parents, missing = root, "", [root], None
    for part in error["loc"]:
        child = _child(node, part)
        if child is None:
            missing = part  # a union's tag, or a key that is not there: only the last one matters
            continue
        missing = None
        path = f"{path}[{part}]" if isinstance(part, int) else (f"{path}.{part}" if path else str(part))
        node = child
        parents.append(node)
    kind = error["type"]
    if kind == "missing":
        full = f"{path}.{missing}" if path else str(missing)
        return node.problem(full, f"is missing. {_description(full)}".rstrip(), at_key=True)
    if kind == "extra_forbidden":
        allowed = _fields_at(
            parents[-2] if len(parents) > 1 else root, root, path.rsplit(".", 1)[0] if "." in path else ""
        )
        key = path.rsplit(".", 1)[-1]
        if key in allowed:  # a field of another branch of the union
            return node.problem(
                path, "belongs to another kind than its neighbouring keys. Keep the keys of one kind.", at_key=True
            )
        listing = f" Allowed here: {', '.join(allowed)}." if allowed else ""
        return node.problem(path, f"unknown key.{closest(key, allowed)}{listing}", at_key=True)
    if kind == "format":
        return node.problem(
            path, f"{'' if isinstance(node.value, dict) else 'found ' + shown(node.plain()) + ': '}{error['msg']}."
        )
    return node.problem(
        path, _sentence(kind, error, node.plain(), path), at_key=kind == "value_error" and isinstance(node.value, dict)
    )


def _child(node: Node, part: Any) -> Node | None:
    if isinstance(node.value, dict):
        return node.value.get(part, node.value.get(str(part)))
    if isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
        return node.value[part]
    return None


def _sentence(kind: str, error: ErrorDetails, value: Any, path: str) -> str:
    context = error.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        said = str(context.get("error", error["msg"]))
        meant = hint(value) if said.endswith("a number") else ""
        return f"{'' if isinstance(value, (dict, list)) else f'found {shown(value)}, '}{said}.{meant}"
    if kind in _KINDS:
        return f"found {shown(value)}, must be {_KINDS[kind]}.{hint(value) if 'number' in _KINDS[kind] else ''}"
    if kind in _BOUNDS:
        key, word = _BOUNDS[kind]
        return f"found {shown(value)}, must be {word} {float(context[key]):g}.{hint(value, context)}"
    if kind == "literal_error":
        return _not_allowed(value, context["expected"], path)
    if kind == "string_pattern_mismatch":
        return f"found {shown(value)}; {_PATTERNS.get(path.rsplit('.', 1)[-1], 'must match ' + context['pattern'])}."
    if kind in ("too_short", "list_too_short"):
        return f"is empty. Give at least {context.get('min_length', 1)}."
    return f"found {shown(value)}: {error['msg']}."


def _not_allowed(value: Any, expected: str, path: str) -> str:
    names = [name.strip() for name in expected.replace(" or ", ", ").split(",")]
    if isinstance(value, str) and value in names:
        return f"found the text '{value}', must be the number {value}. Remove the quotes."
    names = [name.strip("'") for name in names]
    fields = [name for model in models_at(path) for name in _spelled(model)]
    mapping = f", or a mapping of {', '.join(fields)}" if fields else ""
    return f"found {shown(value)}. Allowed: {', '.join(names)}{mapping}.{closest(str(value), names)}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Every model that an annotation can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [model for argument in get_args(annotation) for model in _models(argument)]


def models_at(path: str) -> list[type[BaseModel]]:
    """The recipe's models that may stand at a path such as `calibration.mix[0]`."""
    models: list[type[BaseModel]] = [Recipe]
    parts = iter([piece.split("[")[0] for piece in path.split(".") if piece])
    for part in parts:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        models = [inner for field in fields for inner in _models(field.annotation)]
        if models and any(_is_mapping(field.annotation) for field in fields) and next(parts, None) is None:
            return []  # its keys are the user's
    return models


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict or any(get_origin(kind) is dict for kind in get_args(annotation))


def _spelled(model: type[BaseModel]) -> list[str]:
    """A model's fields as recipes spell them."""
    return [field.alias or name for name, field in model.model_fields.items()]


def may_be_null(path: str) -> bool:
    """Whether the field at a path takes null for a value; unknown fields do, so that they are reported as they were
    written."""
    head, _, last = path.rpartition(".")
    fields = [model.model_fields[last] for model in models_at(head) if last in model.model_fields]
    return not fields or any(_takes_none(field.annotation) for field in fields)


def _takes_none(annotation: Any) -> bool:
    return annotation is type(None) or any(
        _takes_none(argument) for argument in get_args(annotation) if get_origin(annotation) is not dict
    )


def _fields_at(parent: Node, root: Node, path: str) -> list[str]:
    return list(dict.fromkeys(name for model in models_at(path) for name in _spelled(model)))


def _description(path: str) -> str:
    head, _, last = path.rpartition(".")
    for model in models_at(head):
        if last in model.model_fields:
            return " ".join((model.model_fields[last].description or "").split())
    return ""
