"""Every format's rows as samples, and what each kind of bad row is told."""

from __future__ import annotations

import json

import pytest

from reapkit.calibration.formats import Sample, recognise, to_sample
from reapkit.recipe.schema import MessagesFormat, PromptFormat, TextFormat, TokensFormat, XlamFormat

MESSAGES = MessagesFormat(messages="messages")
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good"}]


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        ("instruction output", PromptFormat(prompt="instruction", completion="output")),
        ("query tools answers id", XlamFormat()),
        ("messages instance_id patch", MESSAGES),
        ("messages num_tokens source", MESSAGES),
        ("messages tools", MESSAGES),
        ("conversations", MessagesFormat(messages="conversations")),
        ("text", TextFormat(text="text")),
        ("prompt completion", PromptFormat(prompt="prompt", completion="completion")),
        ("input_ids assistant_mask", TokensFormat()),
    ],
)
def test_known_schemas_are_recognised(columns: str, format: object) -> None:
    assert recognise(columns.split()) == format


def test_unknown_columns_are_listed() -> None:
    with pytest.raises(ValueError, match=r"no format fits the columns a, b. Set `format`, e.g. \{text: COLUMN\}"):
        recognise(["b", "a"])


def test_text() -> None:
    assert to_sample({"body": "hello"}, TextFormat(text="body")) == Sample(text="hello")
    assert to_sample({"body": None}, TextFormat(text="body")).size == 0


def test_prompt_and_completion_are_two_turns() -> None:
    assert to_sample({"q": "hello", "a": "good"}, PromptFormat(prompt="q", completion="a")) == Sample(messages=TURNS)
    assert to_sample({"q": "hello", "a": " "}, PromptFormat(prompt="q", completion="a")).size == 0


@pytest.mark.parametrize(
    "messages",
    [
        TURNS,
        json.dumps(TURNS),
        [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good"}],
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}],
                "name": None,
            },
            {"role": "assistant", "content": "good", "tool_calls": None},
        ],
    ],
)
def test_messages_in_their_spellings(messages: object) -> None:
    assert to_sample({"messages": messages}, MESSAGES) == Sample(messages=TURNS)


def test_calls_are_decoded_and_wrapped() -> None:
    turns = [
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    tools = [{"name": "add", "parameters": {"type": "object", "properties": {}}}]
    sample = to_sample({"messages": json.dumps(turns), "tools": json.dumps(tools)}, MESSAGES)
    assert sample.messages[1] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}],
    }
    assert sample.messages[2] == {"role": "tool", "content": "3", "tool_call_id": "c1"}
    assert sample.tools == [{"type": "function", "function": tools[0]}]
    assert sample.tool_calls == 1


def test_nulls_within_json_lines_stay() -> None:
    """Somebody wrote them; nulls of columnar files are removed where those are read."""
    call = {"function": {"name": "add", "arguments": {"a": 1, "city": None}}}
    sample = to_sample(
        {
            "messages": [
                {"role": "user", "content": "x", "tool_calls": None},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ]
        },
        MESSAGES,
    )
    assert sample.messages == [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "city": None}}}],
        },
    ]


def test_xlam() -> None:
    row = {
        "query": "weather?",
        "answers": json.dumps([{"name": "weather", "arguments": {"city": "Rome"}}]),
        "tools": json.dumps(
            [
                {
                    "name": "weather",
                    "description": "Weather now",
                    "parameters": {
                        "city": {"type": "str", "description": "Where"},
                        "days": {"type": "int, optional", "description": "How long"},
                        "units": {"type": "List[str]", "default": "C"},
                    },
                }
            ]
        ),
    }
    sample = to_sample(row, XlamFormat())
    assert sample.messages == [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}],
        },
    ]
    assert sample.tools == [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "Weather now",
                "parameters": {
                    "type": "object",
                    "required": ["city"],
                    "properties": {
                        "city": {"type": "string", "description": "Where"},
                        "days": {"type": "integer", "description": "How long"},
                        "units": {"type": "array", "default": "C"},
                    },
                },
            },
        }
    ]


def test_tokens() -> None:
    assert to_sample({"input_ids": [1, 2], "assistant_mask": [0, 1]}, TokensFormat()) == Sample(
        input_ids=[1, 2], assistant=[0, 1]
    )
    assert to_sample({"input_ids": [1, 2]}, TokensFormat()) == Sample(input_ids=[1, 2])


@pytest.mark.parametrize(
    ("row", "format", "message"),
    [
        ({"a": 1}, TextFormat(text="text"), "column 'text' is missing; the row has a"),
        ({"text": 3}, TextFormat(text="text"), "column 'text' holds int, not text"),
        ({"messages": "[{"}, MESSAGES, "column 'messages' holds broken JSON"),
        ({"messages": '"hello"'}, MESSAGES, "column 'messages' is not a list of turns"),
        ({"messages": [TURNS[0], {"content": "good"}]}, MESSAGES, "turn 2 has no role; it has content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            MESSAGES,
            "turn 1 holds a content part of type 'image'",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]},
            MESSAGES,
            "turn 1 has a tool call without a function name",
        ),
        ({"messages": TURNS, "tools": "{}x"}, MESSAGES, "column 'tools' holds broken JSON"),
        ({"messages": TURNS, "tools": '"search"'}, MESSAGES, "column 'tools' is not a list of tool schemas"),
        (
            {"query": "q", "tools": "[1]", "answers": '[{"name": "f"}]'},
            XlamFormat(),
            "column 'tools' is not a list of named tools",
        ),
        (
            {"query": "q", "tools": "[]", "answers": '{"name": "f"}'},
            XlamFormat(),
            "column 'answers' is not a list of calls",
        ),
        ({"input_ids": ["a"]}, TokensFormat(), "column 'input_ids' is not a list of token ids"),
        ({"input_ids": [1, 2], "assistant_mask": [1]}, TokensFormat(), "column 'assistant_mask' has 1 marks for 2 ids"),
    ],
)
def test_bad_rows_say_what_is_wrong(row: dict, format: object, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        to_sample(row, format)


def test_equal_content_has_equal_hashes_whatever_the_format() -> None:
    chat = to_sample({"messages": TURNS}, MESSAGES)
    pair = to_sample({"q": "hello", "a": "good"}, PromptFormat(prompt="q", completion="a"))
    assert chat.content_hash() == pair.content_hash()
    assert chat.content_hash() != Sample(messages=TURNS[:1]).content_hash()


MARK = "\ufeff"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": f"{MARK}one{MARK}two"}, Sample(text=f"one{MARK}two")),
        (
            {"prompt": f"{MARK}ask", "completion": f"{MARK}tell"},
            Sample(messages=[{"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}]),
        ),
        (
            {"messages": [{"role": "assistant", "content": f"{MARK}tell"}]},
            Sample(messages=[{"role": "assistant", "content": "tell"}]),
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "text", "text": f"{MARK}tell"}]}]},
            Sample(messages=[{"role": "assistant", "content": "tell"}]),
        ),
        (
            {"messages": MARK + '[{"role": "assistant", "content": "tell"}]'},
            Sample(messages=[{"role": "assistant", "content": "tell"}]),
        ),
    ],
)
def test_a_byte_order_mark_at_the_start_is_nobodys_text(row: dict, expected: Sample) -> None:
    assert to_sample(row, recognise(row)) == expected
