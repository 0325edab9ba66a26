"""Fits conversations to a chat template, and makes sure that it shows what turns say and the tools they call: templates
drop both without a word.

Whether they are shown is seen on a probe: the same conversation with texts, names, keys and values that occur nowhere
else.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reapkit.calibration.template_process import TemplateRefused
from reapkit.calibration.turns import REASONING, REASONING_KEYS, THOUGHT, Message, said_pieces

Tools = list[dict[str, Any]] | None
Render = Callable[[Sequence[Message], Tools], str]


@dataclass(frozen=True)
class Way:
    """How a template takes a conversation: null beside calls as empty text, arguments of calls as JSON text, content as
    a list of parts. `left_out`: pieces of thoughts that it does not show."""

    empty: bool = False
    as_text: bool = False
    as_parts: bool = False
    left_out: int = 0


class TurnsHidden(ValueError):
    """The template does not show what a turn says, or not all of a call."""


class Fitter:
    """One template's spelling of turns. What it finds is kept by the shape of conversations, of which there are few."""

    def __init__(self, template: str, render: Render):
        """`render`: conversation and tools to text, which raises TemplateRefused where the template does."""
        self._render = render
        self._developer = "developer" in template
        self._reasoning = next(
            (
                key
                for key in REASONING_KEYS
                if re.search(rf"\.{key}\b|\[\s*['\"]{key}['\"]\s*\]|['\"]{key}['\"]", template)
            ),
            REASONING,
        )
        self._ways: dict[str, Way | ValueError] = {}
        self._tools: dict[str, bool] = {}

    def fitted(self, messages: Sequence[Message], tools: Tools) -> tuple[list[Message], Way]:
        """The conversation as this template reads it, up to its content in parts (`in_parts`), and the way.

        `developer` is `system` where the template knows none, thoughts have its name, what was not said beside calls
        stays null where it can, arguments are objects unless it takes text.

        Raises TurnsHidden where no way shows everything, ValueError where the template refuses all.
        """
        spelled = [self._spelled(message) for message in messages]
        shape = json.dumps([_shape(message) for message in spelled]) + str(bool(tools))
        if shape not in self._ways:
            self._ways[shape] = self._way(spelled, tools)
        way = self._ways[shape]
        if isinstance(way, ValueError):
            raise way
        return _in_way(spelled, way), way

    def shows_tools(self, messages: Sequence[Message], tools: Tools) -> bool:
        """Whether the template shows the tools' schemas in a conversation of this shape."""
        assert tools, "there are schemas to look for"
        shape = json.dumps([[message["role"], bool(message.get("tool_calls"))] for message in messages])
        if shape not in self._tools:
            probe = [{"type": "function", "function": {**tools[0]["function"], "name": "reapkitQtoolQ"}}, *tools[1:]]
            try:
                self._tools[shape] = "reapkitQtoolQ" in self._render(messages, probe)
            except TemplateRefused:
                return True  # the conversation itself will say
        return self._tools[shape]

    def _spelled(self, message: Message) -> Message:
        spelled = dict(message)
        if spelled["role"] == "developer" and not self._developer:
            spelled["role"] = "system"
        if REASONING in spelled and self._reasoning != REASONING:
            spelled[self._reasoning] = spelled.pop(REASONING)
        return spelled

    def _way(self, messages: list[Message], tools: Tools) -> Way | ValueError:
        """The first way that shows everything, or why there is none."""
        probe, wanted, thoughts, keys = _probe(messages)
        nulls = any(message["content"] is None for message in messages)
        calls = any(message.get("tool_calls") for message in messages)
        refused: TemplateRefused | None = None
        hidden: list[str] | None = None
        shown: list[tuple[Way, str]] = []
        for as_parts, as_text, empty in itertools.product((False, True), (False, True), (False, True)):
            if (empty and not nulls) or (as_text and not calls) or (as_parts and shown):
                continue
            way = Way(empty, as_text, as_parts)
            try:
                turns = _in_way(probe, way)
                text = self._render(in_parts(turns) if as_parts else turns, tools)
            except TemplateRefused as error:
                refused = refused or error
                continue
            if missing := [what for sentinel, what in wanted if sentinel not in text]:
                hidden = hidden or missing
            else:
                shown.append((replace(way, left_out=sum(thought not in text for thought in thoughts)), text))
        if not shown:
            if hidden is None:
                return ValueError(f"the chat template refuses this conversation ({refused})")
            return TurnsHidden(
                f"the chat template does not show {hidden[0]}, so the model would read a conversation that nobody had."
                " Give calibration.chat_template, or another source"
            )
        as_json = [each for each in shown if not any(f"'{key}'" in each[1] for key in keys)] or shown
        first, text = as_json[0]
        if not first.empty:  # a null that is printed as a word was not meant to be read
            for way, other in as_json:
                if replace(way, left_out=0) == replace(first, empty=True, left_out=0) and other.count(
                    "None"
                ) < text.count("None"):
                    return way
        return first


def in_parts(messages: Sequence[Message]) -> list[Message]:
    """The messages with their text as lists of one part, as templates of multimodal models read it."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}] if message["content"] else []}
        for message in messages
    ]


def _in_way(messages: Sequence[Message], way: Way) -> list[Message]:
    out = []
    for message in messages:
        changed = dict(message)
        if way.empty and changed["content"] is None:
            changed["content"] = ""
        if way.as_text and changed.get("tool_calls"):
            changed["tool_calls"] = [_with_text(call) for call in changed["tool_calls"]]
        out.append(changed)
    return out


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}


def _shape(message: Message) -> list[Any]:
    """What of a message can decide whether it is shown."""
    content = message["content"]
    pieces = content and [bool(part.strip()) for part in said_pieces(content)]
    calls = [_form(call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return [message["role"], pieces, sorted(message.keys() - {"content", "role"}), calls]


def _form(value: Any) -> Any:
    if isinstance(value, dict):
        return [_form(item) for item in value.values()] + ["object"]
    if isinstance(value, list):
        return [_form(item) for item in value]
    return type(value).__name__


def _probe(messages: Sequence[Message]) -> tuple[list[Message], list[tuple[str, str]], list[str], list[str]]:
    """The conversation with texts and calls that occur nowhere else; those that must be shown, each with what it stands
    for; those of thoughts, which may be left out; and the arguments' keys."""
    wanted: list[tuple[str, str]] = []
    keys: list[str] = []
    thoughts: list[str] = []
    numbers = iter(range(1, 1 << 30))

    def changed(value: Any, what: str) -> Any:
        if isinstance(value, dict):
            made = {}
            for key, item in value.items():
                made[name := f"reapkitQkey{next(numbers)}Q"] = changed(item, what)
                keys.append(name)
                wanted.append((name, f"{what} ('{key}')"))
            return made
        if isinstance(value, list):
            return [changed(item, what) for item in value]
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, (int, float)):
            unusual = 918_000_000 + next(numbers)
            wanted.append((str(unusual), what))
            return unusual if isinstance(value, int) else float(unusual)
        if not str(value):
            return value
        wanted.append((text := f"reapkitQvalue{next(numbers)}Q", what))
        return text

    def thought(text: str) -> str:
        if not text.strip() or THOUGHT.fullmatch(text):
            return text
        thoughts.append(f"reapkitQthought{next(numbers)}Q")
        return thoughts[-1]

    out = []
    for turn, message in enumerate(messages, 1):
        made = dict(message)
        if message["content"]:
            parts = said_pieces(message["content"])
            if parts[-1].strip():
                parts[-1] = changed(parts[-1], f"what turn {turn} says")
            made["content"] = "".join([*map(thought, parts[:-1]), parts[-1]])
        made.update((key, thought(message[key])) for key in REASONING_KEYS if isinstance(message.get(key), str))
        if message.get("tool_calls"):
            made["tool_calls"] = []
            for call in message["tool_calls"]:
                function = call["function"]
                name = f"reapkitQcall{next(numbers)}Q"
                wanted.append((name, f"the call of '{function['name']}' in turn {turn}"))
                arguments = changed(function["arguments"], f"the arguments of '{function['name']}' in turn {turn}")
                made["tool_calls"].append({**call, "function": {"name": name, "arguments": arguments}})
        out.append(made)
    return out, wanted, thoughts, keys
