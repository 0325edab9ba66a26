"""Turns the rows of a source into tokens: format, chat template, assistant spans, tokenizer; drops unusable samples."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from reapkit.calibration import spans
from reapkit.calibration.formats import Format, Sample, columns_read, recognise, to_sample
from reapkit.calibration.packing import cut
from reapkit.calibration.renderer import Renderer, SourceRefused
from reapkit.calibration.row_readers import MAX_SAMPLE_BYTES, too_long
from reapkit.calibration.sources import Walk
from reapkit.calibration.template_fit import TurnsHidden
from reapkit.calibration.template_process import TemplateProcess, TemplateStopped
from reapkit.calibration.token_journal import Encoded
from reapkit.calibration.turns import unread_keys
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
        max_tokens: int | None = None,
    ):
        self.calibration, self.format, self.vocabulary = calibration, format, vocabulary
        self.max_tokens = max_tokens
        self._load, self._template = tokenizer, template
        self._renderer: Renderer | None = None
        self._process = TemplateProcess()
        self._lock = threading.Lock()

    @property
    def renderer(self) -> Renderer:
        """Made when first needed: sources of token ids need no tokenizer at all."""
        if self._renderer is None:
            self._renderer = Renderer(self.calibration, self._load(), self._template, self._process)
        return self._renderer

    def close(self) -> None:
        """Ends what is being rendered, in whichever thread, and renders no more."""
        self._process.close()

    def encode(self, walk: Walk, positions: Sequence[int]) -> list[Encoded]:
        """The walk's rows at `positions` as samples, fewer where a stream ends. May run in several threads.

        Rows that are empty or cannot be rendered come back dropped, with the reason. Raises UnusableError naming source
        and row for what is wrong with the recipe, the template or the model, whatever the row.
        """
        with self._lock:  # templates record their spans in shared state; rendering would not run in parallel anyway
            results, waiting = self._render(walk, positions)
        tokenized = spans.encode([rendered for _, rendered in waiting], self.renderer.tokenizer) if waiting else []
        for (number, rendered), (ids, marks) in zip(waiting, tokenized, strict=True):
            results[number] = self._tokenized(results[number], ids, marks, rendered.way, rendered.notes)
        return results

    def _render(self, walk: Walk, positions: Sequence[int]) -> tuple[list[Encoded], list[tuple[int, spans.Rendered]]]:
        """Every row as a finished or dropped sample, or as one that waits for the tokenizer, by its number."""
        results: list[Encoded] = []
        waiting: list[tuple[int, spans.Rendered]] = []
        for position, row in zip(positions, walk.read_each(positions), strict=False):
            place = walk.rows.place(walk.number(position))
            try:
                if isinstance(row, ValueError):
                    raise row
                item, rendered = self._sample(position, place, row)
                if rendered is not None:
                    waiting.append((len(results), rendered))
            except (SourceRefused, TurnsHidden, TemplateStopped) as error:
                raise UnusableError(f"{walk.place(position)}: {error}.") from None
            except (ValueError, RecursionError) as error:
                item = Encoded(position, place, unusable(str(error).removeprefix(f"{place}: ")))
            results.append(item)
        return results, waiting

    def _sample(self, position: int, place: str, row: Mapping[str, Any]) -> tuple[Encoded, spans.Rendered | None]:
        """The row's sample, and its text where it waits for the tokenizer."""
        sample = to_sample(row, self.format)
        item = Encoded(
            position,
            place,
            self._unfit(sample),
            sample.content_hash(),
            tool_calls=sample.tool_calls,
            unread=self._unread(row, sample),
        )
        if item.dropped:
            return item, None
        if sample.input_ids is not None:
            return self._given(item, sample), None
        return item, self.renderer.render(sample)

    def _unread(self, row: Mapping[str, Any], sample: Sample) -> frozenset[str]:
        """What of a row nothing reads: columns, and keys of turns that the template does not name either."""
        columns = {column for column, value in row.items() if value is not None} - columns_read(self.format, row)
        keys = unread_keys(sample.messages or [])
        return frozenset(columns | {f"turns' {key}" for key in keys if not self.renderer.reads(key)})

    def _unfit(self, sample: Sample) -> str | None:
        if sample.size == 0:
            return "empty"
        if (sample.text is not None and len(sample.text) > MAX_SAMPLE_BYTES) or sample.size > MAX_SAMPLE_BYTES:
            raise ValueError(too_long(sample.size).rstrip("."))
        return "near-empty" if sample.input_ids is None and sample.size < MIN_CHARACTERS else None

    def _given(self, item: Encoded, sample: Sample) -> Encoded:
        ids = np.array(sample.input_ids, np.int32)
        marks = np.ones(len(ids), np.uint8) if sample.assistant is None else np.array(sample.assistant, np.uint8)
        return self._tokenized(item, ids, marks, "whole text" if sample.assistant is None else "as given")

    def _tokenized(
        self, item: Encoded, ids: np.ndarray, marks: np.ndarray, way: str, notes: spans.Notes = spans.NOTHING
    ) -> Encoded:
        dropped = "near-empty" if len(ids) < MIN_TOKENS else None
        if self.vocabulary is not None and len(ids) and int(ids.max()) >= self.vocabulary:
            dropped = unusable(f"token id {int(ids.max())}, but the model knows ids below {self.vocabulary}")
        ids, marks, left_out = self._shortened(ids, marks)
        notes = replace(notes, shortened=left_out)
        return replace(item, dropped=dropped, input_ids=ids, assistant=marks, way=way, notes=notes)

    def _shortened(self, ids: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """At most the source's `max_tokens` of a sample, and how many were left out."""
        if self.max_tokens is None or len(ids) <= self.max_tokens:
            return ids, marks, 0
        marked = np.flatnonzero(marks)
        last = int(marked[-1]) if len(marked) else -1
        [(start, stop), *_] = cut(len(ids), last, self.max_tokens, self.calibration.overflow)
        return ids[start:stop], marks[start:stop], len(ids) - self.max_tokens


UNUSABLE = "unusable: "
"""What the reason of a row that cannot be read or rendered begins with."""


LONGEST_REASON = 300
FIRST_ROWS = 16
"""Rows of which one must be readable for the format to be seen."""


def unusable(message: str) -> str:
    """The reason to drop a row of which `message` says what is wrong."""
    return UNUSABLE + message.rstrip(".")[:LONGEST_REASON]


def format_of(entry: MixEntry, walk: Walk) -> Format:
    """The recipe's format, or the one the first row's columns show. Raises UnusableError naming the source."""
    if entry.format is not None:
        return entry.format
    found = walk.read_each(range(FIRST_ROWS if walk.length is None else min(FIRST_ROWS, walk.length)))
    first = [row for row in found if not isinstance(row, ValueError)]
    if found and not first:
        raise UnusableError(f"source '{entry.name}', {found[0]}")
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
