"""The chat templates that trl ships, which are those of published models, on seven conversations: the right tokens are
the assistant's, or the conversation is refused for the right reason.

What is right is told twice: by the words of each turn, which occur nowhere else, and by trl's own training templates,
whose generation blocks mark what the assistant writes (and, some of them, what the generation prompt gives too).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reapkit.calibration.formats import Sample
from reapkit.calibration.renderer import Renderer
from reapkit.calibration.spans import Rendered
from reapkit.calibration.template_fit import TurnsHidden
from reapkit.calibration.template_process import TemplateProcess
from tests.support.words import spec

FOUND = find_spec("trl")
TEMPLATES = Path(str(FOUND.origin)).parent / "chat_templates" if FOUND else Path("trl is not installed")
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "WHAT",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "WHERE"}},
                "required": ["city"],
            },
        },
    }
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "ROMA"}}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "DRY"}
ASKED = ("QONE", "QTWO", "SYSTEM", "DRY", "WHAT", "WHERE")
"""What the assistant did not write."""
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], Any, list[list[str]], list[list[str]]]] = {
    # turns, tools, per assistant turn the words that it must hold, and those that it may hold besides: thoughts
    "one answer": ([user("QONE"), says("AONE")], None, [["AONE"]], [[]]),
    "two answers": ([user("QONE"), says("AONE"), user("QTWO"), says("ATWO")], None, [["AONE"], ["ATWO"]], [[], []]),
    "system": (
        [{"role": "system", "content": "SYSTEM"}, user("QONE"), says("AONE"), user("QTWO"), says("ATWO")],
        None,
        [["AONE"], ["ATWO"]],
        [[], []],
    ),
    "the assistant first": ([says("AZERO"), user("QONE"), says("AONE")], TOOLS, [["AZERO"], ["AONE"]], [[], []]),
    "a call": ([user("QONE"), CALL, RESULT, says("AONE")], TOOLS, [["weather", "city", "ROMA"], ["AONE"]], [[], []]),
    "thoughts": (
        [user("QONE"), says("AONE", reasoning_content="TONE"), user("QTWO"), says("ATWO", reasoning_content="TTWO")],
        None,
        [["AONE"], ["ATWO"]],
        [["TONE"], ["TTWO"]],
    ),
    "thoughts in the content": (
        [user("QONE"), says("<think>\nTONE\n</think>\n\nAONE"), user("QTWO"), says("<think>\nTTWO\n</think>\n\nATWO")],
        None,
        [["AONE"], ["ATWO"]],
        [["TONE"], ["TTWO"]],
    ),
}
ENDS_A_CALL = "<|tool_response>"
"""Gemma's generation ends with it, so the assistant writes it; trl leaves it to the tool."""
REFUSED = {
    "roles must alternate": r"refuses this conversation \(.*(roles must alternate|no attribute 'strip'|content type)",
    "no system": r"refuses this conversation \(.*[Ss]ystem role not supported",
    "calls are not shown": "does not show the call of 'weather' in turn 2",
    "null is no text": r"refuses this conversation \(.*None has no element 0",
    "shown as the user's": "does not render turn 1 as an assistant's",
}
EXPECTED_REFUSALS = {
    "cohere": {"the assistant first": "roles must alternate", "a call": "roles must alternate"},
    "cohere2": {"the assistant first": "roles must alternate", "a call": "roles must alternate"},
    "gemma": {"system": "no system", "the assistant first": "roles must alternate", "a call": "roles must alternate"},
    "gemma3": {"the assistant first": "roles must alternate", "a call": "roles must alternate"},
    "idefics3": {"a call": "null is no text"},
    "lfm2": {"a call": "calls are not shown"},
    "llama3": {"a call": "calls are not shown"},
    "llama3_1": {"the assistant first": "shown as the user's"},
    "llama3_2": {"the assistant first": "shown as the user's"},
    "llava_next": {"a call": "null is no text"},
    "phi3": {"a call": "calls are not shown"},
    "phi3_5": {"a call": "calls are not shown"},
    "qwen2_5_vl": {"a call": "calls are not shown"},
    "smolvlm": {"a call": "null is no text"},
}
"""Of the templates as they were when this was written; those that came later are held to the same rules."""

pytestmark = pytest.mark.skipif(not NAMES, reason="trl, of the extra `test`, is not installed")


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    running = TemplateProcess()
    yield running
    running.close()


def rendered(template: str, conversation: str, process: TemplateProcess) -> Rendered:
    added = sorted(set(re.findall(r"<[^<>\s{}'\"%]{2,40}>|\[/?[A-Z_]{3,30}\]", template)))
    tokenizer = SimpleNamespace(
        chat_template=template,
        get_chat_template=lambda name, tools=None: template,
        special_tokens_map={"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        get_added_vocab=lambda: dict.fromkeys(["<bos>", "<eos>", *added]),
    )
    turns, tools, _, _ = CONVERSATIONS[conversation]
    calibration = spec({"name": "chat", "source": "chat.jsonl"}, date="2025-03-04")  # some read the clock
    renderer = Renderer(calibration, tokenizer, None, process)
    return renderer.render(Sample(messages=deepcopy(turns), tools=tools))


def test_there_are_templates() -> None:
    assert len(NAMES) >= 35


@pytest.mark.parametrize("name", NAMES)
def test_right_tokens_or_right_refusal(name: str, process: TemplateProcess) -> None:
    template = (TEMPLATES / f"{name}.jinja").read_text()
    refused = {}
    for conversation, (_, _, must, may) in CONVERSATIONS.items():
        try:
            item = rendered(template, conversation, process)
        except ValueError as error:
            refused[conversation] = next(why for why, text in REFUSED.items() if re.search(text, str(error)))
            assert isinstance(error, TurnsHidden) == (refused[conversation] == "calls are not shown")
            continue
        spans = [item.text[start:stop] for start, stop in item.spans]
        assert len(spans) == len(must), (conversation, spans)
        for number, (span, words, thoughts) in enumerate(zip(spans, must, may, strict=True)):
            assert all(word in span for word in words), (conversation, span)
            others = [word for turn in (*must, *may) for word in turn if word not in (*words, *thoughts)]
            assert not any(word in span for word in (*ASKED, *others)), (conversation, span)
            assert all(word in span for word in thoughts if word in item.text), (conversation, number, span)
        removed = sum(word not in item.text for thoughts in may for word in thoughts)
        assert item.notes.left_out == removed, (conversation, item.notes)
    if name in EXPECTED_REFUSALS or not refused:
        assert refused == EXPECTED_REFUSALS.get(name, {})


@pytest.mark.parametrize("name", [name for name in NAMES if (TEMPLATES / f"{name}_training.jinja").exists()])
def test_marks_what_the_training_template_marks(name: str, process: TemplateProcess) -> None:
    """But for blanks, and for the text before a turn that the generation prompt gives."""
    ours, theirs = ((TEMPLATES / f"{name}{kind}.jinja").read_text() for kind in ("", "_training"))
    for conversation in CONVERSATIONS:
        try:
            found, marked = rendered(ours, conversation, process), rendered(theirs, conversation, process)
        except ValueError:
            continue
        if found.text != marked.text:  # the training template changes more than the marks
            continue
        here, there = (
            {place for start, stop in item.spans for place in range(start, stop)} for item in (found, marked)
        )
        words = {place for place, char in enumerate(found.text) if not char.isspace()}
        given = {
            place
            for start, _ in found.spans
            for place in range(max([0, *(stop for _, stop in found.spans if stop <= start)]), start)
        }
        ends = {
            place
            for start, stop in found.spans
            for place in range(found.text.rfind(ENDS_A_CALL, start, stop), stop)
            if found.text[start:stop].endswith(ENDS_A_CALL)
        }
        assert here & words <= there | ends, (conversation, found.spans, marked.spans)
        assert (there - here) & words <= given, (conversation, found.spans, marked.spans)
