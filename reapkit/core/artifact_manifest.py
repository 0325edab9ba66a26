"""An artifact's manifest: what a stage made of what, and every file of its payload with size and sha256. Torch-free.

The text begins with the sha256 of itself, the 64 letters of that hash read as zeros: one changed byte anywhere in it
is noticed. A manifest of an earlier reapkit has neither this hash nor `files`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast

from reapkit.core.json_text import parse_json

HEX_LETTERS = 64
START = '{\n "sha256": "'
LARGEST_FILE = 1 << 62


@dataclass(frozen=True)
class FileFacts:
    """A file's size in bytes and its sha256 (hex)."""

    nbytes: int
    sha256: str


def listed_files(facts: Mapping[str, Any]) -> dict[str, FileFacts] | None:
    """The payload's files by their path in it; None where an earlier reapkit wrote no list."""
    listed = facts.get("files")
    return None if listed is None else {name: FileFacts(**found) for name, found in listed.items()}


def manifest_text(facts: Mapping[str, Any]) -> str:
    """`facts` as a manifest's text; what is not a number becomes null, as JSON has no NaN.

    Raises TypeError for what JSON cannot say.
    """
    body = {name: value for name, value in _without_nan(facts).items() if name != "sha256"}
    text = json.dumps({"sha256": "0" * HEX_LETTERS, **body}, indent=1) + "\n"
    return text.replace("0" * HEX_LETTERS, hashlib.sha256(text.encode()).hexdigest(), 1)


def read_manifest_text(content: bytes) -> dict[str, Any]:
    """The facts of a manifest. Raises ValueError for one that was changed, is no manifest, or holds what none holds."""
    text = content.decode()
    signed = text.startswith(START)
    if signed and not _is_as_written(text):
        raise ValueError("its bytes are not those that were written")
    facts = parse_json(text, infinite=True)
    if not isinstance(facts, dict):
        raise ValueError("it holds no JSON object")
    if not signed and ("files" in facts or "sha256" in facts):
        raise ValueError("its bytes are not those that were written")
    for name, holds in KINDS.items():
        if name in facts and not holds(facts[name]):
            raise ValueError(f"{name} is of a wrong kind")
    if missing := [name for name in ("stage", "key", "summary") if name not in facts]:
        raise ValueError(f"it does not name its {missing[0]}")
    return facts


def _is_as_written(text: str) -> bool:
    stated = text[len(START) : len(START) + HEX_LETTERS]
    zeros = START + "0" * HEX_LETTERS + text[len(START) + HEX_LETTERS :]
    return hashlib.sha256(zeros.encode()).hexdigest() == stated


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in cast("list[Any]", value)]
    return None if isinstance(value, float) and math.isnan(value) else value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _names_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_list_of_files(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_inside(name) and _is_file(facts) for name, facts in value.items())


def _is_inside(name: str) -> bool:
    """Whether a path stays in the directory that it starts from."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and str(path) == name


def _is_file(facts: Any) -> bool:
    if not isinstance(facts, dict) or facts.keys() != {"nbytes", "sha256"}:
        return False
    sized = type(facts["nbytes"]) is int and 0 <= facts["nbytes"] <= LARGEST_FILE
    return sized and isinstance(facts["sha256"], str) and len(facts["sha256"]) == HEX_LETTERS


KINDS = {
    "stage": lambda value: isinstance(value, str),
    "key": lambda value: isinstance(value, str),
    "summary": lambda value: isinstance(value, dict),
    "spec": lambda value: isinstance(value, dict),
    "inputs": _names_texts,
    "versions": _names_texts,
    "seconds": _is_number,
    "finished": lambda value: isinstance(value, str),
    "warnings": _are_texts,
    "measurements": _are_texts,
    "files": _is_list_of_files,
}
"""What each fact of a manifest must be, where it is there."""
