"""What a recipe's fields add to keys. Torch-free."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from reapkit.recipe.schema import Later, Resolved


def key_values(section: BaseModel) -> dict[str, Any]:
    """The section as JSON data, without fields that came to the language later and have their default: what was made
    before they came goes on being found. Nor those that a stage resolves."""
    return _pruned(section, section.model_dump(mode="json"))


def _pruned(value: Any, dumped: Any) -> Any:
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {
            name: _pruned(getattr(value, name), dumped[name])
            for name, field in fields.items()
            if name in dumped and not _adds_nothing(field, getattr(value, name))
        }
    if isinstance(value, (tuple, list)):
        return [_pruned(each, one) for each, one in zip(value, dumped, strict=True)]
    return dumped


def _adds_nothing(field: FieldInfo, value: Any) -> bool:
    later = any(isinstance(mark, Later) for mark in field.metadata) and value == field.default
    return later or any(isinstance(mark, Resolved) for mark in field.metadata)
