"""Turns a dataset row into a sample: plain text, a conversation or token ids. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from reapkit.calibration.turns import Message, from_json, read_call, read_turns, unmarked
from reapkit.core.hashing import digest
from reapkit.recipe.schema import MessagesFormat, PromptFormat, TextFormat, TokensFormat, XlamFormat

Format = TextFormat | PromptFormat | MessagesFormat | XlamFormat | TokensFormat

CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
"""Columns of turns, the first that a row has is read."""
PAIRS = (
    ("instruction", "output"),
    ("prompt", "completion"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("prompt", "chosen"),
    ("query", "response"),
    ("query", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("question", "solution"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("user", "assistant"),
    ("input", "output"),
    ("input", "response"),
)
"""Columns of a prompt and its completion; the first pair that a row has is read."""
CHOSEN = "chosen"
"""The preferred conversation of a preference dataset that has no prompt column."""
TEXTS = ("text", "content")
INPUTS = ("input", "context")
"""What an `instruction` is about, in a column of its own."""
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
HISTORY = "history"
"""Earlier pairs of question and answer."""

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
            len((turn["content"] or "").strip()) + sum(len(str(call)) for call in turn.get("tool_calls", ()))
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
    for column in CHATS:
        if column in names:
            return MessagesFormat(messages=column)
    for prompt, completion in PAIRS:
        if {prompt, completion} <= names:
            return PromptFormat(prompt=prompt, completion=completion)
    if CHOSEN in names:
        return MessagesFormat(messages=CHOSEN)
    if "input_ids" in names:
        return TokensFormat()
    for column in TEXTS:
        if column in names:
            return TextFormat(text=column)
    raise ValueError(
        f"no format fits the columns {', '.join(sorted(names)) or '(none)'}. Set `format`, e.g. {{text: COLUMN}}, "
        "{prompt: COLUMN, completion: COLUMN} or {messages: COLUMN}"
    )


def describe(format: Format) -> dict[str, Any]:
    """The format as the recipe spells it."""
    return format.model_dump(exclude_none=True)


def columns_read(format: Format, row: Mapping[str, Any]) -> set[str]:
    """The columns of a row that make its sample."""
    match format:
        case TextFormat(text=column):
            return {column}
        case PromptFormat():
            beside = (
                _about(row, format),
                _system(row, format.system),
                _tools_column(row, format.tools),
                _pairs(format),
            )
            return {format.prompt, format.completion, *(column for column in beside if column)}
        case MessagesFormat(messages=column, tools=tools):
            beside = (_system(row, format.system), _tools_column(row, tools))
            return {column, *(column for column in beside if column)}
        case XlamFormat():
            return {"query", "answers", "tools"}
        case TokensFormat(tokens=column, assistant_mask=mask):
            return {column, *([mask] if mask else [])}
    raise AssertionError(format)


def to_sample(row: Mapping[str, Any], format: Format) -> Sample:
    """The row as a sample; null content gives an empty one (`size` 0).

    Raises ValueError naming the column and what is wrong with it.
    """
    match format:
        case TextFormat(text=column):
            return Sample(text=_text(row, column))
        case PromptFormat():
            return _answered(row, format)
        case MessagesFormat(messages=column, tools=tools):
            turns = from_json(_column(row, column), f"column '{column}'")
            if not turns:
                return Sample(text="")
            return Sample(
                messages=[*_instructed(row, format.system), *read_turns(turns, column)], tools=_tools(row, tools)
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
    return unmarked(value)


def _decoded(row: Mapping[str, Any], column: str) -> Any:
    return from_json(_column(row, column), f"column '{column}'")


def _beside(row: Mapping[str, Any], named: str | None, usual: Iterable[str]) -> str | None:
    """The column that the recipe names, else the first of the usual ones that a row has."""
    return named or next((column for column in usual if row.get(column) is not None), None)


def _about(row: Mapping[str, Any], format: PromptFormat) -> str | None:
    return _beside(row, format.input, INPUTS if format.prompt == "instruction" else ())


def _system(row: Mapping[str, Any], named: str | None) -> str | None:
    return _beside(row, named, SYSTEMS)


def _tools_column(row: Mapping[str, Any], named: str | None) -> str | None:
    return _beside(row, named, TOOLS)


def _instructed(row: Mapping[str, Any], named: str | None) -> list[Message]:
    """The system's turn where a column holds one."""
    column = _system(row, named)
    text = _text(row, column) if column else ""
    return [{"role": "system", "content": text}] if text.strip() else []


def _answered(row: Mapping[str, Any], format: PromptFormat) -> Sample:
    """System, earlier pairs, prompt and completion as a conversation. Prompt and completion are texts or turns."""
    asked = _said(row, format.prompt, "user")
    answered = _said(row, format.completion, "assistant")
    if (column := _about(row, format)) and (text := _text(row, column)).strip():
        asked = [*asked[:-1], _joined(asked[-1], text)] if asked else [{"role": "user", "content": text}]
    if not asked or not answered:
        return Sample(text="")
    if answered[: len(asked)] == asked:  # preferences repeat the prompt in what was chosen
        asked = []
    return Sample(
        messages=[*_instructed(row, format.system), *_earlier(row, format), *asked, *answered],
        tools=_tools(row, format.tools),
    )


def _said(row: Mapping[str, Any], column: str, role: str) -> list[Message]:
    """A column's turns, or its text as a turn of `role`; none where it is blank."""
    value = _column(row, column)
    if isinstance(value, (list, tuple)):
        return read_turns(list(value), column)
    text = _text(row, column)
    return [{"role": role, "content": text}] if text.strip() else []


def _joined(turn: Message, text: str) -> Message:
    return {**turn, "content": f"{turn['content'].rstrip()}\n\n{text}"}


def _pairs(format: PromptFormat) -> str | None:
    """The column of earlier pairs, which stands beside `instruction` alone."""
    return HISTORY if format.prompt == "instruction" else None


def _earlier(row: Mapping[str, Any], format: PromptFormat) -> list[Message]:
    pairs = from_json(row.get(HISTORY), f"column '{HISTORY}'") if _pairs(format) else None
    pairs = pairs or []
    if not isinstance(pairs, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        raise ValueError(f"column '{HISTORY}' is not a list of [question, answer] pairs")
    turns: list[Message] = []
    for asked, answered in pairs:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return turns


def _tools(row: Mapping[str, Any], named: str | None) -> list[dict[str, Any]] | None:
    if (column := _tools_column(row, named)) is None:
        return None
    value = _decoded(row, column)
    if not value:
        return None
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"column '{column}' is not a list of tool schemas")
    tools = [from_json(tool, f"column '{column}'") for tool in value]
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
            {"role": "assistant", "content": None, "tool_calls": [read_call(answer, "turn 2") for answer in answers]},
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
