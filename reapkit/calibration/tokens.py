"""Reads and writes calibration tokens on disk: rows of different lengths, read one at a time.

    tokens.safetensors   input_ids int32 [tokens], assistant uint8 [tokens], row_offsets int64 [rows + 1],
                         row_source int16 [rows], sample_offsets int64 [parts + 1], part_sample int32 [parts] (the
                         number of the sample within its source), row_part uint8 [rows] (packs only)
    calibration.json     what it was made of and what came out

A *part* is what one row holds of one sample; `sample_offsets` says where each begins and has a boundary at every row
start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reapkit.calibration.packing import PARTS
from reapkit.core.errors import UnusableError
from reapkit.core.json_text import parse_json
from reapkit.core.mapped_safetensors import map_tensors

TOKENS_FILE = "tokens.safetensors"
SUMMARY_FILE = "calibration.json"


@dataclass(frozen=True)
class Row:
    """One row: `input_ids` int64 [n], `scored` and `signal` bool [n], `sample` int32 [n] (0, 1, ... within the row)."""

    input_ids: torch.Tensor
    scored: torch.Tensor
    signal: torch.Tensor
    sample: torch.Tensor
    assistant: torch.Tensor


class CalibrationTokens:
    """A prepared calibration (or a held-out pack); index tensors are in memory, token data stays on disk.

    With `score: all` every position is scored; with `completion` every position whose next token lies in an assistant
    span of the same sample. A position has a signal when it is scored and its sample goes on within the row.
    """

    def __init__(self, directory: Path, summary: Mapping[str, Any]):
        self.directory = Path(directory)
        self.summary = summary
        self.sources: tuple[str, ...] = tuple(source["name"] for source in summary["sources"])
        self.score: str = summary["score"]
        self.packing: str = summary["packing"]
        bounds = summary["groups"]
        self.groups: tuple[range, ...] = tuple(range(a, b) for a, b in pairwise(bounds))
        self.snapshots: tuple[int, ...] = tuple(summary["snapshots"])
        """Groups finished after 1/16, 1/8, 1/4 and 1/2 of the rows."""
        file = map_tensors(self.directory / TOKENS_FILE)
        self._input_ids, self._assistant = file["input_ids"], file["assistant"]
        self.row_offsets = np.array(file["row_offsets"])
        self.row_source = np.array(file["row_source"])
        self.sample_offsets = np.array(file["sample_offsets"])
        self.part_sample = np.array(file["part_sample"])
        self.row_part = np.array(file["row_part"]) if "row_part" in file else None

    @classmethod
    def load(cls, directory: str | Path) -> CalibrationTokens:
        """The calibration below `directory`. Raises UnusableError where there is none."""
        directory = Path(directory)
        try:
            summary = parse_json((directory / SUMMARY_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UnusableError(
                f"{directory}: {SUMMARY_FILE} is missing, so this is not a finished calibration. Run the recipe again."
            ) from None
        except ValueError as error:
            raise UnusableError(f"{directory / SUMMARY_FILE}: cannot be read ({error}). Calibrate again.") from None
        return cls(directory, summary)

    @property
    def num_rows(self) -> int:
        return len(self.row_source)

    @property
    def num_tokens(self) -> int:
        return int(self.row_offsets[-1])

    @property
    def row_lengths(self) -> np.ndarray:
        """Tokens per row, int64 [rows]."""
        return np.diff(self.row_offsets)

    def rows(self, part: str) -> list[int]:
        """The rows of a pack's part, "decide" or "confirm", in order."""
        if self.row_part is None:
            raise ValueError(f"{self.directory}: this is a calibration, not a pack; its rows are not split into parts")
        return np.flatnonzero(self.row_part == PARTS.index(part)).tolist()

    def samples(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What the rows hold of every sample, its parts joined: ids int32 [n] and assistant marks uint8 [n]."""
        source = self.row_source[np.searchsorted(self.row_offsets, self.sample_offsets[:-1], side="right") - 1]
        order = np.lexsort((self.part_sample, source))  # stable: parts of a sample stay in the order of their rows
        starts, stops = self.sample_offsets[:-1], self.sample_offsets[1:]
        for _, parts in groupby(order.tolist(), key=lambda part: (source[part], self.part_sample[part])):
            held = [slice(int(starts[part]), int(stops[part])) for part in parts]
            yield (
                np.concatenate([self._input_ids[part] for part in held]),
                np.concatenate([self._assistant[part] for part in held]),
            )

    def row(self, index: int) -> Row:
        """Row `index` read from disk."""
        start, stop = int(self.row_offsets[index]), int(self.row_offsets[index + 1])
        first = int(np.searchsorted(self.sample_offsets, start))
        last = int(np.searchsorted(self.sample_offsets, stop))
        sample = np.repeat(np.arange(last - first, dtype=np.int32), np.diff(self.sample_offsets[first : last + 1]))
        assistant = self._assistant[start:stop] != 0
        goes_on = np.zeros(stop - start, dtype=bool)
        goes_on[:-1] = sample[1:] == sample[:-1]
        scored = np.ones(stop - start, dtype=bool)
        if self.score == "completion":
            scored[:-1] = goes_on[:-1] & assistant[1:]
            scored[-1:] = False
        return Row(
            input_ids=torch.from_numpy(self._input_ids[start:stop].astype(np.int64)),
            scored=torch.from_numpy(scored),
            signal=torch.from_numpy(scored & goes_on),
            sample=torch.from_numpy(sample),
            assistant=torch.from_numpy(assistant),
        )


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right: `input_ids` int64 [b, t]; `valid`, `scored`, `signal` bool [b, t].

    `lengths`, `source` int64 [b]; `rows`: their numbers. `position_ids` int64 [b, t] restarts at every sample with
    `packing: isolated` and is None otherwise.
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    valid: torch.Tensor
    scored: torch.Tensor
    signal: torch.Tensor
    source: torch.Tensor
    position_ids: torch.Tensor | None
    rows: tuple[int, ...]


def batches(tokens: CalibrationTokens, rows: Iterable[int], batch_tokens: int) -> Iterator[Batch]:
    """The rows in order, as many at a time as keep b * t at or below `batch_tokens` (a longer row comes alone)."""
    chosen: list[int] = []
    longest = 0
    lengths = tokens.row_lengths
    for row in rows:
        length = int(lengths[row])
        if chosen and (len(chosen) + 1) * max(longest, length) > batch_tokens:
            yield _collate(tokens, chosen)
            chosen, longest = [], 0
        chosen.append(row)
        longest = max(longest, length)
    if chosen:
        yield _collate(tokens, chosen)


def _collate(tokens: CalibrationTokens, rows: list[int]) -> Batch:
    read = [tokens.row(row) for row in rows]
    lengths = torch.tensor([len(row.input_ids) for row in read])
    width = int(lengths.max())

    def padded(name: str) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([getattr(row, name) for row in read], batch_first=True)

    return Batch(
        input_ids=padded("input_ids"),
        lengths=lengths,
        valid=torch.arange(width)[None, :] < lengths[:, None],
        scored=padded("scored"),
        signal=padded("signal"),
        source=torch.tensor([int(tokens.row_source[row]) for row in rows]),
        position_ids=_restarting_positions(read) if tokens.packing == "isolated" else None,
        rows=tuple(rows),
    )


def _restarting_positions(rows: list[Row]) -> torch.Tensor:
    """0, 1, 2, ... from each sample's first token; int64 [b, t], padding 0."""
    positions = []
    for row in rows:
        index = torch.arange(len(row.sample))
        starts = torch.zeros_like(index)
        starts[1:] = torch.where(row.sample[1:] != row.sample[:-1], index[1:], 0)
        positions.append(index - torch.cummax(starts, 0).values if len(index) else index)
    return torch.nn.utils.rnn.pad_sequence(positions, batch_first=True)
