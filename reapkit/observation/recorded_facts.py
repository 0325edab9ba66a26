"""What `observation.json` says of an observation, each fact of the kind that it must be of. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reapkit.core.json_text import parse_json

LARGEST_LAYER = 1 << 20
LARGEST_SUM = 1 << 62


def read_facts(directory: Path) -> dict[str, Any]:
    """The facts of the observation in `directory`. Raises OSError where there are none, ValueError for what a fact
    cannot be.
    """
    facts = parse_json((directory / "observation.json").read_text(encoding="utf-8"))
    if not isinstance(facts, dict):
        raise ValueError("it holds no JSON object")
    for name, holds in KINDS.items():
        if name not in facts or not holds(facts[name]):
            raise ValueError(f"{name} is missing or of a wrong kind: damaged or of another version")
    if not len(facts["sources"]) == len(facts["tokens"]) == len(facts["scored_tokens"]):
        raise ValueError("sources, tokens and scored_tokens differ in length")
    if len(set(facts["layers"])) < len(facts["layers"]):
        raise ValueError("layers names one of them twice")
    return facts


def _is_count(value: Any, largest: int = LARGEST_SUM, least: int = 0) -> bool:
    return type(value) is int and least <= value <= largest


def _are_counts(value: Any, largest: int = LARGEST_SUM) -> bool:
    return isinstance(value, list) and all(_is_count(item, largest) for item in value)


def _is_meta(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("model"), str | None)


KINDS = {
    "format": _is_count,
    "model_type": lambda value: isinstance(value, str),
    "layers": lambda value: _are_counts(value, LARGEST_LAYER) and bool(value),
    "num_experts": lambda value: _is_count(value, LARGEST_LAYER, 1),
    "num_experts_per_tok": lambda value: _is_count(value, LARGEST_LAYER, 1),
    "sources": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "tokens": _are_counts,
    "scored_tokens": _are_counts,
    "eaft": lambda value: isinstance(value, bool),
    "meta": _is_meta,
}
