"""The shapes in which published datasets come, each as the conversation that it is, and what of it nobody reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reapkit.calibration.formats import CHATS, INPUTS, PAIRS, SYSTEMS, TEXTS, TOOLS, columns_read, recognise, to_sample
from reapkit.calibration.turns import CONTENT_KEYS, REASONING_KEYS, ROLE_KEYS, SPEAKERS, read_turns, unread_keys


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict:
    return {"role": "assistant", "content": text, **more}


def calls(*named: tuple[str, dict], content: str | None = None, **more: Any) -> dict:
    made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in named]
    return {"role": "assistant", "content": content, "tool_calls": made, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
SCHEMA = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
WRAPPED = [{"type": "function", "function": SCHEMA}]
ROME = ("weather", {"city": "Rome"})

SHAPES = {
    "alpaca": (
        {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"},
        [user("Translate.\n\nGuten Tag"), says("Good day")],
    ),
    "alpaca without input": (
        {"instruction": "Say hello.", "input": "", "output": "hello", "text": "Below is an instruction"},
        [user("Say hello."), says("hello")],
    ),
    "alpaca with system and history": (
        {"instruction": "And you?", "output": "fine", "system": "Be brief.", "history": [["hello", "good day"]]},
        [SYSTEM, user("hello"), says("good day"), user("And you?"), says("fine")],
    ),
    "dolly": (
        {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada", "category": "qa"},
        [user("Who?\n\nAda wrote it."), says("Ada")],
    ),
    "question and answer": ({"question": "2+2?", "answer": "4"}, [user("2+2?"), says("4")]),
    "problem and solution": ({"problem": "2+2?", "solution": "It is 4."}, [user("2+2?"), says("It is 4.")]),
    "input and output": ({"input": "2+2?", "output": "4"}, [user("2+2?"), says("4")]),
    "orca": ({"system_prompt": "Be brief.", "question": "2+2?", "response": "4"}, [SYSTEM, user("2+2?"), says("4")]),
    "trl prompt and completion as turns": (
        {"prompt": [SYSTEM, user("2+2?")], "completion": [says("4")]},
        [SYSTEM, user("2+2?"), says("4")],
    ),
    "trl with tools": (
        {"prompt": [user("Rain?")], "completion": [calls(ROME)], "tools": [SCHEMA]},
        [user("Rain?"), calls(ROME)],
    ),
    "preferences with a prompt": (
        {"prompt": "2+2?", "chosen": [user("2+2?"), says("4")], "rejected": [user("2+2?"), says("5")]},
        [user("2+2?"), says("4")],
    ),
    "preferences without one": (
        {"chosen": [user("2+2?"), says("4")], "rejected": [user("2+2?"), says("5")]},
        [user("2+2?"), says("4")],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good"}]},
        [user("hello"), says("good")],
    ),
    "sharegpt with a system column": (
        {
            "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good"}],
            "system": "Be brief.",
        },
        [SYSTEM, user("hello"), says("good")],
    ),
    "sharegpt with calls": (
        {
            "conversations": [
                {"from": "human", "value": "Rain?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
                {"from": "observation", "value": "[0, 1]"},
                {"from": "gpt", "value": "No."},
            ],
            "tools": json.dumps([SCHEMA]),
        },
        [user("Rain?"), calls(ROME), {"role": "tool", "content": "[0, 1]"}, says("No.")],
    ),
    "sharegpt with two calls at once": (
        {
            "conversations": [
                {"from": "human", "value": "Rain?"},
                {
                    "from": "tool_call",
                    "value": json.dumps([{"name": n, "arguments": a} for n, a in (ROME, ("now", {}))]),
                },
                {"from": "function_response", "value": "dry"},
                {"from": "gpt", "value": "No."},
            ]
        },
        [user("Rain?"), calls(ROME, ("now", {})), {"role": "tool", "content": "dry"}, says("No.")],
    ),
    "role and value": (
        {"conversation": [{"role": "Human", "value": "hello"}, {"role": "MODEL", "value": "good"}]},
        [user("hello"), says("good")],
    ),
    "from and content": (
        {"messages": [{"from": "user", "content": "hello"}, {"from": "bot", "content": "good"}]},
        [user("hello"), says("good")],
    ),
    "speaker and text": (
        {"dialogue": [{"speaker": "user", "text": "hello"}, {"speaker": "chatgpt", "text": "good"}]},
        [user("hello"), says("good")],
    ),
    "openai": (
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                user("Rain?"),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "c1",
                            "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
                            "type": "function",
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "dry"},
                says("No."),
            ],
            "tools": WRAPPED,
        },
        [
            {"role": "developer", "content": "Be brief."},
            user("Rain?"),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
                ],
            },
            {"role": "tool", "content": "dry", "tool_call_id": "c1"},
            says("No."),
        ],
    ),
    "openai, old": (
        {
            "messages": [
                user("Rain?"),
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'},
                },
                {"role": "function", "name": "weather", "content": "dry"},
                says("No."),
            ],
            "functions": [SCHEMA],
        },
        [user("Rain?"), calls(ROME), {"role": "tool", "content": "dry", "name": "weather"}, says("No.")],
    ),
    "thoughts": (
        {"messages": [user("2+2?"), says("4", thinking="add"), user("2+3?"), says("5", reasoning_content="add again")]},
        [user("2+2?"), says("4", reasoning_content="add"), user("2+3?"), says("5", reasoning_content="add again")],
    ),
    "content parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Ra"}, {"type": "input_text", "text": "in?"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "look"},
                        {"type": "text", "text": "One moment."},
                        {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Rome"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "dry"}]}
                    ],
                },
                {"role": "assistant", "content": [{"type": "output_text", "text": "No."}]},
            ]
        },
        [
            user("Rain?"),
            {
                "role": "assistant",
                "content": "One moment.",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
                ],
                "reasoning_content": "look",
            },
            {"role": "tool", "content": "dry", "tool_call_id": "c1"},
            says("No."),
        ],
    ),
    "xlam": (
        {
            "query": "Rain?",
            "tools": json.dumps([{"name": "weather", "description": "", "parameters": {"city": {"type": "str"}}}]),
            "answers": json.dumps([{"name": "weather", "arguments": {"city": "Rome"}}]),
        },
        [user("Rain?"), calls(ROME)],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_is_read_whole(name: str) -> None:
    row, messages = SHAPES[name]
    sample = to_sample(row, recognise(row))
    assert sample.messages == messages
    if "tools" in row or "functions" in row:
        assert sample.tools is not None
        assert sample.tools[0]["function"]["name"] == "weather"


@pytest.mark.parametrize(
    ("name", "unread"),
    [
        ("alpaca without input", {"text"}),
        ("dolly", {"category"}),
        ("preferences with a prompt", {"rejected"}),
        ("openai, old", set()),
        ("alpaca with system and history", set()),
    ],
)
def test_columns_that_nothing_reads(name: str, unread: set[str]) -> None:
    row = {column: value for column, value in SHAPES[name][0].items() if value}
    assert set(row) - columns_read(recognise(row), row) == unread


@pytest.mark.parametrize(("role", "spelling"), [(role, each) for role, all in SPEAKERS.items() for each in all])
def test_every_spelling_of_a_role(role: str, spelling: str) -> None:
    content = '{"name": "f", "arguments": {}}' if role == "call" else "text"
    (turn,) = read_turns([{"role": spelling, "content": content}], "messages")
    assert turn["role"] == {"call": "assistant"}.get(role, role)
    assert bool(turn.get("tool_calls")) == (role == "call")


def test_an_unknown_role_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"turn 2 has the role 'critic', which is unknown. Known: system, developer,"
    ) as told:
        read_turns([user("hello"), {"role": "critic", "content": "bad"}], "messages")
    assert all(spelling in str(told.value) for spellings in SPEAKERS.values() for spelling in spellings)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "function_call", "value": "call weather"}, "turn 1 holds broken JSON"),
        ({"from": "function_call", "value": ""}, "turn 1 is a function call without content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "a content part of type 'image_url'"),
        ({"role": "user", "content": [3]}, "a content part that is int"),
        ({"role": "user", "content": {"text": "x"}}, "neither text nor a list of content parts"),
        ({"role": "assistant", "content": "", "function_call": "{"}, "turn 1: function_call holds broken JSON"),
        ({"role": "assistant", "content": "", "tool_calls": [3]}, "turn 1 has a tool call that is not a mapping"),
    ],
)
def test_turns_that_cannot_be_read(turn: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_turns([turn], "messages")


def test_keys_of_turns_that_only_a_template_could_read() -> None:
    turns = read_turns([{**user("hello"), "weight": 0, "name": None}, says("good", channel="final")], "messages")
    assert unread_keys(turns) == {"weight", "channel"}


def test_nulls_of_columns_are_no_content() -> None:
    row = {"instruction": "Say hello.", "input": None, "output": "hello", "system": None}
    assert to_sample(row, recognise(row)).messages == [user("Say hello."), says("hello")]


def test_the_page_says_every_name_that_is_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
    pairs = [name for pair in PAIRS for name in pair]
    spellings = [each for all in SPEAKERS.values() for each in all]
    names = [*CHATS, *INPUTS, *SYSTEMS, *TEXTS, *TOOLS, *CONTENT_KEYS, *REASONING_KEYS, *ROLE_KEYS, *pairs, *spellings]
    assert [name for name in names if f"`{name}`" not in page] == []
