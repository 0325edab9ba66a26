"""Describes how similar decisions are, layer by layer, in words, tables and charts. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from reapkit.core.errors import UnusableError
from reapkit.core.formatting import decimal, exact_percent, narrow_percent
from reapkit.report.blocks import Chart, Folded, PageTable
from reapkit.report.charts import Trace, axis, line, reference
from reapkit.report.inspection.render import Block, table

SETTLED, UNSETTLED = 0.97, 0.9  # shares of the kept set, as in the report's section on convergence

Kept = Mapping[int, Sequence[int]]


def pairs(letters: Iterable[str]) -> list[tuple[str, str]]:
    """Every two of them, in order."""
    return list(combinations(letters, 2))


def overlap(one: Kept, other: Kept, experts: int) -> dict[str, Any]:
    """Kept sets of the same layers: by layer `kept` (both counts), `share` |A∩B| / max(|A|,|B|), `jaccard`
    |A∩B| / |A∪B|.

    Over the layers mean, min and the layer of the min of both; `contained`: mean of |A∩B| / min(|A|,|B|), 1 where the
    smaller sets lie in the larger; `chance`: the mean share of random sets, min(a,b)/E.
    """
    layers = {}
    for layer, kept in one.items():
        a, b = set(kept), set(other[layer])
        layers[str(layer)] = {
            "kept": [len(a), len(b)],
            "share": len(a & b) / max(len(a), len(b)),
            "jaccard": len(a & b) / len(a | b),
        }
    chance = [min(found["kept"]) / experts for found in layers.values()]
    contained = [found["share"] * max(found["kept"]) / min(found["kept"]) for found in layers.values()]
    return {
        "layers": layers,
        "chance": sum(chance) / len(chance),
        "contained": sum(contained) / len(contained),
        **{name: summary({layer: found[name] for layer, found in layers.items()}) for name in ("share", "jaccard")},
    }


def summary(by_layer: Mapping[str, float | None]) -> dict[str, Any]:
    """Mean, min and where the min is, of the layers that have a number."""
    known = {layer: value for layer, value in by_layer.items() if value is not None}
    if not known:
        return {"mean": None, "min": None, "layer": None}
    lowest = min(known, key=known.__getitem__)
    return {"mean": sum(known.values()) / len(known), "min": known[lowest], "layer": lowest}


def same_layers(layers: Mapping[str, Mapping[int, int]], what: str) -> None:
    """Raises UnusableError where the things do not have the same layers with the same numbers of experts."""
    (first, expected), *others = layers.items()
    for letter, found in others:
        if found.keys() != expected.keys():
            raise UnusableError(
                f"compare: {what} {first} has {len(expected)} MoE layers, {letter} has {len(found)}, or others. "
                f"Give {what}s of one model, made with the same prune.mtp."
            )
        if differing := [layer for layer in expected if expected[layer] != found[layer]]:
            layer = differing[0]
            raise UnusableError(
                f"compare: layer {layer} has {expected[layer]} experts in {what} {first} and {found[layer]} in"
                f" {letter}. Give {what}s of one model."
            )


def agreement(pair: Mapping[str, Any]) -> str:
    """`97.3 % of the kept experts are the same (lowest: layer 12, 91.0 %; random sets: 50 %)`."""
    share = pair["share"]
    within = (
        ""
        if all(len(set(one["kept"])) == 1 for one in pair["layers"].values())
        else (f"; of the smaller kept sets {exact_percent(pair['contained'])} lie in the larger")
    )
    if share["min"] == 1:
        return f"All kept experts are the same (random sets: {exact_percent(pair['chance'], 0)})"
    return (
        f"{exact_percent(share['mean'])} of the kept experts are the same (lowest: layer {share['layer']},"
        f" {exact_percent(share['min'])}; random sets: {exact_percent(pair['chance'], 0)}){within}"
    )


def pairs_table(found: Mapping[str, Any], *, ranked: bool) -> Block:
    """A line per pair: mean and lowest share, mean Jaccard and, where saliencies were compared, rank correlation."""
    rows = [
        (
            name,
            narrow_percent(pair["share"]["mean"]),
            narrow_percent(pair["share"]["min"]),
            pair["share"]["layer"],
            narrow_percent(pair["jaccard"]["mean"]),
            *((decimal(pair["rank_correlation"]["mean"]), decimal(pair["rank_correlation"]["min"])) if ranked else ()),
        )
        for name, pair in found.items()
    ]
    columns = ("pair", "same kept", "lowest", "in layer", "Jaccard", *(("rank corr.", "lowest") if ranked else ()))
    return table("Kept experts in common, mean over the layers", columns, rows)


def layers_table(found: Mapping[str, Any], *, ranked: bool) -> Block:
    """Layer by layer: of one pair everything, of several the share that each has in common with the first."""
    if len(found) == 1:
        (pair,) = found.values()
        rows = [
            (
                layer,
                "/".join(str(count) for count in dict.fromkeys(one["kept"])),
                narrow_percent(one["share"]),
                narrow_percent(one["jaccard"]),
                *((decimal(one["rank_correlation"]),) if ranked else ()),
            )
            for layer, one in pair["layers"].items()
        ]
        columns = ("layer", "kept", "same", "Jaccard", *(("rank corr.",) if ranked else ()))
        return table("Layer by layer", columns, rows)
    shown = dict(list(found.items())[:8])  # what 80 columns hold
    layers = next(iter(shown.values()))["layers"]
    rows = [(layer, *(narrow_percent(pair["layers"][layer]["share"]) for pair in shown.values())) for layer in layers]
    title = "Same kept experts, layer by layer" + (
        f" (first {len(shown)} of {len(found)} pairs)" if len(found) > len(shown) else ""
    )
    return table(title, ("layer", *shown), rows)


# ---------------------------------------------------------------------------------------------- the page


def overlap_chart(found: Mapping[str, Any], sentence: str) -> Chart:
    """Share of the kept set in common, over the layers."""
    layers = list(next(iter(found.values()))["layers"])
    data = [
        line(layers, [one["share"] for one in pair["layers"].values()], name, _color(index), "layer %{x}: %{y:.1%}")
        for index, (name, pair) in enumerate(found.items())
    ]
    chance = min(pair["chance"] for pair in found.values())
    lowest = min(chance, *(pair["share"]["min"] for pair in found.values()))
    layout = {
        "xaxis": axis("layer", type="category", nticks=16),
        "yaxis": axis("kept experts in common", ".0%", range=[0.95 * lowest, 1.02]),
    }
    return Chart(
        "overlap",
        "Kept experts in common",
        sentence,
        [*data, reference(layers, [chance] * len(layers), "random sets")],
        layout,
    )


def rank_chart(found: Mapping[str, Any]) -> Chart:
    """Rank correlation of the saliencies, over the layers."""
    layers = list(next(iter(found.values()))["layers"])
    data: list[Trace] = [
        line(
            layers,
            [one["rank_correlation"] for one in pair["layers"].values()],
            name,
            _color(index),
            "layer %{x}: %{y:.3f}",
        )
        for index, (name, pair) in enumerate(found.items())
    ]
    lowest = {
        name: pair["rank_correlation"] for name, pair in found.items() if pair["rank_correlation"]["min"] is not None
    }
    if lowest:
        name = min(lowest, key=lambda each: lowest[each]["min"])
        sentence = (
            f"Spearman correlation of all experts' saliency, kept or not. Least alike: {name} in layer"
            f" {lowest[name]['layer']} with {lowest[name]['min']:.3f}; one means the same order."
        )
    else:
        sentence = "No layer has a rank correlation: saliency is constant."
    least = min((each["min"] for each in lowest.values()), default=1.0)
    layout = {
        "xaxis": axis("layer", type="category", nticks=16),
        "yaxis": axis("rank correlation", ".2f", range=[min(0.9, least - 0.05), 1.01]),
    }
    return Chart("ranks", "Order of the experts", sentence, data, layout)


def overlap_numbers(found: Mapping[str, Any], *, ranked: bool) -> list[Folded]:
    """Every number of every pair, behind a line."""
    columns = [
        ("layer", "right"),
        ("kept", "right"),
        ("same", "right"),
        ("Jaccard", "right"),
        *((("rank correlation", "right"),) if ranked else ()),
    ]
    return [
        Folded(
            f"{name}, layer by layer",
            [
                PageTable(
                    columns,
                    [
                        (
                            layer,
                            " / ".join(map(str, one["kept"])),
                            exact_percent(one["share"]),
                            exact_percent(one["jaccard"]),
                            *((decimal(one["rank_correlation"]),) if ranked else ()),
                        )
                        for layer, one in pair["layers"].items()
                    ],
                )
            ],
        )
        for name, pair in found.items()
    ]


def _color(index: int) -> str:
    return f"--c{index % 8 + 1}"
