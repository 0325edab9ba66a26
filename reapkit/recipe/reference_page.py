"""Writes the reference page of the recipe language in Markdown: every field, its default and its meaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from reapkit.recipe.json_schema import Names
from reapkit.recipe.schema import MessagesFormat, NameOf, PromptFormat, Recipe, TextFormat, TokensFormat, XlamFormat

FORMATS = (TextFormat, PromptFormat, MessagesFormat, XlamFormat, TokensFormat)


def language_page(names: Names) -> str:
    """Markdown tables, one per section of a recipe; fields of nested mappings follow with their dotted names. `names`:
    what recipes can name, listed in a table behind the section that chooses one."""
    top = [(name, field) for name, field in Recipe.model_fields.items() if not _models(field.annotation)]
    parts = [_table("Top level", [(name, field) for name, field in top])]
    for name, field in Recipe.model_fields.items():
        for model in _models(field.annotation):
            parts.append(_table(f"`{name}:` {_sentence(model)}", list(_rows(model))))
            parts += [_names_table(field_name, names[kind]) for field_name, kind in _named(model) if kind in names]
    parts.append(
        "`format:` is one of "
        + "; ".join(f"`{_shape(model)}` ({_sentence(model).rstrip('.').lower()})" for model in FORMATS)
        + "; or just `text`, `messages`, `xlam`, `tokens` for the usual column names."
    )
    return "\n\n".join(parts) + "\n"


def _table(title: str, rows: list[tuple[str, FieldInfo]]) -> str:
    lines = [f"**{title}**" if title == "Top level" else title, "", "| field | default | meaning |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {_default(field)} | {_meaning(field)} |" for name, field in rows)])


def _named(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Fields that name one record, with the kind of record."""
    for name, field in model.model_fields.items():
        yield from ((name, mark.kind) for mark in field.metadata if isinstance(mark, NameOf))


def _names_table(field: str, names: Mapping[str, str]) -> str:
    rows = [f"| `{name}` | {_escaped(line)} |" for name, line in names.items()]
    return "\n".join([f"| `{field}:` | meaning |", "|---|---|", *rows])


def _rows(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Fields in order; a mapping of its own is followed by its fields, formats excepted (they have a sentence of their
    own)."""
    for name, field in model.model_fields.items():
        inner = [found for found in _models(field.annotation) if found not in FORMATS]
        is_list = get_origin(field.annotation) is tuple
        if not inner or field.default is None or is_list or isinstance(field.default, str):
            yield f"{prefix}{name}", field
        for found in inner:
            yield from _rows(found, f"{prefix}{name}{'[]' if is_list else ''}.")


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is dict or get_origin(annotation) is None:
        return []
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(str(item) for item in value)}]"
    return (
        ""
        if value in ("", {})
        else f"{value:,}".replace(",", "_")
        if isinstance(value, int)
        else str(Decimal(str(value)) if isinstance(value, float) else value)
    )


def _meaning(field: FieldInfo) -> str:
    choices = _choices(field.annotation)
    listing = (
        f" ({', '.join(choices)})"
        if len(choices) > 1 and not all(choice in (field.description or "") for choice in choices)
        else ""
    )
    return _escaped(field.description or "") + listing


def _escaped(text: str) -> str:
    """As a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _choices(annotation: Any) -> list[str]:
    if str(get_origin(annotation)) == "typing.Literal":
        return [str(choice) for choice in get_args(annotation)]
    return [
        choice for argument in get_args(annotation) for choice in _choices(argument) if not isinstance(annotation, str)
    ]


def _sentence(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().split("\n")[0]


def _shape(model: type[BaseModel]) -> str:
    return "{" + ", ".join(f"{name}: {'true' if name == 'xlam' else 'COLUMN'}" for name in model.model_fields) + "}"
