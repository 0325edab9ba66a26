"""Proves multi-token-prediction blocks that were pruned with the model: they load, and predict as the original's with
the dropped experts masked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reapkit.calibration.tokens import Batch
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.mtp_support import why_unobserved
from reapkit.evaluation.proofs.proof import Proof, attempt, equal_logits, not_measured
from reapkit.model.loading import final_hidden
from reapkit.model.masking import masked_sites
from reapkit.observation.mtp_blocks import MtpBlocks, Slots
from reapkit.selection.selection import Selection

NAME = "multi-token prediction"


@dataclass(eq=False)
class MtpPair:
    """The blocks `layers` of the original and of the pruned directory; none where they were dropped.

    `unloadable`: why transformers does not load them of one of both.
    """

    source: Path
    directory: Path
    layers: tuple[int, ...]
    selection: Selection
    unloadable: str | None = None
    expected: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, old: Checkpoint, new: Checkpoint, selection: Selection, *, trust_remote_code: bool) -> MtpPair:
        whys = [why_unobserved(one, one.layout, trust_remote_code=trust_remote_code) for one in (old, new)]
        return cls(old.path, new.path, tuple(new.layout.mtp), selection, next(filter(None, whys), None))

    def expect(self, model: PreTrainedModel, rows: Tensor) -> None:
        """Takes down what the original's blocks predict for `rows` `[rows, tokens]` int64 behind `model`, both with the
        dropped experts masked."""
        if self.layers and self.unloadable is None:
            blocks = MtpBlocks(model, self.layers, model.device)
            keep = {layer: chosen for layer, chosen in self.selection.keep.items() if layer in self.layers}
            with masked_sites(blocks.sites, keep, self.selection.experts_per_token):
                self.expected = block_logits(blocks, model, rows)

    def prove(self, model: PreTrainedModel, rows: Tensor) -> list[Proof]:
        """The same of the pruned directory's blocks behind its loaded `model`, on the same `rows` `[rows, tokens]`
        int64."""
        if not self.layers:
            return []
        if self.unloadable is not None:
            return [not_measured(NAME, self.unloadable)]
        return [
            attempt(NAME, lambda: self._compare(block_logits(MtpBlocks(model, self.layers, model.device), model, rows)))
        ]

    def _compare(self, found: list[Tensor]) -> Proof:
        equal = equal_logits(
            torch.cat(found, 1), torch.cat(self.expected, 1), "the original's blocks with the dropped experts masked"
        )
        return Proof(NAME, equal.passed, equal.detail, equal.value)


@torch.no_grad()
def block_logits(blocks: MtpBlocks, model: PreTrainedModel, rows: Tensor) -> list[Tensor]:
    """Each block's logits [rows, tokens - depth, vocabulary] on the host, for `rows` int64 [rows, tokens] that `model`
    reads first."""
    count, width = rows.shape
    every = torch.ones_like(rows, dtype=torch.bool)
    batch = Batch(
        rows,
        torch.full((count,), width),
        every,
        every,
        every,
        torch.zeros(count, dtype=torch.int64),
        None,
        tuple(range(count)),
    )
    hidden = final_hidden(model, rows.to(model.device))
    return [
        blocks.logits(output).cpu() for output in blocks.run(rows, hidden, lambda site, depth: Slots.of(batch, depth))
    ]
