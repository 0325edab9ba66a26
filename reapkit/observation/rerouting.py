"""Computes what pruning does to a layer when tokens go to the next-best remaining experts. Pure maths on a sample of
tokens.

For token t and alive set A, y_t(A) is the routed output when only A exists, by the model's own router on its sliced
rows, and r_t the residual stream after the layer:

    err(A) = Σ_t w_t ‖y_t(A) − y_t(all)‖² / ‖r_t‖² / Σ_t w_t

Backward greedy: starting from all experts, the one whose removal raises err least goes next (of equals the lower
index), down to the fewest that still route. The path gives every ratio at once, nested.

Routers whose experts come in equal groups lose one expert of every group at a time, a *round*: groups in order, each
giving up the expert that costs least together with the picks of the others, which are at first those with the least Σ
g‖f‖.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

ROWS = 1 << 15  # token rows evaluated at once
PROJECTED = 256  # dimensions; up to as many experts the exact inner products take no more memory

Route = Callable[[Sequence[int], Tensor], tuple[Tensor, Tensor]]
"""`route(alive, tokens)`: experts int64 [t, k] by their original numbers and gates float32 [t, k], on the host."""


class Outputs(Protocol):
    """All experts' outputs f_te on T tokens, each divided by ‖r_t‖."""

    def squared(self, tokens: Tensor, experts: Tensor, coefficients: Tensor) -> Tensor:
        """‖Σ_i c_ti f_te_i‖², float64 [t].

        `tokens`: int64 [t], of the T; `experts`: int64 [t, m]; `coefficients`: float32 [t, m].
        """
        ...


@dataclass(frozen=True, eq=False)
class InnerProducts:
    """⟨f_te, f_te'⟩, float32 [T, E, E]: exact, whatever the hidden size."""

    products: Tensor

    def squared(self, tokens: Tensor, experts: Tensor, coefficients: Tensor) -> Tensor:
        """As `Outputs.squared`: float64 [t] for experts and coefficients [t, m]."""
        flat, width = self.products.view(len(self.products), -1), self.products.shape[-1]
        tokens, experts, coefficients = (part.to(flat.device) for part in (tokens, experts, coefficients))
        pairs = (experts[:, :, None] * width + experts[:, None, :]).flatten(1)
        found = flat[tokens[:, None], pairs].view(len(tokens), experts.shape[1], -1)
        return torch.einsum("ti,tij,tj->t", coefficients, found, coefficients).double().clamp_(min=0)


@dataclass(frozen=True, eq=False)
class Vectors:
    """The outputs themselves or their projections, float32 [T, E, d]."""

    vectors: Tensor

    def squared(self, tokens: Tensor, experts: Tensor, coefficients: Tensor) -> Tensor:
        """As `Outputs.squared`: float64 [t] for experts and coefficients [t, m]."""
        tokens, experts, coefficients = (part.to(self.vectors.device) for part in (tokens, experts, coefficients))
        found = self.vectors[tokens[:, None], experts]
        return torch.einsum("tid,ti->td", found, coefficients).square().sum(1, dtype=torch.float64)


def projection(hidden: int, dimensions: int = PROJECTED, seed: int = 0) -> Tensor:
    """A Johnson–Lindenstrauss matrix, float32 [hidden, dimensions]: squared norms keep to about √(2 / dimensions), 9 %
    at 256."""
    return torch.randn(hidden, dimensions, generator=torch.Generator().manual_seed(seed)) / dimensions**0.5


@dataclass(frozen=True, eq=False)
class Sampled:
    """A layer's sample: outputs, router, each token's source int64 [T], and its weight w float64 [T].

    `local`: removing an expert leaves the routing of tokens that did not choose it as it was; `least`: fewest experts
    that route.
    """

    outputs: Outputs
    route: Route
    source: Tensor
    weight: Tensor
    num_experts: int
    least: int
    groups: int = 1
    local: bool = True

    def of_source(self, source: int) -> Sampled:
        """The tokens of one source."""
        mine = (self.source == source).nonzero()[:, 0]
        narrowed = _Some(self.outputs, mine)
        return replace(
            self,
            outputs=narrowed,
            route=lambda alive, tokens: self.route(alive, mine[tokens]),
            source=self.source[mine],
            weight=self.weight[mine],
        )


@dataclass(frozen=True, eq=False)
class _Some:
    outputs: Outputs
    chosen: Tensor

    def squared(self, tokens: Tensor, experts: Tensor, coefficients: Tensor) -> Tensor:
        return self.outputs.squared(self.chosen[tokens], experts, coefficients)


@dataclass(frozen=True, eq=False)
class Path:
    """`order` int64 [E]: experts in the order they go, -1 beyond the last that can; `error` float64 [E]: err once each
    is gone."""

    order: Tensor
    error: Tensor


def path(sampled: Sampled) -> Path:
    """The backward greedy path."""
    if sampled.groups > 1:
        steps = _in_rounds(sampled)
    else:
        steps = _incremental(sampled) if sampled.local else _exhaustive(sampled)
    order = torch.full((sampled.num_experts,), -1, dtype=torch.int64)
    error = torch.zeros(sampled.num_experts, dtype=torch.float64)
    for at, (expert, err) in enumerate(steps):
        order[at], error[at] = expert, err
    return Path(order, error)


def single(sampled: Sampled, num_sources: int) -> Tensor:
    """Σ_t of err after removing one expert alone, float64 [sources, E], a sum over each source's tokens.

    With groups: together with the least loaded expert of every other group, so comparable within a group only.
    """
    found = torch.zeros(num_sources, sampled.num_experts, dtype=torch.float64)
    if sampled.local and sampled.groups == 1:
        pairs = _ReroutedPairs.first(sampled)
        bins = sampled.source[:, None] * sampled.num_experts + pairs.index
        return found.view(-1).index_add_(0, bins.flatten(), pairs.other_error.flatten()).view(found.shape)
    everyone = list(range(sampled.num_experts))
    picks = _least_loaded(sampled, everyone) if sampled.groups > 1 else [-1]
    tokens = torch.arange(len(sampled.source))
    base = sampled.route(everyone, tokens)
    for expert in everyone:
        gone = _with_pick(sampled, picks, expert)
        if len(everyone) - len(gone) >= sampled.least:
            errors = _errors(sampled, base, tokens, sampled.route([e for e in everyone if e not in gone], tokens))
            found[:, expert] = torch.zeros(num_sources, dtype=torch.float64).index_add_(0, sampled.source, errors)
    return found


# ---------------------------------------------------------------------------------------------- greedy, token by token


@dataclass(eq=False)
class _ReroutedPairs:
    """For every (token, slot): where the token would go if that slot's expert were gone, and its error then; all on the
    host.

    `index`, `gates` [T, k]: the present routing; `error` float64 [T]; `other_index`, `other_gates` [T, k, k] and
    `other_error` float64 [T, k]: without the slot's expert. Holds for local routers: an entry changes only where the
    removed expert is in it.
    """

    sampled: Sampled
    base: tuple[Tensor, Tensor]
    index: Tensor
    gates: Tensor
    error: Tensor
    other_index: Tensor
    other_gates: Tensor
    other_error: Tensor

    @classmethod
    def first(cls, sampled: Sampled) -> _ReroutedPairs:
        """Before anything is removed."""
        alive = list(range(sampled.num_experts))
        base = sampled.route(alive, torch.arange(len(sampled.source)))
        tokens, k = base[0].shape
        pairs = cls(
            sampled,
            base,
            base[0].clone(),
            base[1].clone(),
            torch.zeros(tokens, dtype=torch.float64),
            torch.zeros(tokens, k, k, dtype=torch.int64),
            torch.zeros(tokens, k, k),
            torch.zeros(tokens, k, dtype=torch.float64),
        )
        if len(alive) > sampled.least:
            pairs.evaluate(alive, torch.ones(tokens, k, dtype=torch.bool))
        return pairs

    def costs(self) -> Tensor:
        """The increase of Σ_t by removed expert, float64 [E]."""
        increase = (self.other_error - self.error[:, None]) * self.sampled.weight[:, None]
        return torch.zeros(self.sampled.num_experts, dtype=torch.float64).index_add_(
            0, self.index.flatten(), increase.flatten()
        )

    def remove(self, expert: int, alive: Sequence[int]) -> None:
        """Re-routes the expert's tokens among `alive`, and re-evaluates every entry that named it."""
        token, slot = (self.index == expert).nonzero(as_tuple=True)
        stale = (self.other_index == expert).any(2)
        self.index[token], self.gates[token] = self.other_index[token, slot], self.other_gates[token, slot]
        self.error[token] = self.other_error[token, slot]
        stale[token] = True
        if len(alive) > self.sampled.least:
            self.evaluate(alive, stale)

    def evaluate(self, alive: Sequence[int], stale: Tensor) -> None:
        """Fills the entries that are `stale` [T, k]."""
        token, slot = stale.nonzero(as_tuple=True)
        expert, order = torch.sort(self.index[token, slot], stable=True)
        token, slot = token[order], slot[order]
        for removed, of_expert in zip(*_runs(expert), strict=True):
            t, s = token[of_expert], slot[of_expert]
            self.other_index[t, s], self.other_gates[t, s] = self.sampled.route([e for e in alive if e != removed], t)
        self.other_error[token, slot] = _errors(
            self.sampled, self.base, token, (self.other_index[token, slot], self.other_gates[token, slot])
        )


def _runs(values: Tensor) -> tuple[list[int], list[slice]]:
    """Sorted values' distinct ones and where each lies."""
    distinct, counts = torch.unique_consecutive(values, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return distinct.tolist(), [slice(end - count, end) for end, count in zip(ends, counts.tolist(), strict=True)]


def _incremental(sampled: Sampled) -> list[tuple[int, float]]:
    pairs, alive, steps = _ReroutedPairs.first(sampled), list(range(sampled.num_experts)), []
    while len(alive) > sampled.least:
        costs = pairs.costs()[alive].numpy()
        expert = alive.pop(int(costs.argmin()))  # numpy's argmin is the first, so the lowest index
        pairs.remove(expert, alive)
        steps.append((expert, _mean(sampled, pairs.error)))
    return steps


def _exhaustive(sampled: Sampled) -> list[tuple[int, float]]:
    """For routers where a removal may change any token: every candidate on all tokens."""
    alive, steps, tokens = list(range(sampled.num_experts)), [], torch.arange(len(sampled.source))
    base = sampled.route(alive, tokens)
    while len(alive) > sampled.least:
        errors = [
            _mean(sampled, _errors(sampled, base, tokens, sampled.route([e for e in alive if e != expert], tokens)))
            for expert in alive
        ]
        best = min(range(len(alive)), key=errors.__getitem__)
        steps.append((alive.pop(best), errors[best]))
    return steps


def _in_rounds(sampled: Sampled) -> list[tuple[int, float]]:
    alive, steps, tokens = list(range(sampled.num_experts)), [], torch.arange(len(sampled.source))
    base = sampled.route(alive, tokens)
    while len(alive) - sampled.groups >= sampled.least:
        picks, before = _least_loaded(sampled, alive), steps[-1][1] if steps else 0.0
        for group in range(sampled.groups):
            errors = {}
            for expert in (e for e in alive if _group(sampled, e) == group):
                gone = _with_pick(sampled, picks, expert)
                errors[expert] = _mean(
                    sampled, _errors(sampled, base, tokens, sampled.route([e for e in alive if e not in gone], tokens))
                )
            picks[group] = min(errors, key=errors.__getitem__)
        after = errors[picks[-1]]
        alive = [e for e in alive if e not in picks]
        steps += [(pick, before + (after - before) * (at + 1) / len(picks)) for at, pick in enumerate(picks)]
    return steps


def _least_loaded(sampled: Sampled, alive: Sequence[int]) -> list[int]:
    """The expert of each group with the least Σ w g‖f‖ among `alive`."""
    tokens = torch.arange(len(sampled.source))
    index, gates = sampled.route(alive, tokens)
    k = index.shape[1]
    norms = _squared(sampled, tokens.repeat_interleave(k), index.reshape(-1, 1), gates.reshape(-1, 1)).sqrt()
    norms = norms * sampled.weight.repeat_interleave(k)
    load = torch.zeros(sampled.num_experts, dtype=torch.float64).index_add_(0, index.flatten(), norms)
    return [
        min((e for e in alive if _group(sampled, e) == group), key=lambda e: float(load[e]))
        for group in range(sampled.groups)
    ]


def _with_pick(sampled: Sampled, picks: Sequence[int], expert: int) -> set[int]:
    return {expert, *(pick for group, pick in enumerate(picks) if group != _group(sampled, expert))}


def _group(sampled: Sampled, expert: int) -> int:
    return expert * sampled.groups // sampled.num_experts


def _mean(sampled: Sampled, errors: Tensor) -> float:
    return float((errors * sampled.weight).sum() / sampled.weight.sum()) if len(errors) else 0.0


def _errors(sampled: Sampled, base: tuple[Tensor, Tensor], tokens: Tensor, routing: tuple[Tensor, Tensor]) -> Tensor:
    """‖y_t(A) − y_t(all)‖² / ‖r_t‖², float64 [t]."""
    return _squared(
        sampled, tokens, torch.cat([routing[0], base[0][tokens]], 1), torch.cat([routing[1], -base[1][tokens]], 1)
    )


def _squared(sampled: Sampled, tokens: Tensor, experts: Tensor, coefficients: Tensor) -> Tensor:
    parts = [
        sampled.outputs.squared(tokens[at : at + ROWS], experts[at : at + ROWS], coefficients[at : at + ROWS]).cpu()
        for at in range(0, len(tokens), ROWS)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
