"""Which samples may be held out: none whose rows would show what a row of the calibration, or another held-out sample,
shows."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from reapkit.calibration.packing import cut
from reapkit.calibration.tokens import CalibrationTokens

IN_CALIBRATION = "equal in tokens to one of the calibration"
HELD_OUT_TWICE = "equal in tokens to another held-out one"
"""Reasons to drop a sample that only its tokens tell, after rendering and truncation."""


@dataclass
class HeldOut:
    """What held-out samples must differ from: contents of the calibration, its rows' tokens, and each other.

    `lengths`: all row lengths of the packs. They are judged together, so that every length holds the same samples in
    the same parts. `calibrated`: digests of what the calibration shows, cut to `shared` lengths, which are the packs'
    where the calibration's rows are not shorter. `end_token`: what the calibration's packing wrote behind samples.
    """

    contents: Collection[str]
    lengths: tuple[int, ...]
    shared: tuple[int, ...]
    overflow: str
    end_token: int | None
    calibrated: set[bytes]
    taken: set[bytes] = field(default_factory=set)

    def refusal(self, input_ids: np.ndarray, last_assistant: int) -> str | None:
        """Why a sample of tokens `input_ids` int32 [n] may not be held out; None where it may, and then it is taken.

        `last_assistant`: place of its last assistant token, -1 where it has none.
        """
        ids = _without_end(input_ids, self.end_token)
        if not self.calibrated.isdisjoint(_shown(ids, last_assistant, self.shared, self.overflow)):
            return IN_CALIBRATION
        shown = set(_shown(ids, last_assistant, self.lengths, self.overflow))
        if not self.taken.isdisjoint(shown):
            return HELD_OUT_TWICE
        self.taken |= shown
        return None


def held_out_from(tokens: CalibrationTokens, lengths: Iterable[int], end_token: int | None) -> HeldOut:
    """What packs of rows of `lengths` tokens must differ from, read off a finished calibration.

    `end_token`: the id that `concat` put between its samples, None where nothing was put.
    """
    summary, lengths = tokens.summary, tuple(sorted(set(lengths)))
    shared = tuple(sorted({min(length, summary["max_length"]) for length in lengths}))
    calibrated: set[bytes] = set()
    for ids, assistant in tokens.samples():
        marked = np.flatnonzero(assistant)
        last_assistant = int(marked[-1]) if len(marked) else -1
        calibrated.update(_shown(_without_end(ids, end_token), last_assistant, shared, summary["overflow"]))
    contents = frozenset(content for source in summary["sources"] for content in source["hashes"])
    return HeldOut(contents, lengths, shared, summary["overflow"], end_token, calibrated)


def _shown(ids: np.ndarray, last_assistant: int, lengths: Iterable[int], overflow: str) -> Iterator[bytes]:
    """Digests of what rows of each length show of a sample; not of a split sample's short rest: many end alike."""
    for length in lengths:
        for start, stop in cut(len(ids), last_assistant, length, overflow):
            if start == 0 or stop - start == length:
                yield hashlib.blake2b(ids[start:stop].astype("<i4").tobytes(), digest_size=16).digest()


def _without_end(ids: np.ndarray, end_token: int | None) -> np.ndarray:
    return ids[:-1] if len(ids) and end_token is not None and ids[-1] == end_token else ids
