"""Calls in text against the schemas that the prompt offered."""

import pytest

from reapkit.evaluation.tool_calls import calls, json_objects, offered_tools, schema_problem, valid_calls

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"enum": ["C", "F"]}},
    "required": ["city"],
}
PROMPT = (
    '<|im_start|>system\nTools {like {these}:\n{"name": "weather", "parameters": '
    + str(SCHEMA).replace("'", '"')
    + "}\n"
    '{"type": "function", "function": {"name": "stop", "parameters": {}}}\n<|im_end|>'
)


def test_objects_are_found_amid_text_and_broken_braces():
    assert list(json_objects('a {b} {"x": {"y": 1}} {"z": [}')) == [{"x": {"y": 1}}]
    assert list(json_objects("no braces")) == []


def test_tools_of_a_prompt_come_plain_or_under_function():
    assert offered_tools(PROMPT) == {"weather": SCHEMA, "stop": {}}


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('<tool_call>{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}</tool_call>', True),
        ('{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}', True),
        ('{"name": "weather", "arguments": {"city": "Oslo"}} {"name": "stop", "arguments": {}}', True),
        ('{"name": "weather", "arguments": {"city": "Oslo"}} {"name": "start", "arguments": {}}', False),
        ('{"name": "weather", "arguments": {"days": 2}}', False),
        ('{"name": "weather", "arguments": {"city": "Oslo", "days": "2"}}', False),
        ('{"name": "weather", "arguments": {"city": "Oslo", "days": true}}', False),
        ('{"name": "weather", "arguments": {"city": "Oslo", "mood": "good"}}', False),
        ('{"name": "weather", "arguments": {"city": "Oslo", "units": "K"}}', False),
        ('{"name": "weather", "arguments": "Oslo"}', False),
        ('{"name": "weather", "arguments": {"city": "Os', False),
        ("I have no function for that.", False),
    ],
)
def test_a_call_is_valid_when_its_schema_says_so(text, valid):
    assert valid_calls(text, offered_tools(PROMPT)) is valid


def test_arguments_that_are_no_json_stay_text():
    assert calls('{"name": "f", "arguments": "{oops"}') == [("f", "{oops")]


@pytest.mark.parametrize(
    ("value", "schema", "problem"),
    [
        ([1, "a"], {"type": "array", "items": {"type": "integer"}}, "$[1]: not of type integer"),
        ({"a": {"b": 1}}, {"properties": {"a": {"properties": {"c": {}}}}}, "$.a: has no property b"),
        (
            {"a": 1, "b": 2},
            {"properties": {"a": {}}, "additionalProperties": {"type": "string"}},
            "$.b: not of type string",
        ),
        ({"b": 2}, {"properties": {"a": {}}, "additionalProperties": True}, None),
        ({"b": 2}, {"type": "object"}, None),
        (None, {"type": ["string", "null"]}, None),
        (3, {"anyOf": [{"type": "string"}, {"const": 4}]}, "$: fits no case of anyOf"),
        (5, {"const": 4}, "$: not 4"),
        (1.5, {"type": "integer"}, "$: not of type integer"),
        (2, {"type": "number"}, None),
    ],
)
def test_schema_problems_say_where(value, schema, problem):
    assert schema_problem(value, schema) == problem
