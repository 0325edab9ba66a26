"""Computes statistics of an observation and a selection for the report, the profile and comparisons.

Arrays are [L, E] unless said otherwise, L MoE layers in decoder order, E routed experts. A number that cannot be
computed (0/0, no dropped expert, no co-activation) is None, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from numpy import ndarray

from reapkit.core.formatting import exact_percent
from reapkit.observation.observation import Observation
from reapkit.recipe.schema import SaliencySpec
from reapkit.selection.saliency import saliency
from reapkit.selection.selection import Selection
from reapkit.selection.totals import Totals, add_sources, source_alphas, totals

SNAPSHOT_ROWS = ("1/16", "1/8", "1/4", "1/2")
TAIL_QUARTER = Fraction(3, 4)
DRIVERS = ("count", "gate_mean", "norm_mean", "norm_max")


# ---------------------------------------------------------------------------------------------- the cut


@dataclass(frozen=True)
class CutCurve:
    """What removing the k least salient experts of every layer deletes, for k = 0 … E.

    `traffic`: ΣN_D / ΣN, `mass`: Σ(gn)_D / Σ(gn), each over all layers; index k. `steepens_at`: the first ratio from
    which a further expert costs more than its even share of the mass, None if none does before the last.
    """

    traffic: tuple[float, ...]
    mass: tuple[float, ...]
    steepens_at: float | None


def cut_curve(summed: Totals, values: ndarray) -> CutCurve:
    """The trade-off over every ratio, from one observation; `values` float64 [L, E], its saliency."""
    order = removal_order(values)
    traffic, mass = _deleted(summed.count, order), _deleted(summed.gate_norm_sum, order)
    experts = values.shape[1]
    steep = next((k for k in range(experts - 1) if mass[k + 1] - mass[k] > 1 / experts), None)
    return CutCurve(traffic, mass, None if steep is None else steep / experts)


def removal_order(values: ndarray) -> ndarray:
    """Experts of each layer, least salient first, int64 [L, E]; of equals the higher index goes first.

    `values`: float64 [L, E], saliencies; -inf for experts never routed.
    """
    return np.argsort(-values, axis=1, kind="stable")[:, ::-1]


def _deleted(values: ndarray, order: ndarray) -> tuple[float, ...]:
    removed = np.take_along_axis(values, order, 1).cumsum(1).sum(0)
    total = float(values.sum())
    return (0.0, *(np.minimum(removed / total, 1.0).tolist() if total else [0.0] * values.shape[1]))


def dropped_mask(selection: Selection, experts: int) -> ndarray:
    """True where an expert is dropped, bool [L, E]."""
    mask = np.zeros((len(selection.layers), experts), bool)
    for row, layer in enumerate(selection.layers.values()):
        mask[row, list(layer.drop)] = True
    return mask


def share_deleted(values: ndarray, dropped: ndarray) -> float | None:
    """Σ over dropped / Σ over all, for N (traffic) or Σgn (saliency mass); None where the sum over all is 0.

    `values` float64 and `dropped` bool, both of any shape: [L, E], or [E] of one layer.
    """
    return _ratio(values[dropped].sum(), values.sum())


def floors(values: ndarray, dropped: ndarray) -> list[float | None]:
    """The highest saliency dropped in each layer; None where nothing, or only experts never routed, were dropped.

    `values`: float64 [L, E], saliencies; `dropped`: bool [L, E].
    """
    highest = np.where(dropped, values, -np.inf).max(1)
    return [None if value == -math.inf else value for value in highest.tolist()]


def tail_risks(gate_norm_max: ndarray, dropped: ndarray) -> list[float | None]:
    """Share of each layer's dropped experts whose largest gn lies in the top quarter over all layers: rare but large;
    None where a layer drops none.

    `gate_norm_max`: float32 [L, E]; `dropped`: bool [L, E].
    """
    ordered = np.sort(gate_norm_max, axis=None)
    limit = ordered[math.ceil(TAIL_QUARTER * len(ordered)) - 1]
    risky = (gate_norm_max > limit) & dropped
    return [_ratio(*pair) for pair in zip(risky.sum(1), dropped.sum(1), strict=True)]


def balance(count: ndarray) -> list[float | None]:
    """CV = std(N) / mean(N) of each layer, of `count` N float64 [L, E]: 0 where every expert is used equally. std over
    the population."""
    return [_ratio(*pair) for pair in zip(count.std(1), count.mean(1), strict=True)]


def redundancy_coverage(coactivation: ndarray | None, dropped: ndarray) -> list[float | None]:
    """Σ_{i∈D, j∉D} C_ij / Σ_{i∈D, j≠i} C_ij by layer: how much of what fires beside dropped experts survives.

    `coactivation` C: float64 [L, E, E], positions routed to both; None gives None everywhere. `dropped` D: bool [L, E].
    """
    if coactivation is None:
        return [None] * len(dropped)
    pairs = coactivation * (1 - np.eye(dropped.shape[1]))
    beside = (pairs * dropped[:, :, None]).sum((1, 2))
    survives = (pairs * dropped[:, :, None] * ~dropped[:, None, :]).sum((1, 2))
    return [_ratio(*pair) for pair in zip(survives, beside, strict=True)]


def chance_coverage(dropped: ndarray) -> list[float | None]:
    """kept / (E - 1) by layer: the coverage if co-activation were even. `dropped`: bool [L, E]."""
    experts = dropped.shape[1]
    return [kept / (experts - 1) if experts > 1 else None for kept in (~dropped).sum(1).tolist()]


# ---------------------------------------------------------------------------------------------- drivers and
# concentration


def drivers(summed: Totals, values: ndarray) -> dict[str, dict[str, float | None]]:
    """Pearson and Spearman correlation of saliency with N, Σg/N, Σn/N and max n, averaged over layers; N = 0 excluded.

    `values`: float64 [L, E], saliencies. Layers where either side is constant have no correlation and are left out of
    the average.
    """
    columns = {
        "count": summed.count,
        "gate_mean": summed.mean(summed.gate_sum),
        "norm_mean": summed.mean(summed.norm_sum),
        "norm_max": summed.norm_max,
    }
    routed = (summed.count > 0) & np.isfinite(values)
    found: dict[str, dict[str, float | None]] = {}
    for name in DRIVERS:
        rows = [(values[layer, mask], columns[name][layer, mask]) for layer, mask in enumerate(routed)]
        found[name] = {
            "pearson": _mean(pearson(*row) for row in rows),
            "spearman": _mean(spearman(*row) for row in rows),
        }
    return found


def pearson(a: ndarray, b: ndarray) -> float | None:
    """Pearson correlation of two vectors [n] of any dtype, in float64; None where one is constant or empty."""
    if not a.size:
        return None
    a, b = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (a, b))
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale > 0 else None


def spearman(a: ndarray, b: ndarray) -> float | None:
    """Pearson correlation of the ranks of two vectors [n] of any dtype, ties sharing their mean rank; None where one is
    constant or empty."""
    return pearson(_ranks(a), _ranks(b))


def _ranks(values: ndarray) -> ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def concentration(gate_norm_sum: ndarray) -> dict[int, list[float | None]]:
    """Share of Σgn, float64 [L, E], in each layer's top 4, 8, 16, … experts (below E), by layer."""
    ordered = np.sort(gate_norm_sum, axis=1)[:, ::-1]
    total = ordered.sum(1)
    sizes = [4 << i for i in range(20) if 4 << i < ordered.shape[1]]
    return {size: [_ratio(*pair) for pair in zip(ordered[:, :size].sum(1), total, strict=True)] for size in sizes}


# ---------------------------------------------------------------------------------------------- comparisons


def kept_overlap(one: Mapping[int, Sequence[int]], other: Mapping[int, Sequence[int]]) -> dict[int, float]:
    """|A ∩ B| / max(|A|, |B|) of the kept experts by layer both have: 1 only where they are equal."""
    return {
        layer: len(set(kept) & set(other[layer])) / max(len(kept), len(other[layer]))
        for layer, kept in one.items()
        if layer in other
    }


def rank_correlation(one: ndarray, other: ndarray) -> list[float | None]:
    """Spearman correlation of two saliencies, float64 [L, E], by layer; experts never routed (-inf) share the lowest
    rank."""
    return [spearman(a, b) for a, b in zip(one, other, strict=True)]


def convergence(
    observation: Observation, counts: Mapping[int, int], mix: Mapping[str, Decimal] | None = None
) -> list[dict[str, Any]]:
    """Overlap of REAP's kept sets after 1/16, 1/8, 1/4 and 1/2 of the rows with those after all, at `counts` kept per
    layer.

    Only Σgn / N can be followed: it is what snapshots hold. `chance` is the overlap expected of random sets.
    """
    alphas = source_alphas(observation, mix)
    final = _mean_reap(observation.statistics["count"], observation.statistics["gate_norm_sum"], alphas)
    whole = _kept_sets(final, observation.layers, counts)
    chance = sum(counts.values()) / (len(counts) * observation.num_experts)
    steps = []
    for step, rows in enumerate(SNAPSHOT_ROWS):
        early = _mean_reap(observation.snapshots["count"][step], observation.snapshots["gate_norm_sum"][step], alphas)
        seen = bool(np.isfinite(early).any())  # few rows: the first group may be larger than a sixteenth of them
        by_layer = kept_overlap(_kept_sets(early, observation.layers, counts), whole) if seen else {}
        steps.append(
            {
                "rows": rows,
                "overlap": _mean(by_layer.values()),
                "chance": chance,
                "rank_correlation": _mean(rank_correlation(early, final)) if seen else None,
                "by_layer": by_layer,
            }
        )
    return steps


def first_half(
    observation: Observation, counts: Mapping[int, int], mix: Mapping[str, Decimal] | None = None
) -> dict[str, Any] | None:
    """Had only the first half of the rows been read: `overlap` (mean) of reap's kept sets with those of all rows,
    `lowest` and its `layer`.

    None without snapshots, as of an observation made by another tool, and where the first half scored nothing.
    """
    if any(name not in observation.snapshots for name in ("count", "gate_norm_sum")):
        return None
    half = convergence(observation, counts, mix)[-1]
    if not half["by_layer"]:
        return None
    layer = min(half["by_layer"], key=half["by_layer"].__getitem__)
    return {"overlap": half["overlap"], "lowest": half["by_layer"][layer], "layer": layer, "chance": half["chance"]}


def first_half_sentence(half: Mapping[str, Any]) -> str:
    """`the first half of the rows would have kept 97.3 % of the same experts (lowest: layer 12, 91.0 %; random sets: 50
    %)`."""
    return (
        f"the first half of the rows would have kept {exact_percent(half['overlap'])} of the same experts (lowest:"
        f" layer {half['layer']}, {exact_percent(half['lowest'])}; random sets: {exact_percent(half['chance'], 0)})"
    )


def _mean_reap(count: ndarray, gate_norm_sum: ndarray, alphas: Sequence[Fraction]) -> ndarray:
    n = add_sources(count, alphas)
    return np.divide(add_sources(gate_norm_sum, alphas), n, out=np.full_like(n, -np.inf), where=n > 0)


def _kept_sets(values: ndarray, layers: Sequence[int], counts: Mapping[int, int]) -> dict[int, list[int]]:
    order = np.argsort(-values, axis=1, kind="stable").tolist()
    return {layer: row[: counts[layer]] for layer, row in zip(layers, order, strict=True)}


def specialisation(observation: Observation) -> ndarray:
    """How much more often source s uses an expert than the average source does, as shares: float64 [L, S, E], sums to 1
    over s.

    The rate is N_s / T_s, so that large sources do not look special; an expert never routed has equal shares.
    """
    tokens = np.maximum(observation.scored_tokens, 1)[None, :, None]
    rate = observation.statistics["count"] / tokens
    whole = rate.sum(1, keepdims=True)
    return np.divide(rate, whole, out=np.full_like(rate, 1 / len(observation.sources)), where=whole > 0)


def mix_without(observation: Observation, source: str, mix: Mapping[str, Decimal] | None = None) -> dict[str, Decimal]:
    """The mix that leaves `source` out and keeps the others' proportions: what a calibration without it would have
    been."""
    counts = zip(observation.sources, observation.scored_tokens.tolist(), strict=True)
    given = mix or {name: Decimal(count) for name, count in counts}
    return {name: weight for name, weight in given.items() if name != source}


def source_influence(
    observation: Observation, spec: SaliencySpec, kept: Mapping[int, Sequence[int]]
) -> dict[str, dict[str, Any]]:
    """What leaving each source out of the mix would prune, at the counts of `kept` and without regard to protection.

    By source: `overlap` with `kept` (mean over layers), `would_drop`: layer -> experts of `kept` that only this source
    keeps. Sources without weight, or alone in the mix, are left out.
    """
    shares = zip(
        observation.sources, source_alphas(observation, spec.mix), observation.scored_tokens.tolist(), strict=True
    )
    weighed = [name for name, alpha, tokens in shares if alpha and tokens]
    counts = {layer: len(experts) for layer, experts in kept.items()}
    found = {}
    for name in weighed if len(weighed) > 1 else ():
        without = saliency(observation, spec.model_copy(update={"mix": mix_without(observation, name, spec.mix)}))
        others = _kept_sets(without, observation.layers, counts)
        found[name] = {
            "overlap": _mean(kept_overlap(kept, others).values()),
            "would_drop": {layer: sorted(set(experts) - set(others[layer])) for layer, experts in kept.items()},
        }
    return found


# ---------------------------------------------------------------------------------------------- all of it


def report_metrics(observation: Observation, selection: Selection) -> dict[str, Any]:
    """Every number of the report about one selection, as plain data: totals, and lists by layer in the order of
    `layers`.

    A selection made elsewhere may carry no saliency: then floor and drivers are None.
    """
    mix = selection.details.get("mix")
    weights = None if mix is None else {name: Decimal(weight) for name, weight in mix.items()}
    summed = totals(observation, weights)
    unknown = (-math.inf,) * observation.num_experts
    values = np.array([layer.saliency or unknown for layer in selection.layers.values()], np.float64)
    dropped = dropped_mask(selection, observation.num_experts)
    together = observation.coactivation
    coactivation = None if together is None else add_sources(together, source_alphas(observation, weights))
    risky = tail_risks(summed.gate_norm_max, dropped)
    sizes = dropped.sum(1).tolist()
    kept = {layer: len(chosen.keep) for layer, chosen in selection.layers.items()}
    return {
        "layers": list(kept),
        "kept": list(kept.values()),
        "traffic_deleted": share_deleted(summed.count, dropped),
        "saliency_mass_deleted": share_deleted(summed.gate_norm_sum, dropped),
        "traffic_deleted_by_layer": [share_deleted(*row) for row in zip(summed.count, dropped, strict=True)],
        "saliency_mass_deleted_by_layer": [
            share_deleted(*row) for row in zip(summed.gate_norm_sum, dropped, strict=True)
        ],
        "floor": floors(values, dropped),
        "tail_risk": risky,
        "tail_risk_all": _ratio(sum(risk * size for risk, size in zip(risky, sizes, strict=True) if size), sum(sizes)),
        "balance_cv": balance(summed.count),
        "redundancy_coverage": redundancy_coverage(coactivation, dropped),
        "redundancy_chance": chance_coverage(dropped),
        "drivers": drivers(summed, values),
        "concentration": {str(size): shares for size, shares in concentration(summed.gate_norm_sum).items()},
        "convergence": convergence(observation, kept, weights),
    }


def _ratio(part: ndarray | float, whole: ndarray | float) -> float | None:
    return float(part) / float(whole) if float(whole) else None


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
