"""Statistics of one call of the experts: both ways of adding them against a loop over pairs."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from reapkit.model.expert_pairs import Pairs
from reapkit.observation.accumulate import LayerSums, Positions
from reapkit.observation.observation import MAXIMA, SUMS

SOURCES, EXPERTS, TOP_K = 3, 7, 2


def one_call(seed: int) -> tuple[Pairs, Positions, torch.Tensor]:
    """Five rows of up to nine tokens; source 2 has no row, expert 6 no token, and one token chooses expert 3 twice."""
    draw = torch.Generator().manual_seed(seed)
    shape, source = (5, 9), torch.tensor([0, 1, 0, 1, 1])
    index = torch.rand(45, EXPERTS - 1, generator=draw).argsort(dim=1)[:, :TOP_K]
    index[4] = 3
    expert, order = torch.sort(index.reshape(-1), stable=True)
    gate, norm, peak = torch.rand(3, 90, generator=draw)
    valid = torch.arange(9) < torch.tensor([9, 3, 1, 9, 7])[:, None]
    scored = valid & (torch.rand(shape, generator=draw) < 0.7)
    scored[0, 4] = True
    rows = tuple((number, (source == number).nonzero()[:, 0]) for number in (0, 1))
    positions = Positions(
        source[:, None].expand(shape).reshape(-1),
        valid.reshape(-1),
        scored.reshape(-1),
        scored.reshape(-1).nonzero()[:, 0],
        rows,
        shape,
    )
    residual = torch.rand(45, generator=draw) * (torch.arange(45) != 11)  # one position's stream is nothing but zeros
    return Pairs(order, expert, gate, norm * (order // TOP_K != 11), peak, TOP_K), positions, residual


def looped(calls: list[tuple[Pairs, Positions, torch.Tensor]]) -> dict[str, torch.Tensor]:
    sums = {name: torch.zeros(SOURCES, EXPERTS, dtype=torch.float64) for name in SUMS}
    maxima = {name: torch.zeros(SOURCES, EXPERTS, dtype=torch.float64) for name in MAXIMA}
    for pairs, positions, residual in calls:
        for order, expert, *sizes in zip(
            pairs.order.tolist(),
            pairs.expert.tolist(),
            *(x.tolist() for x in (pairs.gate, pairs.norm, pairs.peak)),
            strict=True,
        ):
            token, (g, n, peak) = order // TOP_K, sizes
            at = int(positions.source[token]), expert
            if positions.scored[token]:
                relative = g * n / float(residual[token]) if n else 0.0
                for name, value in zip(SUMS, (1, g, n, g * n, (g * n) ** 2, relative**2), strict=True):
                    sums[name][at] += value
            for name, value in zip(MAXIMA, (n, g * n, peak) * 2, strict=True):
                if (positions.scored if name.endswith("_scored") else positions.valid)[token]:
                    maxima[name][at] = max(maxima[name][at], value)
    return sums | maxima


@pytest.mark.parametrize(("seed", "way"), product((0, 1, 2), ("_add_by_bin", "_add_by_row")))
def test_both_ways_of_adding_equal_a_loop_over_pairs(seed: int, way: str, monkeypatch: pytest.MonkeyPatch):
    calls = [one_call(10 * seed + call) for call in range(2)]
    layer = LayerSums(SOURCES, EXPERTS, torch.device("cpu"))
    if way == "_add_by_row":  # what runs on a GPU, here on the CPU
        waiting = iter(calls)

        def by_row(key, *arguments):
            pairs, positions, _ = next(waiting)
            layer._add_by_row(pairs.order // TOP_K * EXPERTS + pairs.expert, *arguments, positions)

        monkeypatch.setattr(layer, "_add_by_bin", by_row)
    for call in calls:
        layer.add(*call)
    found, expected = layer.tensors(), looped(calls)
    for name, values in expected.items():
        assert torch.allclose(found[name].double(), values, rtol=1e-6 if name in MAXIMA else 1e-14), name
    assert not found["count"][2].any() and not found["count"][:, 6].any()


def test_an_infinite_size_of_padding_is_not_counted():
    pairs, positions, _ = one_call(5)
    token = pairs.order // TOP_K
    pairs.norm[~positions.valid[token]] = torch.inf
    layer = LayerSums(SOURCES, EXPERTS, torch.device("cpu"))
    valid, scored = positions.valid[token], positions.scored[token]
    terms, sizes = pairs.norm.double()[:, None].expand(-1, len(SUMS)), pairs.norm[:, None].expand(-1, 3)
    layer._add_by_row(token * EXPERTS + pairs.expert, terms, sizes, valid, scored, positions)
    assert all(values.isfinite().all() for values in layer.tensors().values())
