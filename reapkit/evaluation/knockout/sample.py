"""Draws whole rows of the calibration for the knock-outs, equal parts of every source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reapkit.calibration.tokens import Batch, CalibrationTokens, batches
from reapkit.observation.reroute_sample import equal_shares

SEED = 0


def sampled_rows(tokens: CalibrationTokens, count: int) -> tuple[int, ...]:
    """Rows, ascending, that hold `count` scored positions or a little more: of each source as many as make equal
    shares, or as there are. Whole rows, so that what an expert's absence does to later positions is seen.

    Seeded, and a function of the calibration alone: neither batch, placement nor ranks matter.
    """
    scored = [int(tokens.row(row).scored.sum()) for row in range(tokens.num_rows)]
    by_source = [
        [row for row in range(tokens.num_rows) if int(tokens.row_source[row]) == source and scored[row]]
        for source in range(len(tokens.sources))
    ]
    totals = [sum(scored[row] for row in rows) for rows in by_source]
    draw, chosen = np.random.default_rng(SEED), []
    for rows, share in zip(by_source, equal_shares(totals, count), strict=True):
        taken = 0
        for place in draw.permutation(len(rows)).tolist():
            if taken >= share:
                break
            chosen.append(rows[place])
            taken += scored[rows[place]]
    return tuple(sorted(chosen))


@dataclass(frozen=True, eq=False)
class KnockoutSample:
    """The sampled rows and the batches they are measured in: rows of similar length together, cut by `batch_tokens`."""

    tokens: CalibrationTokens
    rows: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tokens: CalibrationTokens, count: int, batch_tokens: int) -> KnockoutSample:
        rows = sampled_rows(tokens, count)
        by_length = sorted(rows, key=lambda row: (-int(tokens.row_lengths[row]), row))
        return cls(tokens, rows, tuple(batch.rows for batch in batches(tokens, by_length, batch_tokens)))

    def batch(self, group: int) -> Batch:
        """The rows of a group, padded to the longest."""
        rows = self.groups[group]
        return next(iter(batches(self.tokens, rows, len(rows) * int(self.tokens.row_lengths[list(rows)].max()))))

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.row_lengths[list(self.rows)].sum())

    @property
    def source(self) -> Tensor:
        """Of every row, int64 [rows]."""
        return torch.tensor([int(self.tokens.row_source[row]) for row in self.rows], dtype=torch.int64)

    @property
    def positions(self) -> Tensor:
        """Scored positions of every row, int64 [rows]."""
        return torch.tensor([int(self.tokens.row(row).scored.sum()) for row in self.rows], dtype=torch.int64)
