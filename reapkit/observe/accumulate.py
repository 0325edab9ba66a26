"""Sums of what the experts put out, per layer, source and expert: float64, in a fixed order, without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reapkit.calibration.tokens import Batch
from reapkit.errors import UnusableError
from reapkit.observation import MAXIMA, SUMS
from reapkit.observe.experts import Pairs, RoutedExperts


@dataclass(frozen=True, eq=False)
class Positions:
    """What the statistics need to know of a batch's positions, flattened row by row: [batch * tokens].

    `source` int64, `valid` (not padding) and `scored` bool; `signal` int64 [signals]: positions that carry an EAFT signal;
    `rows` : (source, rows of that source) pairs for the batch of shape `shape`.
    """

    source: Tensor
    valid: Tensor
    scored: Tensor
    signal: Tensor
    rows: tuple[tuple[int, Tensor], ...]
    shape: tuple[int, int]

    @classmethod
    def of(cls, batch: Batch) -> Positions:
        source = batch.source[:, None].expand(batch.input_ids.shape).reshape(-1)
        rows = tuple((int(s), (batch.source == s).nonzero()[:, 0]) for s in batch.source.unique())
        return cls(
            source,
            batch.valid.reshape(-1),
            batch.scored.reshape(-1),
            batch.signal.reshape(-1).nonzero()[:, 0],
            rows,
            tuple(batch.input_ids.shape),
        )

    def to(self, device: torch.device) -> Positions:
        move = dict(device=device, non_blocking=True)
        rows = tuple((s, index.to(**move)) for s, index in self.rows)
        return Positions(
            self.source.to(**move), self.valid.to(**move), self.scored.to(**move), self.signal.to(**move), rows, self.shape
        )


class LayerSums:
    """One layer's running statistics, on the layer's device. The last bin collects what does not count."""

    def __init__(self, num_sources: int, num_experts: int, device: torch.device):
        self.shape = (num_sources, num_experts)
        self.bins = num_sources * num_experts + 1
        self.sums = torch.zeros(self.bins, len(SUMS), dtype=torch.float64, device=device)
        self.maxima = torch.zeros(self.bins, len(MAXIMA), dtype=torch.float32, device=device)
        self.coactivation = torch.zeros(num_sources, num_experts, num_experts, dtype=torch.int64, device=device)

    def add(self, pairs: Pairs, positions: Positions) -> None:
        """Adds one call of the experts; `pairs` covers every position of the batch, padding too."""
        token = torch.div(pairs.order, pairs.top_k, rounding_mode="floor")
        key = positions.source[token] * self.shape[1] + pairs.expert
        trash = self.bins - 1
        scored = torch.where(positions.scored[token], key, trash)
        g, n = pairs.gate.double(), pairs.norm.double()
        gn = g * n
        self.sums += bin_sums(torch.stack([torch.ones_like(g), g, n, gn, gn * gn], dim=1), scored, self.bins)
        sizes = torch.stack([pairs.norm, pairs.gate * pairs.norm, pairs.peak], dim=1)
        for first, where in ((0, torch.where(positions.valid[token], key, trash)), (3, scored)):
            part = self.maxima[:, first : first + 3]
            part.scatter_reduce_(0, where[:, None].expand(-1, 3), sizes, "amax")
        self._add_coactivation(pairs, positions)

    def _add_coactivation(self, pairs: Pairs, positions: Positions) -> None:
        experts = self.shape[1]
        routed = torch.zeros(len(positions.scored), experts, dtype=torch.float32, device=pairs.order.device)
        token = torch.div(pairs.order, pairs.top_k, rounding_mode="floor")
        routed[token, pairs.expert] = positions.scored[token].float()
        by_row = routed.view(*positions.shape, experts)
        for source, rows in positions.rows:  # counts below 2^24 are exact in float32
            part = by_row[rows].view(-1, experts)
            self.coactivation[source] += (part.t() @ part).long()

    def tensors(self) -> dict[str, Tensor]:
        """The statistics so far as [S, E] tensors on the host."""
        out = {name: column.view(self.shape) for name, column in zip(SUMS, self.sums[:-1].cpu().unbind(1), strict=True)}
        out |= {name: column.view(self.shape) for name, column in zip(MAXIMA, self.maxima[:-1].cpu().unbind(1), strict=True)}
        return out | {"coactivation": self.coactivation.cpu()}


def bin_sums(values: Tensor, key: Tensor, bins: int) -> Tensor:
    """Row sums of `values` [n, columns] float64 by `key` int64 [n], always added in the same order."""
    if values.device.type == "cpu":
        return values.new_zeros(bins, values.shape[1]).index_add_(0, key, values)
    return sorted_bin_sums(values, key, bins)


def sorted_bin_sums(values: Tensor, key: Tensor, bins: int) -> Tensor:
    """`bin_sums` where `index_add_` would be float atomics in any order: sorted by key, each segment summed from its first to
    its last.
    """
    key, order = torch.sort(key, stable=True)
    edges = torch.searchsorted(key, torch.arange(bins + 1, device=key.device))
    return torch.segment_reduce(values[order], "sum", lengths=edges.diff(), axis=0, unsafe=True, initial=0.0)


class GroupSums:
    """The running statistics of one row group over all MoE layers."""

    def __init__(self, sites: Sequence[RoutedExperts], num_sources: int):
        num_experts = max(site.num_experts for site in sites)
        self.layers = {site.layer: LayerSums(num_sources, num_experts, next(site.module.parameters()).device) for site in sites}
        self.sites = sites
        self.tokens = torch.zeros(num_sources, dtype=torch.int64)
        self.scored_tokens = torch.zeros(num_sources, dtype=torch.int64)

    def add(self, site: RoutedExperts, pairs: Pairs, positions: Positions) -> None:
        self.layers[site.layer].add(pairs, positions)

    def count_tokens(self, batch: Batch) -> None:
        """Counts a batch's positions on the host."""
        self.tokens.index_add_(0, batch.source, batch.valid.sum(dim=1))
        self.scored_tokens.index_add_(0, batch.source, batch.scored.sum(dim=1))

    def tensors(self) -> dict[str, Tensor]:
        """All statistics, stacked to [L, S, E]. Raises UnusableError naming layer and expert where one is not finite."""
        layers = [self.layers[site.layer].tensors() for site in self.sites]
        for site, layer in zip(self.sites, layers, strict=True):
            refuse_unusable(site, layer)
        out = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        return out | {"tokens": self.tokens.clone(), "scored_tokens": self.scored_tokens.clone()}


def refuse_unusable(site: RoutedExperts, tensors: Mapping[str, Tensor]) -> None:
    """Raises UnusableError naming the layer and the first expert with a statistic that is not finite."""
    broken = torch.stack([~tensors[name].isfinite().all(dim=0) for name in (*SUMS, *MAXIMA)]).any(dim=0)
    if broken.any():
        dtype = str(next(site.module.parameters()).dtype).removeprefix("torch.")
        raise UnusableError(
            f"observe: NaN or infinity in layer {site.layer}, expert {int(broken.nonzero()[0])} "
            f"({int(broken.sum())} of its {len(broken)} experts), computed in {dtype}. "
            "Load the model in bfloat16 or float32, or download the checkpoint again."
        )
