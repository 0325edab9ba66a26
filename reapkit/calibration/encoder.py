"""Turns the rows of a source into tokens: format, chat template, assistant spans, tokenizer; drops unusable samples."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reapkit.calibration import spans
from reapkit.calibration.formats import Format, Sample, recognise, to_sample
from reapkit.calibration.row_readers import MAX_SAMPLE_BYTES, too_long
from reapkit.calibration.sources import Walk
from reapkit.calibration.template_process import TemplateProcess
from reapkit.calibration.token_journal import Encoded
from reapkit.core.errors import UnusableError
from reapkit.recipe.schema import CalibrationSpec, MixEntry, TokensFormat

MIN_CHARACTERS = 8
"""A sample with less content is near-empty: it tells nothing about experts, but would count as a sample."""
MIN_TOKENS = 2
"""A single token predicts nothing."""


class Encoder:
    """Rows to tokens: format, template, assistant spans, tokenizer."""

    def __init__(
        self,
        calibration: CalibrationSpec,
        format: Format,
        tokenizer: Callable[[], Any],
        template: str | None,
        vocabulary: int | None,
    ):
        self.calibration, self.format, self.vocabulary = calibration, format, vocabulary
        self._load, self._template = tokenizer, template
        self._renderer: spans.Renderer | None = None
        self._process = TemplateProcess()
        self._lock = threading.Lock()

    @property
    def renderer(self) -> spans.Renderer:
        """Made when first needed: sources of token ids need no tokenizer at all."""
        if self._renderer is None:
            self._renderer = spans.Renderer(self.calibration, self._load(), self._template, self._process)
        return self._renderer

    def close(self) -> None:
        """Ends what is being rendered, in whichever thread, and renders no more."""
        self._process.close()

    @property
    def shows_calls(self) -> bool:
        """Whether the chat template mentions tool calls at all; sources of token ids use none."""
        return isinstance(self.format, TokensFormat) or self.renderer.shows_calls

    def encode(self, walk: Walk, positions: Sequence[int]) -> list[Encoded]:
        """The walk's rows at `positions` as samples, fewer where a stream ends. May run in several threads.

        Raises UnusableError naming source and row: broken data is an error, empty data is dropped and counted.
        """
        with self._lock:  # templates record their spans in shared state; rendering would not run in parallel anyway
            results, waiting = self._render(walk, positions)
        tokenized = spans.encode([rendered for _, rendered in waiting], self.renderer.tokenizer) if waiting else []
        for (number, rendered), (ids, marks) in zip(waiting, tokenized, strict=True):
            results[number] = self._tokenized(results[number], ids, marks, rendered.way)
        return results

    def _render(self, walk: Walk, positions: Sequence[int]) -> tuple[list[Encoded], list[tuple[int, spans.Rendered]]]:
        """Every row as a finished or dropped sample, or as one that waits for the tokenizer, by its number."""
        results: list[Encoded] = []
        waiting: list[tuple[int, spans.Rendered]] = []
        for position, row in zip(positions, walk.read(positions), strict=False):
            try:
                sample = to_sample(row, self.format)
                item = Encoded(
                    position,
                    walk.rows.place(walk.number(position)),
                    self._unfit(sample),
                    sample.content_hash(),
                    tool_calls=sample.tool_calls,
                )
                if sample.input_ids is not None and not item.dropped:
                    item = self._given(item, sample)
                elif not item.dropped:
                    waiting.append((len(results), self.renderer.render(sample)))
                results.append(item)
            except ValueError as error:
                raise UnusableError(f"{walk.place(position)}: {error}.") from None
        return results, waiting

    def _unfit(self, sample: Sample) -> str | None:
        if sample.size == 0:
            return "empty"
        if (sample.text is not None and len(sample.text) > MAX_SAMPLE_BYTES) or sample.size > MAX_SAMPLE_BYTES:
            raise ValueError(too_long(sample.size).rstrip("."))
        return "near-empty" if sample.input_ids is None and sample.size < MIN_CHARACTERS else None

    def _given(self, item: Encoded, sample: Sample) -> Encoded:
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
        raise UnusableError(
            f"source '{entry.name}': {entry.source} has no rows. Give a source with rows, or remove this one."
        )
    try:
        return recognise(first[0])
    except ValueError as error:
        raise UnusableError(f"source '{entry.name}': {error}.") from None


def packing_of(calibration: CalibrationSpec, format: Format) -> str:
    """Token ids are used as they are, a row per sample; everything else is packed as the recipe says."""
    return "none" if isinstance(format, TokensFormat) else calibration.packing
