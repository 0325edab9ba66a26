"""The greedy oracle: measures the loss of every single removal on some calibration rows, and takes the cheapest, layer
by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from math import floor

import torch
from torch import nn

from reapkit.calibration.tokens import Batch, CalibrationTokens, batches
from reapkit.model.loading import final_hidden, head_logits
from reapkit.model.masking import masked
from reapkit.model.routed_experts import find_experts
from reapkit.selection.selection import LayerSelection, Selection


@torch.no_grad()
def greedy_oracle(
    model: nn.Module, tokens: CalibrationTokens, ratios: Sequence[Decimal], rows: int
) -> Mapping[Decimal, Selection]:
    """One selection per ratio, nested, every layer losing the same number.

    Layers take turns; in its turn a layer loses the expert whose removal, everything else as it is by then, raises the
    mean loss of the rows (the first `rows`, cut to 256 tokens) least. Ties go to the lower index.
    """
    sites = {site.layer: site.num_experts for site in find_experts(model)}
    keep = {layer: set(range(count)) for layer, count in sites.items()}
    batch = next(batches(tokens, range(min(rows, tokens.num_rows)), 1 << 30))
    found, removed = {}, 0
    for ratio in sorted(ratios):
        while removed < floor(min(sites.values()) * ratio):
            for layer, alive in keep.items():
                losses = {expert: _loss(model, batch, {**keep, layer: alive - {expert}}) for expert in sorted(alive)}
                alive.remove(min(losses, key=losses.__getitem__))
            removed += 1
        found[ratio] = Selection("oracle", {layer: _layer(alive, sites[layer]) for layer, alive in keep.items()})
    return found


def _layer(alive: set[int], count: int) -> LayerSelection:
    return LayerSelection(tuple(sorted(alive)), tuple(sorted(set(range(count)) - alive)), ())


def _loss(model: nn.Module, batch: Batch, keep: Mapping[int, set[int]]) -> float:
    ids = batch.input_ids[:, :256]
    row, at = batch.signal[:, : ids.shape[1] - 1].nonzero(as_tuple=True)
    with masked(model, {layer: sorted(alive) for layer, alive in keep.items()}):
        hidden = final_hidden(model, ids)
    return float(nn.functional.cross_entropy(head_logits(model, hidden[row, at]).float(), ids[row, at + 1]))
