"""Plans how samples are packed into rows: what is kept of a long sample, and which samples share a row. Works on
lengths only; tokens are not touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

PARTS = ("decide", "confirm")
"""Of a pack, as `row_part` counts them: rows that decide between candidates, rows that give the final numbers."""
GROUP_TOKENS = 1 << 16
"""Largest row group: what is lost at most when an observation is killed."""
MIN_GROUPS = 16
"""Groups at least, where there are rows enough: convergence is read at 1/16, 1/8, 1/4 and 1/2 of the rows."""


@dataclass(frozen=True)
class Piece:
    """Tokens `start` to `stop` of a sample; `end_token` adds the tokenizer's end token behind them."""

    sample: int
    start: int
    stop: int
    end_token: bool = False

    def __len__(self) -> int:
        return self.stop - self.start + self.end_token


def largest_remainder(total: int, weights: Sequence) -> list[int]:
    """`total` split by weight into integers that add up to it: floors, then one each by largest remainder, ties to the
    first.

    Weights are exact numbers (Decimal, Fraction, int), so that equal recipes split equally everywhere.
    """
    exact = [Fraction(weight) for weight in weights]
    shares = [total * weight / sum(exact) for weight in exact]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: (counts[index] - shares[index], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def cut(length: int, last_assistant: int, max_length: int, overflow: str) -> list[tuple[int, int]]:
    """What is kept of a sample of `length` tokens, as stretches of at most `max_length` tokens.

    truncate: the beginning. split: everything, in consecutive stretches. window: the `max_length` tokens that end with
    the last assistant token (`last_assistant`, -1: none, then the sample's end).
    """
    if length <= max_length:
        return [(0, length)]
    if overflow == "truncate":
        return [(0, max_length)]
    if overflow == "split":
        return [(start, min(start + max_length, length)) for start in range(0, length, max_length)]
    stop = max(last_assistant + 1, max_length) if last_assistant >= 0 else length
    return [(stop - max_length, stop)]


def pieces_of(
    sample: int, length: int, last_assistant: int, ended: bool, max_length: int, overflow: str, packing: str
) -> list[Piece]:
    """A sample's pieces in order; `concat` puts an end token behind the last, unless the sample has its own there
    (`ended`)."""
    kept = cut(length, last_assistant, max_length, overflow)
    last = len(kept) - 1
    return [
        Piece(sample, start, stop, packing == "concat" and number == last and not (ended and stop == length))
        for number, (start, stop) in enumerate(kept)
    ]


def limit(pieces: Sequence[Piece], tokens: int) -> list[Piece]:
    """The pieces up to `tokens` tokens altogether, the last one cut."""
    kept = []
    for piece in pieces:
        if tokens <= 0:
            break
        if len(piece) > tokens:
            piece = Piece(piece.sample, piece.start, min(piece.stop, piece.start + tokens))
        kept.append(piece)
        tokens -= len(piece)
    return kept


def pack(pieces: Sequence[Piece], max_length: int, packing: str) -> list[list[Piece]]:
    """Pieces as rows of at most `max_length` tokens, in order.

    none: a row each. isolated: a piece that no longer fits opens the next row. concat: one long stream, cut every
    `max_length` tokens.
    """
    if packing == "none":
        return [[piece] for piece in pieces]
    rows: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if packing == "isolated":
            if len(piece) > room:
                rows.append([])
                room = max_length
            rows[-1].append(piece)
            room -= len(piece)
            continue
        while len(piece):
            if not room:
                rows.append([])
                room = max_length
            fits = _head(piece, room)
            rows[-1].append(fits)
            room -= len(fits)
            piece = Piece(piece.sample, fits.stop, piece.stop, piece.end_token and not fits.end_token)
    return rows


def _head(piece: Piece, room: int) -> Piece:
    if len(piece) <= room:
        return piece
    return Piece(piece.sample, piece.start, min(piece.stop, piece.start + room))


def interleave(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(stream, row) in an order in which every prefix holds each stream's share of the rows, to within a row or two.

    Row j of n stands at (j + 1/2) / n, so that up to any place a stream is off by at most half a row; ties go to the
    earlier.
    """
    stream = np.repeat(np.arange(len(counts)), counts)
    row = np.concatenate([np.arange(count) for count in counts]) if counts else np.empty(0, np.int64)
    place = (2 * row + 1) / np.repeat(2 * np.asarray(counts), counts)
    order = np.lexsort((row, stream, place))
    return list(zip(stream[order].tolist(), row[order].tolist(), strict=True))


def group_bounds(row_lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Row group borders, and how many groups are finished after 1/16, 1/8, 1/4 and 1/2 of the rows.

    Rows are cut into sixteen equal stretches (or single rows, where there are fewer), those into groups of at most
    `GROUP_TOKENS` tokens.
    """
    rows = len(row_lengths)
    stretches = {rows * part // MIN_GROUPS for part in range(MIN_GROUPS + 1)}
    bounds, tokens = [0], 0
    for row, length in enumerate(row_lengths):
        if row > bounds[-1] and (row in stretches or tokens + length > GROUP_TOKENS):
            bounds.append(row)
            tokens = 0
        tokens += int(length)
    if rows:
        bounds.append(rows)
    snapshots = [bounds.index(rows * part // MIN_GROUPS) for part in (1, 2, 4, 8)]
    return bounds, snapshots
