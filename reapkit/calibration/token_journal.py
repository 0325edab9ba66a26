"""Stores the accepted samples of a source as tokens on disk, block by block, so that a killed preparation can resume.

input_ids.bin   int32, samples one after another        assistant.bin   uint8, the same
journal.jsonl   one line per finished block: walk positions, lengths and hashes of its samples, and what was dropped
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reapkit.core.atomic_files import naming
from reapkit.core.locks import locked

DUPLICATE, HELD_OUT = "duplicate", "in the calibration"
"""Reasons to drop a sample that only the samples before it, or the calibration, can tell."""

Reader = Callable[[int, int, int], tuple[np.ndarray, np.ndarray]]
"""From (sample, start, stop) to those tokens' ids int32 [stop - start] and marks uint8 [stop - start], off the disk."""


@dataclass(frozen=True)
class Encoded:
    """One tokenized sample, or why there is none: `dropped` is None or the reason."""

    position: int
    place: str
    dropped: str | None = None
    content: str = ""
    input_ids: np.ndarray | None = None
    assistant: np.ndarray | None = None
    way: str = ""
    tool_calls: int = 0


@dataclass
class Samples:
    """Accepted samples in walk order; tokens stay on disk until asked for."""

    directory: Path
    positions: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    last_assistant: list[int] = field(default_factory=list)
    last_token: list[int] = field(default_factory=list)
    tool_calls: list[int] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    dropped: list[tuple[int, str, str]] = field(default_factory=list)
    ways: list[str] = field(default_factory=list)
    next_position: int = 0

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """For the block, reads the samples that are there when it begins."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        with (
            (self.directory / "input_ids.bin").open("rb") as ids,
            (self.directory / "assistant.bin").open("rb") as marks,
        ):

            def read(sample: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
                place, size = int(offsets[sample]) + start, stop - start
                return (
                    np.frombuffer(os.pread(ids.fileno(), 4 * size, 4 * place), "<i4"),
                    np.frombuffer(os.pread(marks.fileno(), size, place), np.uint8),
                )

            yield read


@contextmanager
def opened(directory: Path) -> Iterator[Samples]:
    """The samples that earlier, perhaps killed, runs left in `directory`, ready to be appended to; locked for the
    block."""
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / "lock"):
        samples = Samples(directory)
        journal, ids, marks = (directory / name for name in ("journal.jsonl", "input_ids.bin", "assistant.bin"))
        for file in (journal, ids, marks):
            file.touch()
        on_disk = min(ids.stat().st_size // 4, marks.stat().st_size)
        valid = tokens = 0
        for line in journal.read_bytes().splitlines(keepends=True):
            block = _journalled(line)
            tokens += sum(block["lengths"]) if block else 0
            if block is None or tokens > on_disk:
                break  # torn by a kill, or ahead of its tokens after a power cut; what follows is made again
            _add(samples, block)
            valid += len(line)
        for file, size in ((journal, valid), (ids, 4 * samples.num_tokens), (marks, samples.num_tokens)):
            os.truncate(file, size)
        yield samples


def _journalled(line: bytes) -> dict[str, Any] | None:
    """A finished block's record, None for a torn line."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def append(samples: Samples, block: list[Encoded], seen: set[str], held_out: Collection[str]) -> None:
    """Adds a block's samples, without duplicates; tokens first, the journal's line last, which makes them count."""
    accepted, dropped = [], []
    for item in block:
        reason = item.dropped or (DUPLICATE if item.content in seen else HELD_OUT if item.content in held_out else None)
        if reason:
            dropped.append((item.position, reason, item.place))
            continue
        seen.add(item.content)
        accepted.append(item)
    record = {
        "next_position": block[-1].position + 1,
        "positions": [item.position for item in accepted],
        "lengths": [len(item.input_ids) for item in accepted],
        "last_assistant": [_last_mark(item.assistant) for item in accepted],
        "last_token": [int(item.input_ids[-1]) for item in accepted],
        "tool_calls": [item.tool_calls for item in accepted],
        "hashes": [item.content for item in accepted],
        "ways": [item.way for item in accepted],
        "dropped": dropped,
    }
    with naming(samples.directory):
        with (samples.directory / "input_ids.bin").open("ab") as stream:
            stream.writelines(item.input_ids.astype("<i4").tobytes() for item in accepted)
        with (samples.directory / "assistant.bin").open("ab") as stream:
            stream.writelines(item.assistant.tobytes() for item in accepted)
        with (samples.directory / "journal.jsonl").open("a") as stream:
            stream.write(json.dumps(record, separators=(",", ":")) + "\n")
    _add(samples, record)


def _last_mark(assistant: np.ndarray) -> int:
    marked = np.flatnonzero(assistant)
    return int(marked[-1]) if len(marked) else -1


def _add(samples: Samples, block: dict[str, Any]) -> None:
    for name in ("positions", "lengths", "last_assistant", "last_token", "tool_calls", "hashes", "ways"):
        getattr(samples, name).extend(block[name])
    samples.dropped.extend((position, reason, place) for position, reason, place in block["dropped"])
    samples.next_position = block["next_position"]
