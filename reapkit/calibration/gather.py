"""Draws a source's samples along its walk, tokenizes them block by block and keeps the good ones until there are enough."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from reapkit.calibration import spans
from reapkit.calibration.encoded import Encoded, Samples, append
from reapkit.calibration.formats import Format, recognise, to_sample
from reapkit.calibration.packing import pieces_of
from reapkit.calibration.sources import MAX_SAMPLE_BYTES, Walk, too_long
from reapkit.errors import UnusableError
from reapkit.progress import Task
from reapkit.recipe.schema import CalibrationSpec, MixEntry, TokensFormat

BLOCK = 256
"""Samples that are tokenized together and journalled together."""
MIN_CHARACTERS = 8
"""A sample with less content is near-empty: it would teach nothing and still count as a sample."""
MIN_TOKENS = 2
"""A single token predicts nothing."""


@dataclass(frozen=True)
class Target:
    """When a source has enough: so many samples, or so many tokens in its rows; and which field of the recipe says so."""

    samples: int | None = None
    tokens: int | None = None
    field: str = "calibration.samples"

    @property
    def unit(self) -> str:
        return "tokens" if self.samples is None else "samples"

    @property
    def amount(self) -> int:
        return self.tokens if self.samples is None else self.samples


class Encoder:
    """Rows to tokens: format, template, assistant spans, tokenizer."""

    def __init__(self, calibration: CalibrationSpec, format: Format, tokenizer: Callable[[], Any], template: str | None,
                 vocabulary: int | None):
        self.calibration, self.format, self.vocabulary = calibration, format, vocabulary
        self._load, self._template = tokenizer, template
        self._renderer: spans.Renderer | None = None
        self._lock = threading.Lock()

    @property
    def renderer(self) -> spans.Renderer:
        """Made when first needed: sources of token ids need no tokenizer at all."""
        if self._renderer is None:
            self._renderer = spans.Renderer(self.calibration, self._load(), self._template)
        return self._renderer

    def encode(self, walk: Walk, positions: Sequence[int]) -> list[Encoded]:
        """The walk's rows at `positions` as samples, fewer where a stream ends. May run in several threads.

        Raises UnusableError naming source and row: broken data is an error, empty data is dropped and counted.
        """
        with self._lock:  # templates record their spans in shared state; rendering would not run in parallel anyway
            results, waiting = self._render(walk, positions)
        tokenized = spans.encode([rendered for _, rendered in waiting], self.renderer.tokenizer) if waiting else []
        for (number, rendered), (ids, marks) in zip(waiting, tokenized):
            results[number] = self._tokenized(results[number], ids, marks, rendered.way)
        return results

    def _render(self, walk: Walk, positions: Sequence[int]) -> tuple[list[Encoded], list[tuple[int, spans.Rendered]]]:
        """Every row as a finished or dropped sample, or as one that waits for the tokenizer, by its number."""
        results: list[Encoded] = []
        waiting: list[tuple[int, spans.Rendered]] = []
        for position, row in zip(positions, walk.read(positions)):
            try:
                sample = to_sample(row, self.format)
                item = Encoded(position, walk.rows.place(walk.number(position)), self._unfit(sample), sample.content_hash(),
                               tool_calls=sample.tool_calls)
                if sample.input_ids is not None and not item.dropped:
                    item = self._given(item, sample)
                elif not item.dropped:
                    waiting.append((len(results), self.renderer.render(sample)))
                results.append(item)
            except ValueError as error:
                raise UnusableError(f"{walk.place(position)}: {error}.") from None
        return results, waiting

    def _unfit(self, sample: Any) -> str | None:
        if sample.size == 0:
            return "empty"
        if sample.text is not None and len(sample.text) > MAX_SAMPLE_BYTES or sample.size > MAX_SAMPLE_BYTES:
            raise ValueError(too_long(sample.size).rstrip("."))
        return "near-empty" if sample.input_ids is None and sample.size < MIN_CHARACTERS else None

    def _given(self, item: Encoded, sample: Any) -> Encoded:
        ids = np.array(sample.input_ids, np.int32)
        if self.vocabulary is not None and len(ids) and int(ids.max()) >= self.vocabulary:
            raise ValueError(f"token id {int(ids.max())}, but the model knows ids below {self.vocabulary}")
        marks = np.ones(len(ids), np.uint8) if sample.assistant is None else np.array(sample.assistant, np.uint8)
        return self._tokenized(item, ids, marks, "whole text" if sample.assistant is None else "as given")

    def _tokenized(self, item: Encoded, ids: np.ndarray, marks: np.ndarray, way: str) -> Encoded:
        dropped = "near-empty" if len(ids) < MIN_TOKENS else None
        return Encoded(item.position, item.place, dropped, item.content, ids, marks, way, item.tool_calls)


def format_of(entry: MixEntry, walk: Walk) -> Format:
    """The recipe's format, or the one the first row's columns show. Raises UnusableError naming the source."""
    if entry.format is not None:
        return entry.format
    first = walk.read([0]) if walk.length != 0 else []
    if not first:
        raise UnusableError(f"source '{entry.name}': {entry.source} holds no rows.")
    try:
        return recognise(first[0])
    except ValueError as error:
        raise UnusableError(f"source '{entry.name}': {error}.") from None


def packing_of(calibration: CalibrationSpec, format: Format) -> str:
    """Token ids are used as they are, a row per sample; everything else is packed as the recipe says."""
    return "none" if isinstance(format, TokensFormat) else calibration.packing


def row_tokens(samples: Samples, number: int, calibration: CalibrationSpec, packing: str, end_token: int | None) -> int:
    """Tokens that a sample brings into rows, after overflow and with its end token."""
    pieces = pieces_of(number, samples.lengths[number], samples.last_assistant[number], samples.last_token[number] == end_token,
                       calibration.max_length, calibration.overflow, packing)
    return sum(map(len, pieces))


def gather(samples: Samples, walk: Walk, encoder: Encoder, target: Target, *, end_token: Callable[[], int | None],
           held_out: Collection[str], task: Task) -> int:
    """Appends to `samples` until the target is met; returns how many of them are used (earlier runs may have left more).

    Raises UnusableError where the source yields too few, with what was dropped and why.
    """
    seen = set(samples.hashes)
    used = reached = 0
    wanted = target.amount
    packing = packing_of(encoder.calibration, encoder.format)
    with closing(_blocks(walk, encoder, samples.next_position)) as blocks:
        next(blocks)
        while True:
            while used < len(samples) and reached < wanted:
                step = 1 if target.samples is not None else row_tokens(samples, used, encoder.calibration, packing, end_token())
                used, reached = used + 1, reached + step
                task.advance(step)
            if reached >= wanted:
                return used
            encoded = blocks.send(wanted - reached if target.samples is not None else None)
            if not encoded:
                raise UnusableError(_too_few(samples, walk, target, reached))
            append(samples, encoded, seen, held_out)


def _blocks(walk: Walk, encoder: Encoder, start: int) -> Generator[list[Encoded], int | None, None]:
    """Encoded blocks from `start` on. Sent the number of samples still missing (None: unknown), it works ahead, but never reads
    further than if all were good; a block that turns out not to be needed is forgotten together with its error.

    Two blocks are in work at a time, so that one is rendered by the interpreter while the other is in the tokenizer.
    """
    waiting: deque[tuple[int, Future]] = deque()
    with ThreadPoolExecutor(1 if walk.order.startswith("stream") else 2) as threads:
        missing = yield []
        while True:
            ahead = sum(size for size, _ in waiting)
            while len(waiting) < 2 and (missing is None or ahead < missing):
                stop = start + (BLOCK if missing is None else min(BLOCK, missing - ahead))
                block = range(start, stop if walk.length is None else min(stop, walk.length))
                if not block and waiting:
                    break
                waiting.append((len(block), threads.submit(encoder.encode, walk, block)))
                start, ahead = block.stop, ahead + len(block)
                if not block:
                    break
            missing = yield waiting.popleft()[1].result()


def _too_few(samples: Samples, walk: Walk, target: Target, reached: int) -> str:
    reasons = dropped_summary(samples.dropped)
    dropped = "; ".join(f"{entry['count']} {reason} (first: {entry['first']})" for reason, entry in reasons.items())
    return (f"source '{walk.name}' yields {reached} of {target.amount} {target.unit}: {samples.next_position} rows were read"
            + (f", dropped: {dropped}" if dropped else "")
            + f". Give it more data, a smaller weight, or lower {target.field}.")


def dropped_summary(dropped: Sequence[tuple[int, str, str]]) -> dict[str, dict[str, Any]]:
    """Reason to count and first place, in order of first appearance."""
    counts = Counter(reason for _, reason, _ in dropped)
    first: dict[str, str] = {}
    for _, reason, place in dropped:
        first.setdefault(reason, place)
    return {reason: {"count": counts[reason], "first": first[reason]} for reason in first}
