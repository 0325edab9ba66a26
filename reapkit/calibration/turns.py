"""Reads chat turns in the spellings that published datasets use, and gives them in one: OpenAI's. Torch-free."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

Message = dict[str, Any]

SPEAKERS = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "bing", "bard"),
    "tool": ("tool", "function", "observation", "function_response", "tool_response", "ipython"),
    "call": ("function_call", "tool_call"),
}
"""Each role and its spellings; the content of a `call` is a function call of the assistant's as JSON."""
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
REASONING = "reasoning_content"
REASONING_KEYS = (REASONING, "thinking", "reasoning")
"""What a model thought before it answered; the first is what the others become."""
READ_KEYS = {*ROLE_KEYS, *CONTENT_KEYS, *REASONING_KEYS, "tool_calls", "function_call", "tool_call_id", "name"}
"""A turn's keys that are read; others are handed to the chat template as they are."""
TEXT_PARTS = ("text", "input_text", "output_text")

THOUGHT = re.compile(r"(</?think(?:ing)?>)")

_ROLES = {spelling: role for role, spellings in SPEAKERS.items() for spelling in spellings}


def read_turns(value: Any, column: str) -> list[Message]:
    """A list of turns in OpenAI's spelling: `role` (system, developer, user, assistant, tool), `content` (text; None
    beside `tool_calls` where nothing was said), `tool_calls`, `reasoning_content`, `tool_call_id`, `name`.

    Raises ValueError naming the turn and what is wrong with it.
    """
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise ValueError(f"column '{column}' is not a list of turns")
    return [message for number, turn in enumerate(value, 1) for message in _messages(turn, number)]


def unmarked(text: str) -> str:
    """The text without a byte order mark at its start, which editors write and nobody says."""
    return text.removeprefix("\ufeff")


def said_pieces(content: str) -> list[str]:
    """The content taken apart at the tags of thoughts, which are the odd items; templates do so too."""
    return THOUGHT.split(content)


def unread_keys(turns: list[Message]) -> set[str]:
    """Keys of turns that only a chat template could read."""
    return {key for turn in turns for key in turn} - READ_KEYS


def read_call(call: Any, place: str) -> dict[str, Any]:
    """A function call as `{id?, type, function: {name, arguments}}`, its arguments as an object where they are one."""
    if not isinstance(call, Mapping):
        raise ValueError(f"{place} has a tool call that is not a mapping")
    function = call.get("function", call)
    if isinstance(function, str):  # beside its arguments
        function = {"name": function, "arguments": call.get("arguments")}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{place} has a tool call without a function name")
    arguments = next((function[key] for key in ("arguments", "parameters", "input") if key in function), None)
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # a model may have written broken JSON; it stays as it is
            arguments = json.loads(arguments) if arguments.strip() else {}
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    function = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    return {**identity, "type": "function", "function": function}


def from_json(value: Any, place: str) -> Any:
    """What a JSON text says, None for a blank one; anything else as it is. Raises ValueError for broken JSON."""
    if not isinstance(value, str):
        return value
    if not unmarked(value).strip():
        return None
    try:
        return json.loads(unmarked(value))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} holds broken JSON ({error})") from None


def _messages(turn: Mapping[str, Any], number: int) -> list[Message]:
    """A turn as messages: more than one where it holds the results of tools."""
    place = f"turn {number}"
    role = _role(turn, place)
    content = next((turn[key] for key in CONTENT_KEYS if key in turn), None)
    content = unmarked(content) if isinstance(content, str) else content
    kept = {key: value for key, value in turn.items() if key not in (*ROLE_KEYS, *CONTENT_KEYS) and value is not None}
    calls = kept.pop("tool_calls", None)
    calls = [read_call(call, place) for call in _listed(from_json(calls, f"{place}: tool_calls"))]
    if (old := from_json(kept.pop("function_call", None), f"{place}: function_call")) is not None:
        calls.append(read_call(old, place))
    if role == "call":
        role = "assistant"
        calls += [read_call(call, place) for call in _called(content, place)]
        content = None
    thoughts = [kept.pop(key) for key in REASONING_KEYS if isinstance(kept.get(key), str)]
    results: list[Message] = []
    if not (content is None or isinstance(content, str)):
        content = _parts(content, place, thoughts, calls, results)
    if results and not content and not calls:
        return results
    message: Message = {"role": role, "content": content if calls else content or "", **kept}
    if calls:
        message["tool_calls"] = calls
    if thought := "\n".join(dict.fromkeys(each for each in thoughts if each)):
        message[REASONING] = thought
    return [*results, message]


def _role(turn: Mapping[str, Any], place: str) -> str:
    said = next((turn[key] for key in ROLE_KEYS if turn.get(key) is not None), None)
    if not isinstance(said, str) or not said:
        raise ValueError(f"{place} has no role; it has {', '.join(turn) or 'no key'}")
    if (role := _ROLES.get(said.strip().lower())) is None:
        known = ", ".join(spelling for spellings in SPEAKERS.values() for spelling in spellings)
        raise ValueError(f"{place} has the role '{said}', which is unknown. Known: {known}")
    return role


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _called(content: Any, place: str) -> list[Any]:
    """The calls of a turn that is one."""
    if not (calls := _listed(from_json(content, place))):
        raise ValueError(f"{place} is a function call without content")
    return calls


def _parts(
    content: Any, place: str, thoughts: list[str], calls: list[dict[str, Any]], results: list[Message]
) -> str | None:
    """The text of a list of content parts, None where it has none; thoughts, calls and results of tools among them
    are added to the lists."""
    if not isinstance(content, list) or not content:
        if content == []:
            return None
        raise ValueError(f"{place} holds content that is neither text nor a list of content parts")
    texts: list[str] = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text" if isinstance(part, str) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("thinking", "reasoning"):
            thoughts.append(str(next((part[key] for key in (kind, "text", "content") if part.get(key)), "")))
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            texts.append(part["refusal"])
        elif kind in ("tool_use", "tool_call"):
            calls.append(read_call(part, place))
        elif kind == "tool_result":
            results.append(_result(part, place))
        else:
            what = f"a content part of type '{kind}'" if kind else f"a content part that is {type(part).__name__}"
            raise ValueError(f"{place} holds {what}; reapkit reads text, thoughts, tool calls and their results")
    return unmarked("".join(texts)) if texts else None


def _result(part: Mapping[str, Any], place: str) -> Message:
    content = part.get("content")
    if not (content is None or isinstance(content, str)):
        content = _parts(content, place, [], [], [])
    identity = {"tool_call_id": part["tool_use_id"]} if part.get("tool_use_id") is not None else {}
    return {"role": "tool", "content": content or "", **identity}
