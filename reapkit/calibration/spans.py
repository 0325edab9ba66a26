"""Maps assistant spans of rendered samples to tokens, and finds them between markers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from reapkit.recipe.schema import Spans

BATCH_CHARACTERS = 1 << 21
"""Text tokenized at once: encodings take about fifty times its size in memory until their ids are copied out."""

WAYS = {
    "markers": "between the recipe's markers",
    "generation": "the template's {% generation %} blocks",
    "prefix": "prefix rendering",
    "shown": "what the last rendering shows of each turn",
    "whole text": "the whole text",
    "as given": "the source's own marks",
    "none": "not needed: every position is scored",
}
"""How assistant tokens were found, as `calibration.json` names it and as a person reads it."""


@dataclass(frozen=True)
class Notes:
    """What a sample's rendering showed: tool schemas that the template hides (0 or 1), pieces of thoughts that it left
    out, spans between markers and those of them that no end marker closes; and how many of its tokens the source's
    `max_tokens` left out."""

    hidden_tools: int = 0
    left_out: int = 0
    marked: int = 0
    unclosed: int = 0
    shortened: int = 0


NOTHING = Notes()


@dataclass(frozen=True)
class Rendered:
    """A sample as the model reads it: text, assistant spans in characters, whether the tokenizer adds special tokens,
    and what was noticed."""

    text: str
    spans: list[tuple[int, int]]
    way: str
    special: bool
    notes: Notes = NOTHING


def marked_spans(text: str, markers: Spans) -> list[tuple[int, int]]:
    """Character spans from behind each start marker to the end of the next end marker, which is included.

    A turn that is not closed ends before the next start marker, or with the text.
    """
    return [span for span, _ in closed_spans(text, markers)]


def closed_spans(text: str, markers: Spans) -> list[tuple[tuple[int, int], bool]]:
    """As `marked_spans`, with whether an end marker closes each."""
    ends = (markers.end,) if isinstance(markers.end, str) else tuple(markers.end)
    spans = []
    position = text.find(markers.start)
    while position >= 0:
        begin = position + len(markers.start)
        position = text.find(markers.start, begin)
        stop = position if position >= 0 else len(text)
        found = [place + len(end) for end in ends if (place := text.find(end, begin)) >= 0 and place < stop]
        spans.append(((begin, min(found, default=stop)), bool(found)))
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


def _encode_stretches(item: Rendered, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    ids: list[int] = []
    marks: list[int] = []
    borders = sorted({0, len(item.text), *(border for span in item.spans for border in span)})
    for number, (start, stop) in enumerate(pairwise(borders)):
        stretch = tokenizer.encode(item.text[start:stop], add_special_tokens=item.special and number == 0)
        ids += stretch
        marks += [int(any(a <= start and stop <= b for a, b in item.spans))] * len(stretch)
    return np.array(ids, np.int32), np.array(marks, np.uint8)
