"""Sums the statistics of expert outputs per layer, source and expert: float64, in a fixed order, without waiting for
the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reapkit.calibration.tokens import Batch
from reapkit.core.errors import UnusableError
from reapkit.model.expert_pairs import Pairs
from reapkit.model.routed_experts import RoutedExperts
from reapkit.observation.observation import MAXIMA, RELATIVE, SUMS

SMALLEST_RESIDUAL = 1e-15  # a residual stream of nothing but zeros divides by this instead


@dataclass(frozen=True, eq=False)
class Positions:
    """What the statistics need to know of a batch's positions, flattened row by row: [batch * tokens].

    `source` int64, `valid` (not padding) and `scored` bool; `signal` int64 [signals]: positions that carry an EAFT
    signal; `rows` : (source, rows of that source) pairs for the batch of shape `shape`.
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
        count, width = batch.input_ids.shape
        return cls(
            source,
            batch.valid.reshape(-1),
            batch.scored.reshape(-1),
            batch.signal.reshape(-1).nonzero()[:, 0],
            rows,
            (count, width),
        )

    def to(self, device: torch.device) -> Positions:
        source, valid, scored, signal = (
            each.to(device, non_blocking=True) for each in (self.source, self.valid, self.scored, self.signal)
        )
        rows = tuple((s, index.to(device, non_blocking=True)) for s, index in self.rows)
        return Positions(source, valid, scored, signal, rows, self.shape)


class LayerSums:
    """One layer's running statistics, on the layer's device. The last bin collects what does not count."""

    def __init__(self, num_sources: int, num_experts: int, device: torch.device):
        self.shape = (num_sources, num_experts)
        self.bins = num_sources * num_experts + 1
        self.sums = torch.zeros(self.bins, len(SUMS), dtype=torch.float64, device=device)
        self.maxima = torch.zeros(self.bins, len(MAXIMA), dtype=torch.float32, device=device)
        self.coactivation = torch.zeros(num_sources, num_experts, num_experts, dtype=torch.int64, device=device)

    def add(self, pairs: Pairs, positions: Positions, residual: Tensor) -> None:
        """Adds one call of the experts; `pairs` covers every position of the batch, padding too. `residual`: float32
        [positions], ‖r‖ behind the layer."""
        token = torch.div(pairs.order, pairs.top_k, rounding_mode="floor")
        g, n = pairs.gate.double(), pairs.norm.double()
        gn = g * n
        relative = gn / residual.double().clamp_min(SMALLEST_RESIDUAL)[token]
        terms = torch.stack([torch.ones_like(g), g, n, gn, gn * gn, relative * relative], dim=1)
        sizes = torch.stack([pairs.norm, pairs.gate * pairs.norm, pairs.peak], dim=1)
        valid, scored = positions.valid[token], positions.scored[token]
        if token.device.type == "cpu":
            self._add_by_bin(positions.source[token] * self.shape[1] + pairs.expert, terms, sizes, valid, scored)
        else:
            self._add_by_row(token * self.shape[1] + pairs.expert, terms, sizes, valid, scored, positions)
        self._add_coactivation(token, pairs.expert, positions)

    def _add_by_bin(self, key: Tensor, terms: Tensor, sizes: Tensor, valid: Tensor, scored: Tensor) -> None:
        """Pair by pair into its bin, in order: `key` int64 [pairs], `terms` float64 [pairs, 6], `sizes` float32 [pairs,
        3]."""
        trash = self.bins - 1
        self.sums += torch.zeros_like(self.sums).index_add_(0, torch.where(scored, key, trash), terms)
        for part, counted in zip(self.maxima.chunk(2, dim=1), (valid, scored), strict=True):
            part.scatter_reduce_(0, torch.where(counted, key, trash)[:, None].expand(-1, sizes.shape[1]), sizes, "amax")

    def _add_by_row(
        self, place: Tensor, terms: Tensor, sizes: Tensor, valid: Tensor, scored: Tensor, positions: Positions
    ) -> None:
        """The same where a device adds in parallel and pairs of one bin would meet in any order: each pair goes to a
        `place` of its own, token * experts + expert, in a dense table whose tokens the device then reduces in a fixed
        order.
        """
        table = (len(positions.source) * self.shape[1], *positions.shape, self.shape[1])
        sums, maxima = (part[:-1].view(*self.shape, -1) for part in (self.sums, self.maxima))
        by_row = _dense(terms, place, scored, "sum", table).sum(dim=1)
        for source, rows in positions.rows:
            sums[source] += by_row[rows].sum(dim=0)
        for part, counted in zip(maxima.chunk(2, dim=2), (valid, scored), strict=True):
            by_row = _dense(sizes, place, counted, "amax", table).amax(dim=1)
            for source, rows in positions.rows:
                part[source] = torch.maximum(part[source], by_row[rows].amax(dim=0))

    def _add_coactivation(self, token: Tensor, expert: Tensor, positions: Positions) -> None:
        experts = self.shape[1]
        routed = torch.zeros(len(positions.scored), experts, dtype=torch.float32, device=token.device)
        routed[token, expert] = positions.scored[token].float()
        by_row = routed.view(*positions.shape, experts)
        for source, rows in positions.rows:  # counts below 2^24 are exact in float32
            part = by_row[rows].view(-1, experts)
            self.coactivation[source] += (part.t() @ part).long()

    def tensors(self) -> dict[str, Tensor]:
        """The statistics so far, on the host: SUMS float64 [S, E], MAXIMA float32 [S, E], `coactivation` int64 [S, E,
        E]."""
        out = {name: column.view(self.shape) for name, column in zip(SUMS, self.sums[:-1].cpu().unbind(1), strict=True)}
        out |= {
            name: column.view(self.shape) for name, column in zip(MAXIMA, self.maxima[:-1].cpu().unbind(1), strict=True)
        }
        return out | {"coactivation": self.coactivation.cpu()}


def _dense(values: Tensor, place: Tensor, counted: Tensor, reduce: str, table: tuple[int, int, int, int]) -> Tensor:
    """`values` [pairs, columns] of the pairs that are counted, at their places of [rows, tokens, experts, columns],
    else 0; `table`: how many places, and their shape. A router that chooses an expert twice has both reduced.
    """
    places, *shape = table
    out = values.new_zeros(places, values.shape[1])
    out.scatter_reduce_(0, place[:, None].expand_as(values), torch.where(counted[:, None], values, 0), reduce)
    return out.view(*shape, -1)


class GroupSums:
    """The running statistics of one row group over all MoE layers."""

    def __init__(self, sites: Sequence[RoutedExperts], num_sources: int):
        num_experts = max(site.num_experts for site in sites)
        self.layers = {
            site.layer: LayerSums(num_sources, num_experts, next(site.module.parameters()).device) for site in sites
        }
        self.sites = sites
        self.tokens = torch.zeros(num_sources, dtype=torch.int64)
        self.scored_tokens = torch.zeros(num_sources, dtype=torch.int64)

    def add(self, site: RoutedExperts, pairs: Pairs, positions: Positions, residual: Tensor) -> None:
        """As `LayerSums.add`: one call of the experts, and ‖r‖ behind the layer, float32 [positions]."""
        self.layers[site.layer].add(pairs, positions, residual)

    def count_tokens(self, batch: Batch) -> None:
        """Counts a batch's positions on the host."""
        self.tokens.index_add_(0, batch.source, batch.valid.sum(dim=1))
        self.scored_tokens.index_add_(0, batch.source, batch.scored.sum(dim=1))

    def tensors(self) -> dict[str, Tensor]:
        """All statistics of `LayerSums.tensors`, stacked to [L, S, E] ([L, S, E, E]), and `tokens`, `scored_tokens`
        int64 [S]. Raises UnusableError naming layer and expert where one is not finite."""
        layers = [self.layers[site.layer].tensors() for site in self.sites]
        for site, layer in zip(self.sites, layers, strict=True):
            refuse_unusable(site, layer)
        out = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        return out | {"tokens": self.tokens.clone(), "scored_tokens": self.scored_tokens.clone()}


def refuse_unusable(site: RoutedExperts, tensors: Mapping[str, Tensor]) -> None:
    """Raises UnusableError naming the layer and the first expert with a statistic that is not finite.

    `tensors`: the layer's statistics [S, E] by the names of SUMS (float64) and MAXIMA (float32); others are not read.
    What an expert itself put out comes first: one that is broken spoils the layer's output for all that share a token
    with it.
    """
    own = [name for name in (*SUMS, *MAXIMA) if name != RELATIVE]
    broken, behind = (
        torch.stack([~tensors[name].isfinite().all(dim=0) for name in names]).any(dim=0) for names in (own, (RELATIVE,))
    )
    if not broken.any() and not behind.any():
        return
    dtype = str(next(site.module.parameters()).dtype).removeprefix("torch.")
    place = (
        f"layer {site.layer}, expert {int(broken.nonzero()[0])} ({int(broken.sum())} of {len(broken)} experts of this"
        " layer)"
        if broken.any()
        else f"what layer {site.layer} passes on"
    )
    raise UnusableError(
        f"observe: found NaN or infinity in {place}, computed in {dtype}. Load the model in bfloat16 or float32, or"
        " download the checkpoint again."
    )
