"""Reads values as people write them: `51%`, `5 GB`, `REAP`, `model: my-model`. Torch-free.

What means one thing only is taken; the recipe's own spelling is what enters keys, records and reports. Whatever could
mean two things is left as it is, for the schema to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel

from reapkit.core.errors import Problem
from reapkit.recipe.schema import ByteCount, NameOf, Recipe
from reapkit.recipe.yaml_tree import Node

_PERCENT = re.compile(r"^\s*([-+]?\d+(?:\.\d*)?|[-+]?\.\d+)\s*%\s*$")
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b\s*$", re.IGNORECASE)
_POWERS = {letter: power for power, letter in enumerate(("", "K", "M", "G", "T", "P"))}
_FOLDED = {"criterion": lambda name: name.lower().replace("_", "-"), "scheme": str.upper}
"""How the names of each kind of record are spelled."""


def spelled_out(document: Node) -> Node:
    """The document with `model: NAME` as the mapping `{source: NAME}` that it stands for, so that parents and
    overrides meet one shape."""
    model = document.value.get("model")
    if model is None or not isinstance(model.value, str):
        return document
    source = replace(model, key_line=model.line, key_column=model.column)
    return replace(document, value={**document.value, "model": replace(model, value={"source": source})})


def as_recipe_values(document: Node) -> tuple[Any, list[Problem]]:
    """The document's plain values in the recipe's own spelling, and what is wrong with how they were written."""
    problems = list(_mixed_weights(document))
    return _converted(document.plain(), [Recipe]), problems


def _mixed_weights(document: Node) -> Iterator[Problem]:
    """`51%` beside `24` would be 0.51 beside 24: nobody means that."""
    calibration = document.value.get("calibration")
    mix = calibration.value.get("mix") if calibration is not None and isinstance(calibration.value, dict) else None
    if mix is None or not isinstance(mix.value, list):
        return
    weights = [
        (i, item.value["weight"])
        for i, item in enumerate(mix.value)
        if isinstance(item.value, dict) and "weight" in item.value
    ]
    if any(_percent(node.value) is not None for _, node in weights):
        for i, node in weights:
            if isinstance(node.value, (int, float)) and node.value > 1:
                message = f"found {node.value:g} beside weights in percent. Write all of them in percent, or none."
                yield node.problem(f"calibration.mix[{i}].weight", message)


def _converted(value: Any, annotations: list[Any]) -> Any:
    leaves = [leaf for annotation in annotations for leaf in _leaves(annotation)]
    if isinstance(value, dict):
        return {key: _converted(item, list(_below(leaves, key))) for key, item in value.items()}
    if isinstance(value, list):
        items = [get_args(leaf)[0] for leaf in leaves if get_origin(leaf) in (tuple, list)]
        return [_converted(item, items) for item in value]
    return _scalar(value, leaves) if isinstance(value, str) else value


def _leaves(annotation: Any) -> Iterator[Any]:
    """What an annotation allows, unions and `Annotated` taken apart."""
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        yield from (mark for mark in marks if isinstance(mark, (NameOf, ByteCount)))
        yield from _leaves(inner)
    elif get_origin(annotation) in (None, Literal, dict, tuple, list):
        yield annotation
    else:
        for argument in get_args(annotation):
            yield from _leaves(argument)


def _below(leaves: list[Any], key: Any) -> Iterator[Any]:
    """The annotations of what stands under `key` of a mapping."""
    for leaf in leaves:
        if get_origin(leaf) is dict:
            yield get_args(leaf)[1]
        elif isinstance(leaf, type) and issubclass(leaf, BaseModel) and key in leaf.model_fields:
            field = leaf.model_fields[key]
            yield from (mark for mark in field.metadata if isinstance(mark, (NameOf, ByteCount)))
            yield field.annotation


def _scalar(text: str, leaves: list[Any]) -> Any:
    """`text` as the one value among `leaves` that it spells, or as it is."""
    choices = [choice for leaf in leaves if get_origin(leaf) is Literal for choice in get_args(leaf)]
    if choices:
        near = [choice for choice in choices if isinstance(choice, str) and _same(choice, text)]
        return near[0] if len(near) == 1 else text
    if Decimal in leaves and (share := _percent(text)) is not None:
        return share
    if any(isinstance(leaf, ByteCount) for leaf in leaves) and (size := _SIZE.match(text)):
        number, letter, binary = size.groups()
        return int(Decimal(number) * (1024 if binary else 1000) ** _POWERS[letter.upper()])
    kinds = [leaf.kind for leaf in leaves if isinstance(leaf, NameOf)]
    return _FOLDED[kinds[0]](text.strip()) if kinds and kinds[0] in _FOLDED and ":" not in text else text


def _same(choice: str, text: str) -> bool:
    return choice.lower().replace("_", "-") == text.strip().lower().replace("_", "-")


def _percent(value: Any) -> float | None:
    """0.51 of `51%`: the shortest decimal of the share, exactly."""
    found = _PERCENT.match(value) if isinstance(value, str) else None
    return float(Decimal(found[1]) / 100) if found else None


def hint(value: Any, allowed: Mapping[str, Any] | None = None) -> str:
    """What was probably meant by a number that is not one: `'0.5'`, `1,360`, `50` for a fraction; or nothing."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        limit = max((allowed or {}).get("lt", 0), (allowed or {}).get("le", 0))
        return f" For {value:g} % write {value / 100:g}." if limit == 1 and 5 <= value <= 100 else ""
    if not isinstance(value, str):
        return ""
    number = value.strip().replace(",", "").replace(" ", "")
    if re.fullmatch(r"[-+]?\d+(\.\d+)?", number):
        return f" Write {number}, without quotes{' or separators' if number != value.strip() else ''}."
    scaled = re.fullmatch(r"(\d+(?:\.\d+)?)([kKMGB])", number)
    if scaled:
        power = {"k": 3, "m": 6, "g": 9, "b": 9}[scaled[2].lower()]
        return f" Write {int(Decimal(scaled[1]) * 10**power):_}."
    return ""
