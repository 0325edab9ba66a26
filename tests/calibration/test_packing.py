"""Splitting, cutting, packing, interleaving and grouping, each against lengths written down by hand."""

from __future__ import annotations

from decimal import Decimal
from itertools import accumulate, pairwise

import pytest

from reapkit.calibration.packing import (
    GROUP_TOKENS,
    Piece,
    cut,
    group_bounds,
    interleave,
    largest_remainder,
    limit,
    pack,
    pieces_of,
)


@pytest.mark.parametrize(
    ("total", "weights", "counts"),
    [
        (1360, ["0.51", "0.24", "0.24"], [700, 330, 330]),  # the shares of a published card, which do not add up to one
        (10, ["1", "1", "1"], [4, 3, 3]),
        (2, ["0.5", "0.3", "0.2"], [1, 1, 0]),
        (7, ["3"], [7]),
        (100, ["0.1", "0.2", "0.7"], [10, 20, 70]),
    ],
)
def test_largest_remainder(total: int, weights: list[str], counts: list[int]) -> None:
    assert largest_remainder(total, [Decimal(weight) for weight in weights]) == counts


@pytest.mark.parametrize(
    ("overflow", "last_assistant", "kept"),
    [
        ("truncate", 9, [(0, 4)]),
        ("split", 9, [(0, 4), (4, 8), (8, 10)]),
        ("window", 9, [(6, 10)]),
        ("window", 6, [(3, 7)]),  # ends with the last assistant token; what follows predicts nothing that is scored
        ("window", 1, [(0, 4)]),  # an early answer: as many tokens as fit all the same
        ("window", -1, [(6, 10)]),
    ],
)
def test_cut_of_ten_tokens_to_four(overflow: str, last_assistant: int, kept: list[tuple[int, int]]) -> None:
    assert cut(10, last_assistant, 4, overflow) == kept
    assert cut(4, last_assistant, 4, overflow) == [(0, 4)]


def test_concat_ends_every_sample_once() -> None:
    assert pieces_of(0, 5, -1, False, 9, "truncate", "concat") == [Piece(0, 0, 5, True)]
    assert pieces_of(0, 5, -1, True, 9, "truncate", "concat") == [Piece(0, 0, 5)]
    assert pieces_of(0, 12, -1, True, 9, "truncate", "concat") == [
        Piece(0, 0, 9, True)
    ]  # its own end token was cut off
    assert pieces_of(0, 12, -1, False, 9, "split", "concat") == [Piece(0, 0, 9), Piece(0, 9, 12, True)]
    assert pieces_of(0, 5, -1, False, 9, "truncate", "isolated") == [Piece(0, 0, 5)]


def rows_of(rows: list[list[Piece]]) -> list[list[tuple]]:
    return [[(piece.sample, piece.start, piece.stop, piece.end_token) for piece in row] for row in rows]


def test_concat_is_one_stream_cut_at_every_length() -> None:
    rows = pack([Piece(0, 0, 5, True), Piece(1, 0, 3, True), Piece(2, 0, 9, True)], 8, "concat")
    assert rows_of(rows) == [
        [(0, 0, 5, True), (1, 0, 2, False)],
        [(1, 2, 3, True), (2, 0, 6, False)],
        [(2, 6, 9, True)],
    ]


def test_concat_end_token_alone_in_the_next_row() -> None:
    assert rows_of(pack([Piece(0, 0, 4, True), Piece(1, 0, 2, True)], 4, "concat")) == [
        [(0, 0, 4, False)],
        [(0, 4, 4, True), (1, 0, 2, True)],
    ]


def test_isolated_never_cuts_a_sample() -> None:
    rows = pack([Piece(0, 0, 5), Piece(1, 0, 3), Piece(2, 0, 4), Piece(3, 0, 5)], 8, "isolated")
    assert rows_of(rows) == [[(0, 0, 5, False), (1, 0, 3, False)], [(2, 0, 4, False)], [(3, 0, 5, False)]]


def test_none_is_a_row_each() -> None:
    assert rows_of(pack([Piece(0, 0, 5), Piece(1, 0, 3)], 8, "none")) == [[(0, 0, 5, False)], [(1, 0, 3, False)]]


@pytest.mark.parametrize("tokens", range(1, 13))
def test_limit_is_exact(tokens: int) -> None:
    pieces = [Piece(0, 0, 5, True), Piece(1, 0, 5, True)]
    assert sum(map(len, limit(pieces, tokens))) == tokens


def test_limit_takes_the_end_token_away_first() -> None:
    assert limit([Piece(0, 0, 5, True)], 5) == [Piece(0, 0, 5)]


def test_interleaved_prefixes_have_the_shares() -> None:
    assert interleave([4, 2]) == [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3)]
    counts = [70, 33, 33, 1]
    order = interleave(counts)
    assert sorted(order) == [(stream, row) for stream, count in enumerate(counts) for row in range(count)]
    for prefix in range(1, len(order) + 1):
        for stream, count in enumerate(counts):
            got = sum(1 for owner, _ in order[:prefix] if owner == stream)
            assert abs(got - prefix * count / len(order)) <= 1.5, (prefix, stream)


def test_rows_of_a_stream_stay_in_order() -> None:
    order = interleave([9, 4])
    for stream in (0, 1):
        rows = [row for owner, row in order if owner == stream]
        assert rows == sorted(rows)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 54, 1000])
def test_groups_cover_all_rows_and_snapshots_stand_at_their_shares(rows: int) -> None:
    lengths = [1000 + row % 7 for row in range(rows)]
    bounds, snapshots = group_bounds(lengths)
    assert (bounds[0], bounds[-1]) == (0, rows)
    assert all(a < b for a, b in pairwise(bounds))
    assert [bounds[groups] for groups in snapshots] == [rows // 16, rows // 8, rows // 4, rows // 2]
    assert len(bounds) - 1 >= min(rows, 16)
    ends = [0, *accumulate(lengths)]
    assert all(ends[b] - ends[a] <= GROUP_TOKENS for a, b in pairwise(bounds))


def test_a_row_longer_than_a_group_is_a_group() -> None:
    assert group_bounds([10, GROUP_TOKENS + 1, 10])[0] == [0, 1, 2, 3]
