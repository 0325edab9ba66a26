"""Computes KL divergences that are almost nothing without losing them to rounding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reapkit.evaluation.head import chunk_positions, logits
from reapkit.evaluation.metrics.signals import kl_divergence

SMALL = 0.25  # nats; above it the textbook sum is exact enough, and what it leaves out here would count
CACHED_LOGIT_BYTES = 2_500_000_000
"""Of the base's float32 logits that are kept on the device; beyond it they are computed anew for every comparison."""


def small_divergence(base: Tensor, other: Tensor, p: Tensor | None = None) -> Tensor:
    """KL(softmax(base) ‖ softmax(other)) in nats, float32 [...], of logits [..., vocabulary] float32; `p`: the
    softmax of `base`, where it is known.

    With d the difference of the logits, m = Σ p d and x = d − m it is ln Σ p exp(−x) = ln(1 + Σ p (exp(−x) − 1 + x)): a
    sum of terms that are not negative and vanish with x², where Σ p (ln p − ln q) leaves the rounding of its terms,
    1e-7 a position. Where it is large, or not finite, it is computed so nevertheless.
    """
    p, x = base.softmax(-1) if p is None else p, base - other
    x -= (p * x).sum(-1, keepdim=True)
    found = torch.log1p(torch.expm1(-x).add_(x).mul_(p).sum(-1).clamp_min(0.0))
    large = ~(found <= SMALL)  # also what is no number, where a model rules tokens out by a logit of minus infinity
    if large.any():
        shape = torch.broadcast_shapes(base.shape, other.shape)
        log_p, log_q = (each.expand(shape)[large].log_softmax(-1) for each in (base, other))
        found[large] = kl_divergence(log_p, log_q)
    return found


class BaseLogits:
    """The base's logits at the scored positions of a batch's rows, by row."""

    def __init__(self, model: PreTrainedModel, hidden: Tensor, scored: Tensor):
        """`hidden`: final hidden states [b, t, hidden] in the model's dtype; `scored`: bool [b, t]."""
        self._model, self._hidden, self.scored = model, hidden, scored
        self._step = chunk_positions(model)
        self._kept: dict[int, list[Tensor]] = {}
        vocabulary = logits(model, hidden.reshape(-1, hidden.shape[-1])[:1]).shape[-1]
        self._keeps = 4 * vocabulary * int(scored.sum()) <= CACHED_LOGIT_BYTES

    def of_row(self, row: int) -> list[Tensor]:
        """Float32 [n, vocabulary] each, of consecutive scored positions of the row, as many at a time as a chunk
        holds."""
        if row in self._kept:
            return self._kept[row]
        hidden = self._hidden[row][self.scored[row].to(self._hidden.device)]
        found = [logits(self._model, part) for part in hidden.split(self._step)]
        if self._keeps:
            self._kept[row] = found
        return found

    def divergence(self, row: Tensor, hidden: Tensor) -> Tensor:
        """KL of the base from what `hidden` [n, t, hidden] says instead of `row` int64 [n] (on the host), summed over
        the row's scored positions: float64 [n]."""
        found = torch.zeros(len(row), dtype=torch.float64)
        for number in row.unique().tolist():
            mine = (row == number).nonzero()[:, 0]
            of_row = hidden[mine.to(hidden.device)][:, self.scored[number].to(hidden.device)]
            base, at = self.of_row(number), 0
            for part in base:
                chunk = of_row[:, at : at + len(part)]
                found[mine] += torch.cat(list(self._compared(part, chunk))).cpu()
                at += len(part)
        return found

    def _compared(self, base: Tensor, hidden: Tensor) -> Iterator[Tensor]:
        """Float64 [k] each, some of the n variants at a time: `hidden` [n, positions, hidden] against `base`
        [positions, vocabulary]."""
        p = base.softmax(-1)
        for some in hidden.split(max(1, self._step // max(1, len(base)))):
            said = logits(self._model, some.reshape(-1, some.shape[-1])).view(len(some), *base.shape)
            for each in said:  # one at a time stays in a CPU's cache
                yield small_divergence(base, each, p).double().sum(0, keepdim=True)
