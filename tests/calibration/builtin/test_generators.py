"""The generated sources: the same rows everywhere, well formed, and none that the demo model was trained on."""

import ast
import hashlib
import json
import operator
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import islice

import pytest

from reapkit.calibration.builtin.generators import SOURCES, TRAINING_SEED, description, generate

FIRST_200_ROWS = {
    "code": "d98a237fb5349b8293e8f22a7771e94105c6ea881377afc3d5e209c0cd1a1758",
    "tools": "a935273e2c5c8d83e7b1a77ed934c3123c32d9627a530e4f0cbd7798fb47e520",
    "prose": "cff43d841d95a068d73de15b97299fa2996a86a0fd0ca56b80d2dd537f30fee7",
    "math": "61f508efdd1ffcf15d8529434450f282820a56ff5bf3a1211d850be7c2c30ca0",
}
"""sha256 of the first 200 rows of seed 0, one JSON document per line."""


def rows(name: str, count: int, *, seed: int = 0, start: int = 0) -> list[dict]:
    return list(islice(generate(name, seed=seed, start=start), count))


def serialized(row: dict) -> str:
    return json.dumps(row, sort_keys=True)


@pytest.mark.parametrize("name", SOURCES)
def test_rows_are_the_same_on_every_python(name: str) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows(name, 200))
    assert hashlib.sha256(lines.encode()).hexdigest() == FIRST_200_ROWS[name]


@pytest.mark.parametrize("name", SOURCES)
def test_a_row_depends_on_its_index_alone(name: str) -> None:
    assert rows(name, 5, start=40) == rows(name, 45)[40:]


@pytest.mark.parametrize("name", SOURCES)
def test_seeds_give_different_rows(name: str) -> None:
    first, second = ({serialized(row) for row in rows(name, 100, seed=seed)} for seed in (0, 1))
    assert len(first) == len(second) == 100
    assert first.isdisjoint(second)


@pytest.mark.parametrize("name", SOURCES)
def test_no_calibration_row_was_trained_on(name: str) -> None:
    training = generate(name, seed=TRAINING_SEED, training=True)
    trained = {serialized(row) for row in islice(training, 20_000)}
    assert trained.isdisjoint(serialized(row) for row in rows(name, 2000))


def test_the_training_seed_is_reserved() -> None:
    with pytest.raises(ValueError, match="reserved for the rows the demo model was trained on"):
        generate("code", seed=TRAINING_SEED)
    with pytest.raises(ValueError, match="reserved for the rows the demo model was trained on"):
        generate("code", seed=0, training=True)


def test_an_unknown_source_lists_the_known_ones() -> None:
    for function in (description, lambda name: generate(name, seed=0)):
        with pytest.raises(ValueError, match=r"'poems' does not exist\. Known: code, tools, prose, math"):
            function("poems")


def test_every_source_is_described() -> None:
    assert all(description(name) for name in SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_rows_are_ascii(name: str) -> None:
    assert all(json.dumps(row, ensure_ascii=False).isascii() for row in rows(name, 300))


def test_code_is_valid_python_of_the_promised_length() -> None:
    for row in rows("code", 600):
        ast.parse(row["text"])
        assert 400 <= len(row["text"]) <= 2000


def test_prose_has_the_promised_length_and_the_right_articles() -> None:
    for row in rows("prose", 600):
        assert 400 <= len(row["text"]) <= 2000
        assert not re.search(r"[{}]|  |\ba [aeio]|\ban [^aeioh]|\.\.", row["text"]), row["text"]


def test_most_prose_sentences_occur_once() -> None:
    sentences = Counter(sentence for row in rows("prose", 200) for sentence in re.split(r"(?<=\.)\s+", row["text"]))
    assert sum(count == 1 for count in sentences.values()) > 0.9 * len(sentences)


def test_tool_calls_fit_their_schemas() -> None:
    for row in rows("tools", 600):
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row["tools"]}
        for message in row["messages"]:
            for call in message.get("tool_calls", []):
                _check_value(call["function"]["arguments"], schemas[call["function"]["name"]])


def test_tool_results_follow_their_calls() -> None:
    for row in rows("tools", 300):
        waiting = 0
        for message in row["messages"]:
            assert (message["role"] == "tool") == (waiting > 0)
            waiting = len(message["tool_calls"]) if "tool_calls" in message else max(0, waiting - 1)
            if message["role"] == "tool":
                assert isinstance(json.loads(message["content"]), dict)
        assert row["messages"][-1]["role"] == "assistant"


def test_there_are_at_least_twenty_tools_and_some_turns_call_none() -> None:
    drawn = rows("tools", 400)
    names = {tool["function"]["name"] for row in drawn for tool in row["tools"]}
    assert len(names) >= 20
    assert any(not any("tool_calls" in message for message in row["messages"]) for row in drawn)


def test_every_equation_in_a_worked_answer_holds() -> None:
    checked = 0
    for row in rows("math", 600):
        for message in row["messages"]:
            if message["role"] == "assistant":
                checked += _check_equations(message["content"])
    assert checked > 3000


def test_builtin_sources_import_no_torch() -> None:
    program = (
        "import sys, reapkit.calibration.builtin.generators; sys.exit('torch' in sys.modules or 'transformers' in"
        " sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def _check_value(value: object, schema: dict) -> None:
    """A naive JSON schema check, enough for the schemas that are generated."""
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}
    assert isinstance(value, kinds[schema["type"]])
    assert value in schema.get("enum", [value])
    if schema["type"] == "array":
        for element in value:
            _check_value(element, schema["items"])
    if schema["type"] == "object":
        assert set(schema["required"]) <= set(value) <= set(schema["properties"])
        for name, member in value.items():
            _check_value(member, schema["properties"][name])


def _check_equations(text: str) -> int:
    """Evaluate every `a + b = c` of whole numbers in a text; returns how many there were."""
    equations = re.findall(r"(?:^|[.;:] |cost |Together |hold |is )(\d+(?: [-+*/] \d+)+) = (\d+)(?![\w/])", text)
    for left, right in equations:
        assert _value(ast.parse(left, mode="eval").body) == int(right), text
    return len(equations)


def _value(node: ast.expr) -> Fraction:
    """The value of an expression of whole numbers, without rounding."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    operators = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
    return operators[type(node.op)](_value(node.left), _value(node.right))
