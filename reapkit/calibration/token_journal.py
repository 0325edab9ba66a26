"""Stores the accepted samples of a source as tokens on disk, block by block, so that a killed preparation can resume.

input_ids.bin   int32, samples one after another        assistant.bin   uint8, the same
journal.jsonl   one line per finished block: walk positions, lengths and hashes of its samples, what was dropped, and
                the sha256 over all this and the block's bytes in the other two files
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from reapkit.calibration.spans import NOTHING, Notes
from reapkit.core.atomic_files import naming
from reapkit.core.json_text import parse_json
from reapkit.core.locks import locked
from reapkit.core.progress import SILENT, Progress

DUPLICATE, HELD_OUT = "duplicate", "in the calibration"
"""Reasons to drop a sample that only the samples before it, or the calibration, can tell."""

PER_SAMPLE = ("positions", "lengths", "last_assistant", "last_token", "tool_calls", "hashes", "ways", "notes")
FACTS = {"next_position", *PER_SAMPLE, "dropped", "unread"}
"""What a block's line holds, beside its sha256."""
Reader = Callable[[int, int, int], tuple[np.ndarray, np.ndarray]]
"""From (sample, start, stop) to those tokens' ids int32 [stop - start] and marks uint8 [stop - start], off the disk."""


@dataclass(frozen=True)
class Encoded:
    """One tokenized sample, or why there is none: `dropped` is None or the reason. `unread`: columns of its row and
    keys of its turns that nothing reads."""

    position: int
    place: str
    dropped: str | None = None
    content: str = ""
    input_ids: np.ndarray | None = None
    assistant: np.ndarray | None = None
    way: str = ""
    tool_calls: int = 0
    notes: Notes = NOTHING
    unread: frozenset[str] = frozenset()


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
    notes: list[Sequence[int]] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
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
def opened(directory: Path, progress: Progress = SILENT) -> Iterator[Samples]:
    """The samples that earlier, perhaps killed, runs left in `directory`, ready to be appended to; locked for the
    block. Every block is read and compared with its sha256; from a damaged one on they are made again."""
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / "lock"):
        samples = Samples(directory)
        journal, ids, marks = (directory / name for name in ("journal.jsonl", "input_ids.bin", "assistant.bin"))
        for file in (journal, ids, marks):
            file.touch()
        valid = 0
        with ids.open("rb") as id_bytes, marks.open("rb") as mark_bytes:
            for line in journal.read_bytes().splitlines(keepends=True):
                try:
                    block = _journalled(line, id_bytes, mark_bytes)
                except ValueError:
                    place = f"{samples.next_position:,}"
                    progress.say(f"{directory}: stored samples are damaged; those from {place} on are tokenized again")
                    break
                if block is None:
                    break  # torn by a kill, or ahead of its tokens after a power cut; what follows is made again
                _add(samples, block)
                valid += len(line)
        for file, size in ((journal, valid), (ids, 4 * samples.num_tokens), (marks, samples.num_tokens)):
            os.truncate(file, size)
        yield samples


def _journalled(line: bytes, ids: IO[bytes], marks: IO[bytes]) -> dict[str, Any] | None:
    """A finished block's record, its tokens read from the files; None for a torn line, or one whose tokens are not all
    there. Raises ValueError for what was changed since it was written; a block of an earlier reapkit has no sha256.
    """
    if not line.endswith(b"\n"):
        return None
    found = parse_json(line)
    if not isinstance(found, dict) or found.keys() - {"sha256"} != FACTS or not _are_counts(found["lengths"]):
        raise ValueError("no block's record")
    tokens, sha256 = sum(found["lengths"]), found.pop("sha256", None)
    held = ids.read(4 * tokens), marks.read(tokens)
    if (len(held[0]), len(held[1])) != (4 * tokens, tokens):
        return None
    if sha256 is not None and sha256 != _sha256(found, *held):
        raise ValueError("other bytes than were written")
    return found


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(length) is int and 0 <= length < 1 << 40 for length in value)


def _sha256(record: dict[str, Any], ids: bytes, marks: bytes) -> str:
    """Over a block's line and the bytes of its tokens."""
    return hashlib.sha256(_line(record) + ids + marks).hexdigest()


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode()


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
        "notes": [astuple(item.notes) for item in accepted],
        "dropped": dropped,
        "unread": sorted({name for item in block for name in item.unread}),
    }
    ids = b"".join(item.input_ids.astype("<i4").tobytes() for item in accepted)
    marks = b"".join(item.assistant.tobytes() for item in accepted)
    line = _line({**record, "sha256": _sha256(record, ids, marks)}) + b"\n"
    with naming(samples.directory):
        for name, content in (("input_ids.bin", ids), ("assistant.bin", marks), ("journal.jsonl", line)):
            with (samples.directory / name).open("ab") as stream:
                stream.write(content)
    _add(samples, record)


def _last_mark(assistant: np.ndarray) -> int:
    marked = np.flatnonzero(assistant)
    return int(marked[-1]) if len(marked) else -1


def _add(samples: Samples, block: dict[str, Any]) -> None:
    for name in PER_SAMPLE:
        getattr(samples, name).extend(block[name])
    samples.dropped.extend((position, reason, place) for position, reason, place in block["dropped"])
    samples.unread |= set(block["unread"])
    samples.next_position = block["next_position"]
