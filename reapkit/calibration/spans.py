"""Finds the assistant's text in a rendered sample, in one of four ways, and maps it to tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from reapkit.calibration.formats import Sample
from reapkit.calibration.template_process import TemplateProcess, TemplateRefused, TemplateStopped
from reapkit.checkpoint.locate import local_path
from reapkit.core.errors import UnusableError
from reapkit.recipe.schema import CalibrationSpec, Spans

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

BATCH_CHARACTERS = 1 << 21
"""Text tokenized at once: encodings take about fifty times its size in memory until their ids are copied out."""

WAYS = {
    "markers": "between the recipe's markers",
    "generation": "the template's {% generation %} blocks",
    "prefix": "prefix rendering",
    "whole text": "the whole text",
    "as given": "the source's own marks",
    "none": "not needed: every position is scored",
}
"""How assistant tokens were found, as `calibration.json` names it and as a person reads it."""


@dataclass(frozen=True)
class Rendered:
    """A sample as the model reads it: text, assistant spans in characters, and whether the tokenizer adds special
    tokens."""

    text: str
    spans: list[tuple[int, int]]
    way: str
    special: bool


class Renderer:
    """Samples to text with assistant spans, by the first way that applies: markers, {% generation %}, prefix rendering.

    A `chat_template` of the recipe replaces the model's. Plain text counts as written by the assistant throughout,
    unless markers are given: it has no prompt that could be left out.
    """

    def __init__(
        self, calibration: CalibrationSpec, tokenizer: Any, own_template: str | None, process: TemplateProcess
    ):
        self.tokenizer = tokenizer
        self.score = calibration.score
        self.markers = calibration.spans
        self.own_template = own_template
        self._process = process

    @property
    def shows_calls(self) -> bool:
        """Whether any template in use mentions tool calls; where it does not, they vanish without a word."""
        own = self.own_template if self.own_template is not None else self.tokenizer.chat_template
        return not own or "tool_calls" in str(own)

    def template(self, tools: list[dict[str, Any]] | None) -> str:
        """The chat template in use. Raises ValueError where there is none."""
        if self.own_template is None and not self.tokenizer.chat_template:
            raise ValueError(
                "the model ships no chat template. Give calibration.chat_template (a Jinja file), "
                "or render the chats yourself into a text column and give calibration.spans"
            )
        return (
            self.own_template if self.own_template is not None else self.tokenizer.get_chat_template(None, tools=tools)
        )

    def render(self, sample: Sample) -> Rendered:
        """Text and spans of a text or chat sample. Raises ValueError saying what is wrong and what to do."""
        if sample.text is not None:
            return self._render_text(sample.text)
        assert sample.messages is not None, "samples of tokens are not rendered"
        template = self.template(sample.tools)
        if self.markers is None and _GENERATION.search(template):
            text, spans = self._chat(template, sample.messages, sample.tools, marked=True)
            return Rendered(text, [(start, stop) for start, stop in spans], "generation", False)
        text = self._chat(template, sample.messages, sample.tools)
        if self.markers is not None:
            return Rendered(text, marked_spans(text, self.markers), "markers", False)
        if self.score == "all":
            return Rendered(text, [], "none", False)
        return Rendered(text, self._prefix_spans(template, sample.messages, sample.tools, text), "prefix", False)

    def _render_text(self, text: str) -> Rendered:
        bos = self.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        if self.markers is not None:
            return Rendered(text, marked_spans(text, self.markers), "markers", special)
        return Rendered(text, [(0, len(text))], "whole text", special)

    def _chat(
        self, template: str, messages: list[dict[str, Any]], tools: Any, *, prompt: bool = False, marked: bool = False
    ) -> Any:
        """The conversation as text, with `marked` also its generation spans.

        Call arguments are given as objects, as transformers documents; templates that concatenate them get JSON text
        instead.
        """
        try:
            return self._apply(template, messages, tools, prompt, marked)
        except TemplateStopped:
            raise
        except TemplateRefused as error:
            if any(turn.get("tool_calls") for turn in messages):
                try:
                    return self._apply(template, _with_text_arguments(messages), tools, prompt, marked)
                except TemplateRefused:
                    pass  # the first error is the one to show
            raise ValueError(f"the chat template refuses this conversation ({error})") from error

    def _apply(self, template: str, messages: list[dict[str, Any]], tools: Any, prompt: bool, marked: bool) -> Any:
        rendered, spans = self._process.render(
            template,
            conversations=[messages],
            tools=tools,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marked,
            **self.tokenizer.special_tokens_map,
        )
        return (rendered[0], spans[0]) if marked else rendered[0]

    def _prefix_spans(
        self, template: str, messages: list[dict[str, Any]], tools: Any, whole: str
    ) -> list[tuple[int, int]]:
        """What each assistant turn adds to the rendering of the turns before it.

        A turn's span begins where the rendering with it and that of a generation prompt part (a prompt that opens a
        thought parts from a turn without one), and ends where the rendering up to it ends. That rendering must be a
        prefix of the whole conversation, and the turns before it a prefix of that.
        """
        spans = []
        for number, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            upto = self._chat(template, messages[: number + 1], tools)
            prompt = self._chat(template, messages[:number], tools, prompt=True) if number else ""
            nests = upto.startswith(prompt)
            before = prompt if nests else self._chat(template, messages[:number], tools)
            if not whole.startswith(upto) or not upto.startswith(before):
                raise ValueError(self._no_nesting(template, messages, tools, number))
            shared = 0 if nests else _shared_length(prompt.removeprefix(before), upto[len(before) :])
            spans.append((len(before) + shared, len(upto)))
        return spans

    def _no_nesting(self, template: str, messages: list[dict[str, Any]], tools: Any, number: int) -> str:
        before, prompt = (
            self._chat(template, messages[:number], tools, prompt=prompt) if number else "" for prompt in (False, True)
        )
        opening = prompt.removeprefix(before) if prompt.startswith(before) else ""
        markers = json.dumps(
            {"start": opening or "<|assistant|>", "end": self.tokenizer.eos_token or "<|end|>"}, ensure_ascii=False
        )
        return (
            f"the chat template rewrites earlier turns: turn {number + 1} is rendered otherwise once later turns"
            " follow, so its assistant tokens cannot be found by comparing prefixes. Give markers, e.g."
            f" calibration.spans: {markers}, or a calibration.chat_template with {{% generation %}} blocks"
        )


def read_template(path: str | None, recipe_directory: Path) -> str | None:
    """The text of the recipe's `chat_template`, if it has one. Raises UnusableError where the file cannot be read."""
    if path is None:
        return None
    file = local_path(path, recipe_directory)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableError(
            f"calibration.chat_template: {file} cannot be read ({type(error).__name__}). "
            "Paths start from the recipe's folder."
        ) from None


def _with_text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": text}}

    return [
        {**turn, "tool_calls": [as_text(call) for call in turn["tool_calls"]]} if turn.get("tool_calls") else turn
        for turn in messages
    ]


def marked_spans(text: str, markers: Spans) -> list[tuple[int, int]]:
    """Character spans from behind each start marker to the end of the next end marker, which is included.

    A turn that is not closed ends before the next start marker, or with the text.
    """
    ends = (markers.end,) if isinstance(markers.end, str) else tuple(markers.end)
    spans = []
    position = text.find(markers.start)
    while position >= 0:
        begin = position + len(markers.start)
        position = text.find(markers.start, begin)
        stop = position if position >= 0 else len(text)
        found = [place + len(end) for end in ends if (place := text.find(end, begin)) >= 0 and place < stop]
        spans.append((begin, min(found, default=stop)))
    return spans


def encode(rendered: Sequence[Rendered], tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids int32 [n] and assistant marks uint8 [n] of each text; a token is the assistant's when any of its characters
    is.

    Texts go through the tokenizer in batches, on all cores, with the interpreter free meanwhile. Tokenizers without
    character offsets (remote code) encode the stretches between span borders one by one.
    """
    if not tokenizer.is_fast:
        return [_encode_stretches(item, tokenizer) for item in rendered]
    results: list[Any] = [None] * len(rendered)
    for numbers in _batches(rendered):
        # The backend itself: transformers' call first sets truncation and padding on it, which fails while a thread
        # encodes.
        encodings = tokenizer.backend_tokenizer.encode_batch(
            [rendered[number].text for number in numbers], add_special_tokens=rendered[numbers[0]].special
        )
        for number, encoding in zip(numbers, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            results[number] = ids, _marks(encoding, rendered[number], len(ids))
    return results


def _batches(rendered: Sequence[Rendered]) -> Iterator[list[int]]:
    """Numbers of texts that agree on special tokens, at most `BATCH_CHARACTERS` together (a longer text comes
    alone)."""
    for special in (False, True):
        chosen, characters = [], 0
        for number, item in enumerate(rendered):
            if item.special != special:
                continue
            if chosen and characters + len(item.text) > BATCH_CHARACTERS:
                yield chosen
                chosen, characters = [], 0
            chosen.append(number)
            characters += len(item.text)
        if chosen:
            yield chosen


def _marks(encoding: Any, item: Rendered, length: int) -> np.ndarray:
    marks = np.zeros(length, np.uint8)
    if item.way == "whole text":
        marks[:] = 1 - np.array(encoding.special_tokens_mask, np.uint8) if item.special else 1
        return marks
    for start, stop in item.spans:
        first, last = _token_range(encoding, start, stop)
        marks[first:last] = 1
    return marks


def _token_range(encoding: Any, start: int, stop: int) -> tuple[int, int]:
    """The tokens that hold a character of [start, stop); characters that no token holds (dropped blanks) are stepped
    over."""
    first = next((token for place in range(start, stop) if (token := encoding.char_to_token(place)) is not None), None)
    if first is None:
        return 0, 0
    last = next(
        token for place in range(stop - 1, start - 1, -1) if (token := encoding.char_to_token(place)) is not None
    )
    # A character of several bytes may be several tokens, of which char_to_token names the first.
    while (
        last + 1 < len(encoding)
        and (chars := encoding.token_to_chars(last + 1))
        and chars[0] < stop
        and chars[1] > start
    ):
        last += 1
    return first, last + 1


def _shared_length(one: str, other: str) -> int:
    """Characters of the longest common prefix."""
    for number, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return number
    return min(len(one), len(other))


def _encode_stretches(item: Rendered, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    ids: list[int] = []
    marks: list[int] = []
    borders = sorted({0, len(item.text), *(border for span in item.spans for border in span)})
    for number, (start, stop) in enumerate(pairwise(borders)):
        stretch = tokenizer.encode(item.text[start:stop], add_special_tokens=item.special and number == 0)
        ids += stretch
        marks += [int(any(a <= start and stop <= b for a, b in item.spans))] * len(stretch)
    return np.array(ids, np.int32), np.array(marks, np.uint8)
