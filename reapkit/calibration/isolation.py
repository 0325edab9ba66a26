"""Tests whether a model isolates the samples of one row when only their positions restart."""

from __future__ import annotations

from collections.abc import Callable

import torch

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.core.errors import UnusableError

MAX_LEAK_SHARE = 0.05
"""Of the difference that no isolation at all makes; kernels that round differently stay far below, a leaking layer near
one."""
PROBE_TOKENS = 512
"""Tokens per sample that are compared."""


def check_isolation(hidden: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], tokens: CalibrationTokens) -> None:
    """Passes where the second sample of a packed row comes out as it does alone; does nothing for other packings.

    `hidden(input_ids, position_ids)`, both int64 [1, t], gives final hidden states (or logits) [1, t, n], without a
    cache. The row is the first that holds two samples. Attention that reads segment borders from restarting positions
    passes; linear attention and convolutions leak all the same, and so does attention that is given a plain causal
    mask.

    Raises UnusableError where the row leaks, with what to do.
    """
    if tokens.packing != "isolated":
        return
    pair = _two_samples(tokens)
    if pair is None:
        return
    first, second = pair
    both = torch.cat([first, second])[None]
    restarting = torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None]
    with torch.no_grad():
        alone = hidden(second[None], torch.arange(len(second))[None])[0].double()
        isolated = hidden(both, restarting)[0, len(first) :].double()
        joined = hidden(both, torch.arange(both.shape[1])[None])[0, len(first) :].double()
    leak, unprotected = float((isolated - alone).norm()), float((joined - alone).norm())
    if leak > MAX_LEAK_SHARE * unprotected:
        share = leak / unprotected if unprotected else float("inf")
        raise UnusableError(
            "calibration.packing: isolated, but samples of one row influence each other in this model "
            f"({share:.0%} of the difference that plain concatenation makes). Choose `packing: none`, or "
            "`concat`, where this is meant."
        )


def _two_samples(tokens: CalibrationTokens) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The first two samples of the first row that holds two, at most `PROBE_TOKENS` of each."""
    for index in range(tokens.num_rows):
        row = tokens.row(index)
        if len(row.sample) and int(row.sample[-1]) >= 1:
            return row.input_ids[row.sample == 0][:PROBE_TOKENS], row.input_ids[row.sample == 1][:PROBE_TOKENS]
    return None
