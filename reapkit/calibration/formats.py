"""Turns a dataset row into a sample: plain text, a conversation or token ids. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from reapkit.core.hashing import digest
from reapkit.recipe.schema import MessagesFormat, PromptFormat, TextFormat, TokensFormat, XlamFormat

Format = TextFormat | PromptFormat | MessagesFormat | XlamFormat | TokensFormat

_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
"""Roles of the older `{from, value}` turns."""

_JSON_TYPES = {
    "str": "string",
    "string": "string",
    "int": "integer",
    "integer": "integer",
    "float": "number",
    "number": "number",
    "bool": "boolean",
    "boolean": "boolean",
    "list": "array",
    "array": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
    "object": "object",
}


@dataclass(frozen=True)
class Sample:
    """One row's content: one of `text`, `messages` (with `tools` or None) and `input_ids` (with `assistant` or
    None)."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    input_ids: list[int] | None = None
    assistant: list[int] | None = None

    @property
    def size(self) -> int:
        """Characters of content (ids, where the sample is tokens), blank ends not counted."""
        if self.input_ids is not None:
            return len(self.input_ids)
        if self.text is not None:
            return len(self.text.strip())
        return sum(
            len(turn["content"].strip()) + sum(len(str(call)) for call in turn.get("tool_calls", ()))
            for turn in self.messages or ()
        )

    @property
    def tool_calls(self) -> int:
        return sum(len(turn.get("tool_calls", ())) for turn in self.messages or ())

    def content_hash(self) -> str:
        """128 bits (hex) of sha256 over the content, before any template or tokenizer: equal content, equal hash.

        Raises ValueError for content that is no Unicode text, which no tokenizer takes either.
        """
        try:
            if self.text is not None:
                return hashlib.sha256(self.text.encode()).hexdigest()[:32]
            return digest([self.messages, self.tools] if self.input_ids is None else [self.input_ids, self.assistant])[
                :32
            ]
        except UnicodeEncodeError as error:
            raise ValueError(
                f"half of a surrogate pair ({error.object[error.start]!a}) at character {error.start}, which is not"
                " text"
            ) from None
        except TypeError as error:
            raise ValueError(f"turns or tools hold what JSON cannot say ({error})") from None


def recognise(columns: Iterable[str]) -> Format:
    """The format of rows with these columns, from the names that the known datasets use.

    Raises ValueError saying which columns were found and which are known.
    """
    names = set(columns)
    if {"query", "tools", "answers"} <= names:
        return XlamFormat()
    for column in ("messages", "conversations", "conversation"):
        if column in names:
            return MessagesFormat(messages=column)
    for prompt, completion in (
        ("instruction", "output"),
        ("prompt", "completion"),
        ("instruction", "response"),
        ("prompt", "response"),
        ("question", "answer"),
        ("problem", "solution"),
    ):
        if {prompt, completion} <= names:
            return PromptFormat(prompt=prompt, completion=completion)
    if "input_ids" in names:
        return TokensFormat()
    for column in ("text", "content"):
        if column in names:
            return TextFormat(text=column)
    raise ValueError(
        f"no format fits the columns {', '.join(sorted(names)) or '(none)'}. Set `format`, e.g. {{text: COLUMN}}, "
        "{prompt: COLUMN, completion: COLUMN} or {messages: COLUMN}"
    )


def describe(format: Format) -> dict[str, Any]:
    """The format as the recipe spells it."""
    return format.model_dump(exclude_none=True)


def to_sample(row: Mapping[str, Any], format: Format) -> Sample:
    """The row as a sample; null content gives an empty one (`size` 0).

    Raises ValueError naming the column and what is wrong with it.
    """
    match format:
        case TextFormat(text=column):
            return Sample(text=_text(row, column))
        case PromptFormat(prompt=prompt, completion=completion):
            asked, answered = _text(row, prompt), _text(row, completion)
            if not asked.strip() or not answered.strip():
                return Sample(text="")
            return Sample(messages=[{"role": "user", "content": asked}, {"role": "assistant", "content": answered}])
        case MessagesFormat(messages=column, tools=tools):
            turns = _decoded(row, column)
            if not turns:
                return Sample(text="")
            schemas = _decoded(row, tools) if tools else row.get("tools")
            return Sample(
                messages=_turns(turns, column), tools=_tools(_from_json(schemas, tools or "tools"), tools or "tools")
            )
        case XlamFormat():
            return _xlam(row)
        case TokensFormat(tokens=column, assistant_mask=mask):
            return _tokens(row, column, mask)
    raise AssertionError(format)


def _column(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise ValueError(f"column '{column}' is missing; the row has {', '.join(row) or 'no column'}")
    return row[column]


def _text(row: Mapping[str, Any], column: str) -> str:
    value = _column(row, column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"column '{column}' holds {type(value).__name__}, not text")
    return value


def _from_json(value: Any, column: str) -> Any:
    if not isinstance(value, str):
        return _without_nulls(value)
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"column '{column}' holds broken JSON ({error})") from None


def _decoded(row: Mapping[str, Any], column: str) -> Any:
    return _from_json(_column(row, column), column)


def _without_nulls(value: Any) -> Any:
    """Columnar files give every record every key of every other record; those nulls were never written by anyone."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(item) for item in value]
    return value


def _turns(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise ValueError(f"column '{column}' is not a list of turns")
    return [_turn(turn, number) for number, turn in enumerate(value, 1)]


def _turn(turn: Mapping[str, Any], number: int) -> dict[str, Any]:
    role = turn.get("role")
    content = turn.get("content")
    if role is None and "from" in turn:
        role, content = _SPEAKERS.get(turn["from"], turn["from"]), turn.get("value")
    if not isinstance(role, str) or not role:
        raise ValueError(f"turn {number} has no role; it has {', '.join(turn) or 'no key'}")
    kept = {
        key: item
        for key, item in turn.items()
        if key not in ("role", "content", "tool_calls", "from", "value") and item is not None
    }
    calls = turn.get("tool_calls")
    if isinstance(calls, str):
        calls = _from_json(calls, f"turn {number}: tool_calls")
    result = {"role": role, "content": _content(content, number), **kept}
    if calls:
        result["tool_calls"] = [_call(call, number) for call in calls]
    return result


def _content(content: Any, number: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    blocks: list[Any] = content if isinstance(content, list) else [None]
    if all(isinstance(block, Mapping) and isinstance(block.get("text"), str) for block in blocks):
        return "".join(block["text"] for block in blocks)
    raise ValueError(f"turn {number} holds content that is neither text nor a list of text blocks")


def _call(call: Any, number: int) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise ValueError(f"turn {number} has a tool call that is not a mapping")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"turn {number} has a tool call without a function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with suppress(
            ValueError, RecursionError
        ):  # a model may have written broken JSON; templates that print it keep it as it is
            arguments = json.loads(arguments) if arguments.strip() else {}
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(value: Any, column: str) -> list[dict[str, Any]] | None:
    if not value:
        return None
    if not isinstance(value, list):
        raise ValueError(f"column '{column}' is not a list of tool schemas")
    tools = [_from_json(tool, column) for tool in value]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"column '{column}' holds a tool schema that is not a mapping")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


def _xlam(row: Mapping[str, Any]) -> Sample:
    query, answers, tools = _text(row, "query"), _decoded(row, "answers"), _decoded(row, "tools")
    if not query.strip() or not answers:
        return Sample(text="")
    if not isinstance(answers, list):
        raise ValueError("column 'answers' is not a list of calls")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) and "name" in tool for tool in tools):
        raise ValueError("column 'tools' is not a list of named tools")
    return Sample(
        messages=[
            {"role": "user", "content": query},
            {"role": "assistant", "content": "", "tool_calls": [_call(answer, 2) for answer in answers]},
        ],
        tools=[_xlam_tool(tool) for tool in tools],
    )


def _xlam_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """xlam's flat parameter table as a JSON schema, which is what chat templates expect."""
    parameters = tool.get("parameters") or {}
    if "properties" not in parameters:
        properties, required = {}, []
        for name, declared in parameters.items():
            kind = str(declared.get("type", "string"))
            word = kind.split(",")[0].split("[")[0].strip().lower()
            properties[name] = {**declared, "type": _JSON_TYPES.get(word, "string")}
            if "optional" not in kind and "default" not in declared:
                required.append(name)
        parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name": tool["name"], "description": tool.get("description", ""), "parameters": parameters}
    return {"type": "function", "function": function}


def _tokens(row: Mapping[str, Any], column: str, mask_column: str | None) -> Sample:
    ids = _column(row, column)
    if ids is None:
        return Sample(input_ids=[])
    ids = list(ids)
    if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 1 << 31 for token in ids):
        raise ValueError(f"column '{column}' is not a list of token ids")
    mask = row.get(mask_column) if mask_column else None
    if mask is not None:
        mask = [int(mark) for mark in mask]
        if len(mask) != len(ids) or not set(mask) <= {0, 1}:
            raise ValueError(
                f"column '{mask_column}' has {len(mask)} marks for {len(ids)} ids; it takes one 0 or 1 per id"
            )
    return Sample(input_ids=ids, assistant=mask)
