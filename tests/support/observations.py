"""Observations made of random routing, with the pairs they were summed from kept for naive checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from reapkit.observation.eaft_table import H_CELLS, H_EXACT, H_LEVELS, P_CELLS, P_EXACT, P_LEVELS, EaftTable, cell_edges
from reapkit.observation.observation import MAXIMA, SUMS, Observation, Trace


@dataclass(frozen=True, eq=False)
class Routing:
    """Positions and their routing: `source`, `scored`, `signal`, `p`, `h` [T]; `expert`, `gate`, `norm`, `peak` [L, T,
    k]; `residual` [L, T]."""

    source: Tensor
    scored: Tensor
    signal: Tensor
    expert: Tensor
    gate: Tensor
    norm: Tensor
    peak: Tensor
    p: Tensor
    h: Tensor
    residual: Tensor


def random_routing(
    seed: int = 0,
    *,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    tokens: int = 120,
    sources: int = 2,
    dead: tuple[int, ...] = (),
    score_all: bool = False,
) -> Routing:
    """Random positions; the experts `dead` are never routed to. Values are float32, as a model would give them."""
    draw = torch.Generator().manual_seed(seed)
    bias = torch.randn(layers, 1, experts, generator=draw)
    logits = torch.randn(layers, tokens, experts, generator=draw) + bias
    logits[..., list(dead)] = -1e9
    gate, expert = logits.softmax(-1).topk(top_k, dim=-1)
    norm = torch.rand(layers, tokens, top_k, generator=draw) * (1 + expert.float())
    scored = torch.ones(tokens, dtype=torch.bool) if score_all else torch.rand(tokens, generator=draw) < 0.7
    signal = scored & (torch.rand(tokens, generator=draw) < 0.9)
    return Routing(
        torch.randint(0, sources, (tokens,), generator=draw),
        scored,
        signal,
        expert,
        gate,
        norm,
        norm * 0.5,
        torch.rand(tokens, generator=draw),
        torch.rand(tokens, generator=draw),
        1 + 9 * torch.rand(layers, tokens, generator=draw),
    )


def repeated(routing: Routing, positions: Tensor) -> Routing:
    """The routing of `positions` only, in that order; an index may stand there several times."""
    by_layer = {name: getattr(routing, name)[:, positions] for name in ("expert", "gate", "norm", "peak", "residual")}
    return Routing(
        **{name: getattr(routing, name)[positions] for name in ("source", "scored", "signal", "p", "h")}, **by_layer
    )


def observe_routing(
    routing: Routing,
    *,
    experts: int = 8,
    sources: tuple[str, ...] = ("code", "tools"),
    trace: bool = True,
    layers: tuple[int, ...] | None = None,
    coactivation: bool = True,
) -> Observation:
    """The observation of a routing, summed naively."""
    depth, tokens, top_k = routing.expert.shape
    shape = (depth, len(sources), experts)
    together = torch.zeros((*shape, experts), dtype=torch.int64)
    snapshots = {name: torch.zeros((4, *shape), dtype=torch.float64) for name in ("count", "gate_norm_sum")}
    experts_of, gates, norms, peaks_of = (
        getattr(routing, name).tolist() for name in ("expert", "gate", "norm", "peak")
    )
    source_of, scored, residuals = routing.source.tolist(), routing.scored.tolist(), routing.residual.tolist()

    def cells() -> list[list[list[float]]]:
        return [[[0.0] * experts for _ in sources] for _ in range(depth)]

    added, largest = {name: cells() for name in SUMS}, {name: cells() for name in MAXIMA}
    for layer in range(depth):
        for t in range(tokens):
            s = source_of[t]
            for slot in range(top_k):
                e, g, n = experts_of[layer][t][slot], gates[layer][t][slot], norms[layer][t][slot]
                for name, value in {
                    "norm_max": n,
                    "gate_norm_max": g * n,
                    "activation_max": peaks_of[layer][t][slot],
                }.items():
                    for column in (name, f"{name}_scored") if scored[t] else (name,):
                        largest[column][layer][s][e] = max(largest[column][layer][s][e], value)
                if not scored[t]:
                    continue
                relative = g * n / residuals[layer][t]
                for name, value in zip(SUMS, (1.0, g, n, g * n, (g * n) ** 2, relative**2), strict=True):
                    added[name][layer][s][e] += value
                for step, fraction in enumerate((16, 8, 4, 2)):
                    if t < tokens / fraction:
                        snapshots["count"][step, layer, s, e] += 1
                        snapshots["gate_norm_sum"][step, layer, s, e] += g * n
                for other in experts_of[layer][t]:
                    together[layer, s, e, other] += 1
    sums = {name: torch.tensor(values, dtype=torch.float64) for name, values in added.items()}
    maxima = {name: torch.tensor(values, dtype=torch.float32) for name, values in largest.items()}
    names = tuple(range(depth)) if layers is None else layers

    def count(mask: torch.Tensor) -> torch.Tensor:
        return torch.bincount(routing.source[mask], minlength=len(sources))

    return Observation(
        model_type="toy_moe",
        layers=names,
        num_experts=experts,
        num_experts_per_tok=top_k,
        sources=sources,
        tokens=count(torch.ones_like(routing.scored)),
        scored_tokens=count(routing.scored),
        statistics=sums,
        maxima=maxima,
        coactivation=together if coactivation else None,
        snapshots=snapshots,
        eaft=trace_of_routing(routing, names) if trace else None,
        meta={"model": "toy"},
    )


def trace_of_routing(routing: Routing, layers: tuple[int, ...]) -> Trace:
    """The exact EAFT trace of the positions with a signal."""
    keep = routing.signal

    def routed(layer: int) -> tuple[ndarray, ndarray]:
        index = layers.index(layer)
        return routing.expert[index, keep].to(torch.int16).numpy(), (routing.gate * routing.norm)[index, keep].numpy()

    return Trace(routing.source[keep].to(torch.int16), routing.p[keep], routing.h[keep], routed)


def variants(seed: int) -> Iterator[Routing]:
    """Random positions, and the same with ties, a constant p, a constant H and one-token sources."""
    routing = random_routing(seed, dead=(seed % 8,))
    ties = torch.randint(0, 5, (120,), generator=torch.Generator().manual_seed(seed)).float() / 4
    lonely = torch.zeros(120, dtype=torch.int64)
    lonely[17] = 1
    routing.signal[17] = routing.scored[17] = True
    for change in (
        {},
        {"p": ties},
        {"p": ties, "h": ties.flip(0)},
        {"p": torch.full((120,), 0.5)},
        {"h": torch.zeros(120)},
        {"source": lonely},
    ):
        fields = {name: getattr(routing, name) for name in vars(routing)} | change
        yield type(routing)(**fields)


def in_cells(observation: Observation) -> Observation:
    """The same observation with its trace put into cells, position by position."""
    trace, sources, experts = observation.eaft, len(observation.sources), observation.num_experts
    p_edges = cell_edges(trace.p, trace.source, sources, P_EXACT, P_LEVELS)
    h_edges = cell_edges(trace.h, trace.source, sources, H_EXACT, H_LEVELS)
    assert p_edges.shape == (sources, P_CELLS - 1) and h_edges.shape == (sources, H_CELLS - 1)
    positions = np.zeros((sources, P_CELLS, H_CELLS), np.int64)
    count = np.zeros((len(observation.layers), sources, P_CELLS, H_CELLS, experts))
    mass = np.zeros_like(count)
    routed = [trace.routed(layer) for layer in observation.layers]
    for t in range(len(trace)):
        s = int(trace.source[t])
        cell = (
            s,
            sum(float(e) < float(trace.p[t]) for e in p_edges[s]),
            sum(float(e) < float(trace.h[t]) for e in h_edges[s]),
        )
        positions[cell] += 1
        for layer, (expert, gate_norm) in enumerate(routed):
            for e, gn in zip(expert[t].tolist(), gate_norm[t].tolist(), strict=True):
                count[(layer, *cell, e)] += 1
                mass[(layer, *cell, e)] += gn
    return replace(observation, eaft=EaftTable(p_edges, h_edges, positions, count, mass))


def assert_equal(a: Observation, b: Observation) -> None:
    assert (a.layers, a.num_experts, a.num_experts_per_tok, a.sources) == (
        b.layers,
        b.num_experts,
        b.num_experts_per_tok,
        b.sources,
    )
    for name in SUMS:
        assert np.array_equal(a.statistics[name], b.statistics[name]), name
    for name in MAXIMA:
        assert np.array_equal(a.maxima[name], b.maxima[name]), name
    for name in ("count", "gate_norm_sum"):
        assert np.array_equal(a.snapshots[name], b.snapshots[name]), name
    for x, y in ((a.coactivation, b.coactivation), (a.tokens, b.tokens), (a.scored_tokens, b.scored_tokens)):
        assert np.array_equal(x, y)
    for name in ("source", "p", "h"):
        assert np.array_equal(getattr(a.eaft, name), getattr(b.eaft, name)), name
    for layer in a.layers:
        assert all(np.array_equal(x, y) for x, y in zip(a.eaft.routed(layer), b.eaft.routed(layer), strict=True))
