"""Computes EAFT-REAP: sorts positions into regions by probability and entropy, and weighs experts by region.

Signals at position t, which predicts the reference token: p = its probability, H = normalised entropy over the top
logits. The experts routed to at t made that prediction, so the region of t weighs their contribution g·n (after EAFT,
arXiv 2601.02151).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, cast

import numpy as np
from numpy import ndarray

from reapkit.core.errors import UnusableError
from reapkit.observation.eaft_table import H_CELLS, P_CELLS, EaftTable, border, cell_bounds
from reapkit.observation.materials import EAFT_SIGNALS
from reapkit.observation.observation import Observation, Trace
from reapkit.recipe.schema import EaftSpec

REGIONS = ("conflict", "uncertain", "good", "other")
CONFLICT, UNCERTAIN, GOOD, OTHER = range(4)
CHUNK_POSITIONS = 1 << 19  # bounds the index arrays at about 100 MB, whatever the trace's length


@dataclass(frozen=True)
class RegionBorders:
    """Region borders, float32 values; `p_high` and `h_mid` only with a stricter good region. NaN: no position."""

    p_low: float
    h_low: float
    h_high: float
    p_high: float | None = None
    h_mid: float | None = None


@dataclass(frozen=True, eq=False)
class Regions:
    """An observation's EAFT sums by region, from which any weights follow.

    `thresholds`: one per source (equal ones if pooled). `realised`: the quantiles that a table could cut at, by name,
    one set per source; None of an exact trace. `positions`: int64 [S, R]. `count`, `gate_norm_sum`: float64 [L, S, R,
    E], N and Σgn over the positions of that region routed to the expert; regions in the order of REGIONS.
    """

    spec: EaftSpec
    thresholds: tuple[RegionBorders, ...]
    positions: ndarray
    count: ndarray
    gate_norm_sum: ndarray
    realised: tuple[Mapping[str, float], ...] | None = None

    def sums(self, alphas: Sequence[Fraction], weights: Sequence[float]) -> ndarray:
        """Σ w·g·n by expert, float64 [L, E]: regions weighed by `weights`, sources by α."""
        by_region = cast(ndarray, sum(weight * self.gate_norm_sum[:, :, i] for i, weight in enumerate(weights)))
        return cast(ndarray, sum(float(alpha) * by_region[:, source] for source, alpha in enumerate(alphas)))

    def counts(self, alphas: Sequence[Fraction]) -> ndarray:
        """N over the positions with a signal, float64 [L, E], sources weighed by α."""
        by_source = self.count.sum(2)
        return cast(ndarray, sum(float(alpha) * by_source[:, source] for source, alpha in enumerate(alphas)))

    def good_mass(self, alphas: Sequence[Fraction]) -> ndarray:
        """Σgn over good positions, float64 [L, E]: what `core_per_layer` ranks by."""
        return self.sums(alphas, [float(region == GOOD) for region in range(len(REGIONS))])


def region_weights(spec: EaftSpec) -> tuple[float, ...]:
    """The weight of each region, in the order of REGIONS."""
    other = spec.weights.good if spec.good == "rest" else spec.good.other_weight
    return (spec.weights.conflict, spec.weights.uncertain, spec.weights.good, other)


def weights_without_conflict(spec: EaftSpec) -> tuple[float, ...]:
    """The weights if there were no conflict region: its positions weigh what the rest weighs."""
    weights = region_weights(spec)
    return (weights[OTHER], *weights[1:])


def material_of(observation: Observation) -> Trace | EaftTable:
    """The observation's EAFT material. Raises UnusableError where none was collected or it holds numbers that are not
    finite."""
    trace = EAFT_SIGNALS.of(observation, "prune.protect.core_per_layer")
    if isinstance(trace, EaftTable):
        return trace
    bad = int((~(np.isfinite(trace.p) & np.isfinite(trace.h))).sum())
    if bad:
        raise UnusableError(
            f"the EAFT signals of {bad} of {len(trace)} positions are not finite: the logits overflowed. "
            "Observe in bfloat16 or float32."
        )
    return trace


def measure_regions(observation: Observation, spec: EaftSpec, alphas: Sequence[Fraction]) -> Regions:
    """Sorts every position of the trace into its region and sums N and Σgn by layer, source, region and expert, in
    float64.

    `alphas` weigh the sources in pooled quantiles. Raises UnusableError without usable material, or where a table
    cannot be cut at the quantiles.
    """
    trace = material_of(observation)
    if isinstance(trace, EaftTable):
        return _regions_of_table(trace, spec, alphas)
    sources, experts = len(observation.sources), observation.num_experts
    source = trace.source.astype(np.int64)
    thresholds = source_thresholds(trace, sources, spec, alphas)
    region = np.full(len(trace), OTHER)
    for index, borders in enumerate(thresholds):
        mine = source == index
        region[mine] = region_of(trace.p[mine], trace.h[mine], borders)
    group = source * len(REGIONS) + region
    positions = np.bincount(group, minlength=sources * len(REGIONS)).reshape(sources, len(REGIONS))
    shape = (sources, len(REGIONS), experts)
    counts, masses = zip(
        *(_layer_sums(*trace.routed(layer), group, shape) for layer in observation.layers), strict=True
    )
    return Regions(spec, thresholds, positions, np.stack(counts), np.stack(masses))


def region_positions(observation: Observation, spec: EaftSpec, alphas: Sequence[Fraction]) -> Regions:
    """As `measure_regions`, without the sums: the layers' part of a trace, gigabytes of a large one, is not read."""
    trace = material_of(observation)
    if isinstance(trace, EaftTable):
        return _regions_of_table(trace, spec, alphas)
    thresholds = source_thresholds(trace, len(observation.sources), spec, alphas)
    positions = np.zeros((len(observation.sources), len(REGIONS)), np.int64)
    for source, borders in enumerate(thresholds):
        mine = trace.source == source
        positions[source] = np.bincount(region_of(trace.p[mine], trace.h[mine], borders), minlength=len(REGIONS))
    return Regions(spec, thresholds, positions, np.empty(0), np.empty(0))


def _regions_of_table(table: EaftTable, spec: EaftSpec, alphas: Sequence[Fraction]) -> Regions:
    sources = range(len(table.positions))
    if spec.thresholds == "pooled":
        cuts = [_table_borders(table, list(sources), alphas, spec)] * len(sources)
    else:
        cuts = [_table_borders(table, [source], (Fraction(1),), spec) for source in sources]
    positions = np.zeros((len(sources), len(REGIONS)), np.int64)
    shape = (table.count.shape[0], len(sources), len(REGIONS), table.count.shape[-1])
    count, mass = np.zeros(shape), np.zeros(shape)
    for source, (borders, _) in enumerate(cuts):
        (p_from, p_to), (h_from, h_to) = cell_bounds(table.p_edges[source]), cell_bounds(table.h_edges[source])
        p_from, p_to = p_from[:, None], p_to[:, None]
        region = region_of(p_to, h_to, borders, p_from=p_from, h_from=h_from).ravel()
        np.add.at(positions[source], region, table.positions[source].ravel())
        for number in range(len(REGIONS)):
            cells = (region == number).reshape(P_CELLS, H_CELLS)
            count[:, source, number] = table.count[:, source, cells].sum(1)
            mass[:, source, number] = table.gate_norm_sum[:, source, cells].sum(1)
    return Regions(
        spec, tuple(borders for borders, _ in cuts), positions, count, mass, tuple(realised for _, realised in cuts)
    )


def _table_borders(
    table: EaftTable, sources: list[int], alphas: Sequence[Fraction], spec: EaftSpec
) -> tuple[RegionBorders, dict[str, float]]:
    by_p = (table.p_edges[sources], table.positions[sources].sum(2))
    by_h = (table.h_edges[sources], table.positions[sources].sum(1))
    quantiles, good = spec.quantiles, spec.good
    found = {
        "p_low": border(*by_p, alphas, quantiles.p_low, "quantiles.p_low"),
        "h_low": border(*by_h, alphas, quantiles.h_low, "quantiles.h_low"),
        "h_high": border(*by_h, alphas, quantiles.h_high, "quantiles.h_high", upward=True),
    }
    if good != "rest":
        found |= {
            "p_high": border(*by_p, alphas, good.p_high, "good.p_high", upward=True),
            "h_mid": border(*by_h, alphas, good.h_mid, "good.h_mid"),
        }
    return RegionBorders(**{name: each.value for name, each in found.items()}), {
        name: each.realised for name, each in found.items()
    }


def _layer_sums(
    expert: ndarray, gate_norm: ndarray, group: ndarray, shape: tuple[int, int, int]
) -> tuple[ndarray, ndarray]:
    """N and Σgn [S, R, E] of one layer; `expert` (-1: none), `gate_norm`: [T, top_k], `group`: [T] = source and region
    together."""
    cells = math.prod(shape)
    count, mass = np.zeros(cells + 1), np.zeros(cells + 1)  # the last of what is none
    for begin in range(0, len(group), CHUNK_POSITIONS):
        part = slice(begin, begin + CHUNK_POSITIONS)
        cell = np.where(expert[part] < 0, cells, group[part, None] * shape[2] + expert[part]).ravel()
        count += np.bincount(cell, minlength=cells + 1)
        mass += np.bincount(cell, weights=gate_norm[part].ravel(), minlength=cells + 1)
    return count[:-1].reshape(shape), mass[:-1].reshape(shape)


def region_of(
    p: ndarray, h: ndarray, borders: RegionBorders, *, p_from: ndarray | None = None, h_from: ndarray | None = None
) -> ndarray:
    """The region of each position, int64 [n], an index into REGIONS: conflict first, then uncertain, then good, then
    other.

    `p`: float32 [n], probability of the reference token; `h`: float32 [n], entropy / ln k. Of cells of a table: `p`
    float32 [P, 1] and `h` [H] are the greatest values they can hold, `p_from` [P, 1] and `h_from` [H] the least; the
    result is [P, H].
    """
    p_from, h_from = p if p_from is None else p_from, h if h_from is None else h_from
    wrong = p <= borders.p_low
    good = np.ones_like(wrong) if borders.p_high is None else (p_from >= borders.p_high) & (h <= borders.h_mid)
    region = np.where(good, GOOD, OTHER)
    region = np.where(wrong & (h_from >= borders.h_high), UNCERTAIN, region)
    return np.where(wrong & (h <= borders.h_low), CONFLICT, region)


def source_thresholds(
    trace: Trace, sources: int, spec: EaftSpec, alphas: Sequence[Fraction]
) -> tuple[RegionBorders, ...]:
    """Region borders for each source: over all positions, weighed by α (pooled), or over the source's own
    (per-source)."""
    split = [trace.source == source for source in range(sources)]
    p = [np.sort(trace.p[mine]) for mine in split]
    h = [np.sort(trace.h[mine]) for mine in split]
    if spec.thresholds == "pooled":
        return (_borders(p, h, alphas, spec),) * sources
    return tuple(_borders([p[source]], [h[source]], (Fraction(1),), spec) for source in range(sources))


def _borders(p: list[ndarray], h: list[ndarray], alphas: Sequence[Fraction], spec: EaftSpec) -> RegionBorders:
    quantiles, good = spec.quantiles, spec.good
    strict = (
        {} if good == "rest" else {"p_high": quantile(p, alphas, good.p_high), "h_mid": quantile(h, alphas, good.h_mid)}
    )
    return RegionBorders(
        p_low=quantile(p, alphas, quantiles.p_low),
        h_low=quantile(h, alphas, quantiles.h_low),
        h_high=quantile(h, alphas, quantiles.h_high),
        **strict,
    )


def quantile(values: Sequence[ndarray], alphas: Sequence[Fraction], level: Decimal) -> float:
    """The least value v with Σ_s α_s·|{x ≤ v}| ≥ level·Σ_s α_s·n_s; with equal α the ⌈level·n⌉-th smallest, no
    interpolation.

    `values`: float32 [n_s] of each source, ascending. Exact: counts are integers and α, level fractions. A level of 0
    gives the smallest value; no position at all gives NaN.
    """
    weighed = [(ordered, alpha) for ordered, alpha in zip(values, alphas, strict=True) if alpha and len(ordered)]
    if not weighed:
        return math.nan
    pooled = weighed[0][0] if len(weighed) == 1 else np.sort(np.concatenate([ordered for ordered, _ in weighed]))
    needed = Fraction(level) * sum(alpha * len(ordered) for ordered, alpha in weighed)
    low, high = 0, len(pooled) - 1
    while low < high:
        middle = (low + high) // 2
        reached = sum(alpha * int(np.searchsorted(ordered, pooled[middle], side="right")) for ordered, alpha in weighed)
        low, high = (low, middle) if reached >= needed else (middle + 1, high)
    return float(pooled[low])


def summarise(regions: Regions, sources: Sequence[str], alphas: Sequence[Fraction]) -> dict[str, Any]:
    """Thresholds, weights and region shares, by source and of the whole mix weighed by α, as plain data."""
    spec = regions.spec
    positions = regions.positions.tolist()
    pooled = spec.thresholds == "pooled"
    named = [("pooled", regions.thresholds[0])] if pooled else list(zip(sources, regions.thresholds, strict=True))
    shares = {name: _shares(row) for name, row in zip(sources, positions, strict=True)}
    whole = [
        sum(alpha * row[region] for row, alpha in zip(positions, alphas, strict=True)) for region in range(len(REGIONS))
    ]
    realised = regions.realised and dict(zip([name for name, _ in named], regions.realised, strict=False))
    return {
        "thresholds": {name: _finite(borders) for name, borders in named},
        "realised": realised,
        "weights": dict(zip(REGIONS, region_weights(spec), strict=True)),
        "positions": {name: dict(zip(REGIONS, row, strict=True)) for name, row in zip(sources, positions, strict=True)},
        "shares": {"all": _shares(whole), **shares},
    }


def _shares(positions: Sequence[Fraction | int]) -> dict[str, float]:
    total = sum(positions)
    return {name: float(count / total) if total else 0.0 for name, count in zip(REGIONS, positions, strict=True)}


def _finite(borders: RegionBorders) -> dict[str, float | None]:
    return {name: None if value is None or math.isnan(value) else value for name, value in vars(borders).items()}
