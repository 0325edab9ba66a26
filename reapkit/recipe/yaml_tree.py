"""Parses YAML into a tree that keeps the position of every value, and refuses hostile input.

PyYAML composes the nodes; we read them ourselves so that duplicate keys, exploding aliases and odd scalars become
problems with a position instead of surprises.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from reapkit.core.errors import Problem, RecipeError

MAX_FILE_BYTES = 1_000_000
MAX_NODES = 20_000  # after aliases: far above any recipe, far below what an alias bomb asks for
MAX_DEPTH = 40
STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Node:
    """A value with the place it was written at. `value` is a scalar, a dict of Nodes or a list of Nodes."""

    value: Any
    file: str
    line: int
    column: int
    key_line: int = 0
    key_column: int = 0

    def plain(self) -> Any:
        """The value without positions."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def problem(self, path: str, message: str, *, at_key: bool = False) -> Problem:
        """A problem at this value, or at its key."""
        if at_key and self.key_line:
            return Problem(path, message, self.file, self.key_line, self.key_column)
        return Problem(path, message, self.file, self.line, self.column)


class _Loader(yaml.SafeLoader):
    """Scalars as JSON and YAML 1.2 read them: no dates, no yes/no booleans, 1e-3 is a number, 20_000 too."""


_Loader.yaml_implicit_resolvers = {}
_IMPLICIT: dict[str, re.Pattern[str]] = {}
for _name, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)\Z", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9][0-9_]*\Z", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?\Z", "-+0123456789."),
):
    _IMPLICIT[f"tag:yaml.org,2002:{_name}"] = re.compile(_pattern)
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), list(_first))


_TAG = "tag:yaml.org,2002:"
_SCALARS = {"null": "null", "bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}
_COLLECTIONS = {"seq": "a list", "map": "a mapping"}
_PATTERNS = {tag.removeprefix(_TAG): pattern for tag, pattern in _IMPLICIT.items()}
MAX_DIGITS = 400
"""Of a number: more than any that a recipe needs, fewer than what Python refuses to read."""


class _NotAValue(ValueError):
    """A scalar that cannot be read; the text says why."""


def _scalar(node: yaml.ScalarNode) -> Any:
    """The value of a scalar. Raises _NotAValue where its tag or its size makes none of it."""
    text, kind = node.value, node.tag.removeprefix(_TAG)
    if kind in _PATTERNS and not _PATTERNS[kind].match(text):
        raise _NotAValue(f"has the YAML tag !!{kind}, but '{text[:40]}' is not {_SCALARS[kind]}. Remove the tag.")
    if kind in ("int", "float") and len(text) > MAX_DIGITS:
        raise _NotAValue(f"is a number of {len(text):,} characters. Write a number that the field allows.")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text.replace("_", ""))
    if kind == "float":
        return _float(text)
    return text


def _float(text: str) -> float:
    number = float(text.replace("_", ""))
    if math.isinf(number):
        raise _NotAValue(f"found {text}, which is larger than any number here can be. Write a smaller one.")
    return number


def read_document(path: Path, shown: str, problems: list[Problem] | None = None) -> Node:
    """The file as a Node tree; `-` is standard input, and pipes are read once. `shown` is the name used in messages.

    Duplicate keys and values that cannot be read are added to `problems` and left out (raised where it is None).
    Raises RecipeError for a missing, oversized, non-UTF-8 or malformed file and for alias bombs.
    """
    raw = _read(path, shown)
    if len(raw) > MAX_FILE_BYTES:
        raise RecipeError(
            [Problem("", f"is larger than {MAX_FILE_BYTES:,} bytes. A recipe is a short YAML file.", shown)]
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(
            [Problem("", f"is not UTF-8 (byte 0x{raw[error.start]:02x}). Save it as UTF-8.", shown, line)]
        ) from None
    return parse_document(text, shown, problems)


def _read(path: Path, shown: str) -> bytes:
    """One byte more than a recipe may have, at most."""
    try:
        if str(path) == STANDARD_INPUT:
            return sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RecipeError([Problem("", f"cannot be read ({error.strerror}). Check the path.", shown)]) from None


def parse_document(text: str, shown: str, problems: list[Problem] | None = None) -> Node:
    """Text as a Node tree; `problems` as `read_document` takes them. Raises RecipeError with the first syntax error."""
    found = [] if problems is None else problems
    node = _NodeReader(shown, found).read(_composed(text, shown), "", 0)
    if found and problems is None:
        raise RecipeError(found)
    return node


def _composed(text: str, shown: str) -> yaml.MappingNode:
    """PyYAML's nodes of a mapping. Raises RecipeError for anything else."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise RecipeError(
            [Problem("", f"holds the character U+{error.character:04X}, which YAML forbids. Remove it.", shown, line)]
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark else (None, None)
        raise RecipeError([Problem("", _syntax_message(error, text, mark), shown, *place)]) from None
    except RecursionError:
        raise RecipeError([Problem("", f"is nested deeper than {MAX_DEPTH} levels.", shown)]) from None
    if isinstance(root, yaml.MappingNode):
        return root
    kinds = {"sequence": "a list", "scalar": "plain text"}
    found = "is empty" if root is None else f"holds {kinds[root.id]} at the top"
    message = f"{found}; a recipe is a mapping. Start with `version: 1`, or try `reapkit init MODEL`."
    raise RecipeError([Problem("", message, shown, 1, 1)])


def _syntax_message(error: yaml.MarkedYAMLError, text: str, mark: Any) -> str:
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or "'\\t'" in str(error.problem):
        return "the line is indented with a tab; YAML allows only spaces. Replace the tab by spaces."
    return f"not YAML: {error.problem or error.context}. Check indentation, quotes and brackets here."


class _NodeReader:
    """Walks composed nodes once, counting what aliases repeat."""

    def __init__(self, shown: str, problems: list[Problem]):
        self.shown, self.problems, self.left = shown, problems, MAX_NODES
        self.open: set[int] = set()

    def read(self, node: yaml.Node, path: str, depth: int) -> Node:
        self.left -= 1
        if self.left < 0:
            message = f"expands through aliases to more than {MAX_NODES:,} values. Write it without aliases."
            raise RecipeError([self._problem(node, path, message)])
        if depth > MAX_DEPTH or id(node) in self.open:
            message = f"is nested deeper than {MAX_DEPTH} levels, or contains itself. Flatten it."
            raise RecipeError([self._problem(node, path, message)])
        self._check_tag(node, path)
        place: dict[str, Any] = dict(file=self.shown, line=node.start_mark.line + 1, column=node.start_mark.column + 1)
        if isinstance(node, yaml.ScalarNode):
            return Node(self._scalar(node, path), **place)
        self.open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            value: Any = self._mapping(node, path, depth)
        else:
            value = [self.read(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(node.value)]
        self.open.discard(id(node))
        return Node(value, **place)

    def _problem(self, node: yaml.Node, path: str, message: str) -> Problem:
        return Problem(path, message, self.shown, node.start_mark.line + 1, node.start_mark.column + 1)

    def _check_tag(self, node: yaml.Node, path: str) -> None:
        name = node.tag.removeprefix(_TAG)
        kind = "map" if isinstance(node, yaml.MappingNode) else "seq" if isinstance(node, yaml.SequenceNode) else None
        tag = node.tag.replace(_TAG, "!!")
        if name not in (*_SCALARS, *_COLLECTIONS):
            message = f"has the YAML tag {tag}; a recipe is plain data. Remove the tag."
        elif kind != (name if name in _COLLECTIONS else None):
            found = _COLLECTIONS[kind] if kind else "a single value"
            message = f"has the YAML tag {tag}, but is {found}. Remove the tag."
        else:
            return
        self.problems.append(self._problem(node, path, message))

    def _scalar(self, node: yaml.ScalarNode, path: str) -> Any:
        """The scalar's value; None, and a problem, where it has none."""
        try:
            return _scalar(node)
        except _NotAValue as error:
            self.problems.append(self._problem(node, path, str(error)))
            return None

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[Any, Node]:
        result: dict[Any, Node] = {}
        merged: dict[Any, Node] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(self._problem(key_node, path, "a key must be plain text."))
                continue
            if key_node.value == "<<" and key_node.style is None:
                merged = self._merged(value_node, path, depth) | merged
                continue
            key = self._key(key_node, path)
            where = f"{path}.{key}" if path else key
            if key in result:
                message = f"the key is given twice, first in line {result[key].key_line}. Keep one."
                self.problems.append(self._problem(key_node, where, message))
                continue
            mark = key_node.start_mark
            result[key] = replace(
                self.read(value_node, where, depth + 1), key_line=mark.line + 1, key_column=mark.column + 1
            )
        return merged | result

    def _key(self, node: yaml.ScalarNode, path: str) -> str:
        return str(self._scalar(node, path)) if node.value != "" else ""

    def _merged(self, node: yaml.Node, path: str, depth: int) -> dict[Any, Node]:
        """What a merge key (`<<: *defaults`) brings in: of several mappings the first wins, as in YAML 1.1."""
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[Any, Node] = {}
        for item in reversed(items):
            found = self.read(item, path, depth + 1)
            if isinstance(found.value, dict):
                merged |= found.value
            else:
                message = "the merge key << takes a mapping or a list of mappings, such as `<<: *defaults`."
                self.problems.append(self._problem(item, f"{path}.<<" if path else "<<", message))
        return merged


def walk(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """Every node with its path, parents first."""
    yield path, node
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            yield from walk(child, f"{path}.{key}" if path else str(key))
    elif isinstance(node.value, list):
        for i, child in enumerate(node.value):
            yield from walk(child, f"{path}[{i}]")


def json_text(value: Any) -> str:
    """`value` as JSON for pydantic's strict JSON mode."""
    return json.dumps(value, allow_nan=False)
