"""Parses YAML into a tree that keeps the position of every value, and refuses hostile input.

PyYAML composes the nodes; we read them ourselves so that duplicate keys, exploding aliases and odd scalars become
problems with a position instead of surprises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from reapkit.core.errors import Problem, RecipeError

MAX_FILE_BYTES = 1_000_000
MAX_NODES = 20_000  # after aliases: far above any recipe, far below what an alias bomb asks for
MAX_DEPTH = 40


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
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?$", "-+0123456789."),
):
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))


_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


def _scalar(node: yaml.ScalarNode) -> Any:
    text, kind = node.value, node.tag.rsplit(":", 1)[-1]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text.replace("_", ""))
    if kind == "float":
        return float(text.replace("_", ""))
    return text


def read_document(path: Path, shown: str) -> Node:
    """The file as a Node tree; `shown` is the name used in messages.

    Raises RecipeError for a missing, oversized, non-UTF-8 or malformed file, duplicate keys and alias bombs.
    """
    try:
        raw = path.read_bytes() if path.stat().st_size <= MAX_FILE_BYTES else None
    except OSError as error:
        raise RecipeError([Problem("", f"cannot be read ({error.strerror}). Check the path.", shown)]) from None
    if raw is None:
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
    return parse_document(text, shown)


def parse_document(text: str, shown: str) -> Node:
    """Text as a Node tree. Raises RecipeError with every duplicate key, or the first syntax error."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise RecipeError(
            [Problem("", f"holds the character U+{error.character:04X}, which YAML forbids. Remove it.", shown, line)]
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(
            [
                Problem(
                    "",
                    _syntax_message(error, text, mark),
                    shown,
                    mark.line + 1 if mark else None,
                    mark.column + 1 if mark else None,
                )
            ]
        ) from None
    except RecursionError:
        raise RecipeError([Problem("", f"is nested deeper than {MAX_DEPTH} levels.", shown)]) from None
    if not isinstance(root, yaml.MappingNode):
        kinds = {"sequence": "a list", "scalar": "plain text"}
        found = "is empty" if root is None else f"holds {kinds[root.id]} at the top"
        raise RecipeError(
            [
                Problem(
                    "",
                    f"{found}; a recipe is a mapping. Start with `version: 1`, or try `reapkit init MODEL`.",
                    shown,
                    1,
                    1,
                )
            ]
        )
    problems: list[Problem] = []
    node = _NodeReader(shown, problems).read(root, "", 0)
    if problems:
        raise RecipeError(problems)
    return node


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
        place: dict[str, Any] = dict(file=self.shown, line=node.start_mark.line + 1, column=node.start_mark.column + 1)
        if self.left < 0:
            raise RecipeError(
                [
                    Problem(
                        path,
                        f"expands through aliases to more than {MAX_NODES:,} values. Write it without aliases.",
                        **place,
                    )
                ]
            )
        if depth > MAX_DEPTH or id(node) in self.open:
            raise RecipeError(
                [Problem(path, f"is nested deeper than {MAX_DEPTH} levels, or contains itself. Flatten it.", **place)]
            )
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self.problems.append(
                Problem(path, f"has the YAML tag {tag}; a recipe is plain data. Remove the tag.", **place)
            )
        if isinstance(node, yaml.ScalarNode):
            return Node(_scalar(node), **place)
        self.open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            value: Any = self._mapping(node, path, depth)
        else:
            value = [self.read(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(node.value)]
        self.open.discard(id(node))
        return Node(value, **place)

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[Any, Node]:
        result: dict[Any, Node] = {}
        for key_node, value_node in node.value:
            line, column = key_node.start_mark.line + 1, key_node.start_mark.column + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(path, "a key must be plain text.", self.shown, line, column))
                continue
            key = str(_scalar(key_node)) if key_node.value != "" else ""
            where = f"{path}.{key}" if path else key
            if key in result:
                first = result[key]
                self.problems.append(
                    Problem(
                        where,
                        f"the key is given twice, first in line {first.key_line}. Keep one.",
                        self.shown,
                        line,
                        column,
                    )
                )
                continue
            result[key] = replace(self.read(value_node, where, depth + 1), key_line=line, key_column=column)
        return result


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
