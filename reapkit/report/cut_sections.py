"""The sections that follow the page's slider: which experts a cut removes, why, and where."""

from __future__ import annotations

from typing import Any

from reapkit.core.formatting import known_extreme, mean, number, percent
from reapkit.report.blocks import Chart, Grid, PageSection, Slider
from reapkit.report.charts import axis, bars, grid, layer_axis, line, reference, rows, shade
from reapkit.report.positions import distribution_sentence
from reapkit.report.view import View, decided_label
from reapkit.selection import statistics

DRIVER_NAMES = {
    "count": "frequency of use",
    "gate_mean": "gate weight",
    "norm_mean": "output magnitude",
    "norm_max": "largest output",
}
DRIVER_SYMBOLS = {"count": "N", "gate_mean": "Σg/N", "norm_mean": "Σn/N", "norm_max": "max n"}
CONCENTRATION_COLORS = ("--c1", "--c3", "--c4", "--c5", "--c6")


def cut_sections(view: View) -> list[PageSection]:
    """All of them, in the order of the page."""
    return [cut(view), heat_map(view), drivers(view), geography(view), distributions(view)]


def slider(view: View) -> Slider:
    """The control that the charts of these sections obey."""
    decided = "As decided" if view.selection is not None else ""
    return Slider("Experts removed per layer", view.experts, round(view.removed_share * view.experts), decided)


# ---------------------------------------------------------------------------------------------- the cut


def cut(view: View) -> PageSection:
    """Traffic and saliency mass removed, over every ratio."""
    curve = statistics.cut_curve(view.summed, view.saliency)
    traffic = statistics.share_deleted(view.summed.count, view.dropped)
    mass = statistics.share_deleted(view.summed.gate_norm_sum, view.dropped)
    sentence = (
        f"With {view.cut}, {percent(traffic)} of the routed traffic and {percent(mass)} of the saliency mass are"
        f" removed; random pruning would remove {percent(view.removed_share, 0)} of each. {_steepens(curve)}"
    )
    at = [k / view.experts for k in range(view.experts + 1)]
    hover = "%{y:.1%} removed at %{x:.1%}"
    data = [
        line(at, curve.traffic, "routed traffic", "--neutral", hover, markers=False),
        line(at, curve.mass, "saliency mass", "--drop", hover, markers=False),
        reference([0, 1], [0, 1], "random"),
    ]
    layout = {"xaxis": axis("experts removed", ".0%", range=[0, 1]), "yaxis": axis("removed", ".0%", range=[0, 1.02])}
    lead = (
        "This one observation allows any pruning ratio. Move the slider to change the cut; the heat map, the layer"
        " charts and the distributions follow."
    )
    if view.selection is not None:
        lead += f" The slider starts at the recipe's decision: {decided_label(view).removesuffix(', as decided')}."
    chart = Chart("cut-curve", "What a cut removes", sentence, data, layout, 360, "cut")
    return PageSection("cut", "The cut trade-off", [chart], lead, "Cut", True)


def _steepens(curve: statistics.CutCurve) -> str:
    if curve.steepens_at is None:
        return "No step of the saliency curve costs more than an even share."
    return (
        f"The saliency curve becomes steeper past {percent(curve.steepens_at, 0)}: each further expert costs more than"
        " an even share. This is a cheap forecast of where quality drops."
    )


# ---------------------------------------------------------------------------------------------- heat map


def heat_map(view: View) -> PageSection:
    """Layers by experts, dropped ones in another colour."""
    lost = [statistics.share_deleted(*pair) for pair in zip(view.summed.gate_norm_sum, view.dropped, strict=True)]
    most, least = known_extreme(lost, view.layers), known_extreme(lost, view.layers, largest=False)
    sentence = (
        "Blue experts stay, orange experts are removed. Darker (in the dark theme: brighter) means more salient than"
        " the layer's median."
    )
    if most and least:
        sentence += (
            f" With {view.cut}, layer {least[0]} loses least ({percent(least[1])} of its saliency mass) and layer"
            f" {most[0]} loses most ({percent(most[1])})."
        )
    data = [
        grid(view.layers, zmin=-1, zmax=1, showlegend=False, colorscale=shade(f"--{name}-low", f"--{name}-high"))
        for name in ("keep", "drop")
    ]
    choices = [
        ("order", "Order", [("index", "expert number"), ("saliency", "saliency")]),
        ("value", "Colour", [("saliency", "saliency"), ("traffic", "traffic")]),
    ]
    chart = Chart(
        "heat",
        "Layers by experts",
        sentence,
        data,
        {**grid_layout(), "showlegend": True},
        grid_height(view) + 20,
        "heat",
        choices,
    )
    return PageSection("experts", "Every expert, kept or dropped", [chart], "", "Experts", True)


def grid_layout() -> dict[str, Any]:
    """Layers downwards, experts to the right."""
    return {
        "xaxis": axis("expert", showgrid=False, zeroline=False),
        "yaxis": axis("layer", autorange="reversed", showgrid=False, zeroline=False),
    }


def grid_height(view: View) -> int:
    """Pixels for a row per layer, within reason."""
    return min(900, max(220, 14 * len(view.layers) + 90))


# ---------------------------------------------------------------------------------------------- drivers


def drivers(view: View) -> PageSection:
    """Correlation with each candidate driver, and how few experts hold how much."""
    found = statistics.drivers(view.summed, view.saliency)
    names = [f"{DRIVER_NAMES[name]}<br>{DRIVER_SYMBOLS[name]}" for name in found]
    data = [
        rows(
            names,
            [found[name][kind] for name in found],
            color,
            name=kind.capitalize(),
            hovertemplate=f"%{{x:.3f}}<extra>{kind.capitalize()}</extra>",
        )
        for kind, color in (("spearman", "--neutral"), ("pearson", "--accent"))
    ]
    least = min((value for kinds in found.values() for value in kinds.values() if value is not None), default=0)
    layout = {
        "xaxis": axis("correlation with saliency", range=[0 if least > -0.05 else -1, 1]),
        "yaxis": {"showgrid": False},
        "legend": {"traceorder": "reversed"},
    }
    title = "Correlation with each candidate driver, mean over layers"
    blocks = [Chart("drivers", title, _driver_sentence(found), data, layout, 290), *_concentration(view)]
    return PageSection(
        "drivers",
        "What drives saliency",
        blocks,
        f"Saliency here is {view.formula} ({view.criterion}).",
        "Drivers",
        True,
    )


def _driver_sentence(found: dict[str, dict[str, float | None]]) -> str:
    pearson = {name: kinds["pearson"] for name, kinds in found.items()}
    best = known_extreme([None if r is None else abs(r) for r in pearson.values()], list(pearson))
    if best is None:
        return "No layer has experts that differ (0 of them), so there is nothing to correlate."
    name, use, strength = best[0], pearson["count"], pearson[best[0]]
    if name == "count":
        return (
            f"Saliency correlates most with how often an expert is used (r = {strength:.2f}): the cut removes rarely"
            " routed experts."
        )
    text = f"Saliency correlates most with {DRIVER_NAMES[name]} (r = {strength:.2f})"
    if use is None:
        return f"{text}."
    if abs(use) < 0.3:
        return (
            f"{text} and hardly with the frequency of use (r = {use:.2f}): the cut removes experts with small outputs,"
            " not rarely routed ones."
        )
    return f"{text}; the frequency of use counts less (r = {use:.2f})."


def _concentration(view: View) -> list[Chart]:
    tops = statistics.concentration(view.summed.gate_norm_sum)
    shown = list(tops)[: len(CONCENTRATION_COLORS)]
    if not shown:
        return []
    data = [
        line(view.layers, tops[size], f"top {size}", color, "layer %{x}: %{y:.1%}", width=2)
        for size, color in zip(shown, CONCENTRATION_COLORS, strict=False)
    ]
    size = shown[min(1, len(shown) - 1)]
    most = known_extreme(tops[size], view.layers)
    sentence = (
        f"The top {size} of {view.experts} experts hold {percent(mean(tops[size]), 0)} of Σgn on average; an even layer"
        f" would have {percent(size / view.experts, 0)}."
    )
    sentence += f" Layer {most[0]} is the most concentrated, with {percent(most[1], 0)}." if most else ""
    layout = _by_layer(view, axis("share of Σgn", ".0%", range=[0, 1.02]))
    return [Chart("concentration", "Concentration: share of Σgn in the top experts", sentence, data, layout, 300)]


# ---------------------------------------------------------------------------------------------- geography


def geography(view: View) -> PageSection:
    """Floor and tail risk, balance, redundancy coverage: layer by layer."""
    side = [_balance(view), *([_coverage(view)] if view.coactivation is not None else [])]
    return PageSection(
        "layers",
        "Layer geography",
        [_floor(view), Grid(side, wide=True)],
        "Where experts can be removed cheaply.",
        "Layers",
        True,
    )


def _by_layer(view: View, values: dict[str, Any]) -> dict[str, Any]:
    return {"xaxis": layer_axis(view.layers), "yaxis": {"rangemode": "tozero", **values}}


def _floor(view: View) -> Chart:
    floors = statistics.floors(view.saliency, view.dropped)
    risks = statistics.tail_risks(view.summed.gate_norm_max, view.dropped)
    data = [
        line(view.layers, floors, "saliency floor", "--accent", "layer %{x}: highest dropped %{y:.3g}"),
        {**line(view.layers, risks, "tail risk", "--drop", "layer %{x}: %{y:.0%} of the dropped spike"), "yaxis": "y2"},
    ]
    layout = {
        "xaxis": {**layer_axis(view.layers), "anchor": "y2"},
        "yaxis": axis("floor", domain=[0.56, 1], rangemode="tozero"),
        "yaxis2": axis("tail risk", ".0%", domain=[0, 0.44], rangemode="tozero"),
    }
    return Chart(
        "floor", "Saliency floor and tail risk", _floor_sentence(view, floors, risks), data, layout, 400, "geography"
    )


def _floor_sentence(view: View, floors: list[float | None], risks: list[float | None]) -> str:
    third = max(1, len(floors) // 3)
    early, late = mean(floors[:third]), mean(floors[-third:])
    text = f"With {view.cut}, "
    if early is None or late is None:
        text += "some layers drop no expert that was routed. "
    elif late > 1.5 * early:
        text += (
            f"the best expert dropped has a saliency of {number(early)} in the early layers and {number(late)} in the"
            " late ones: early layers are redundant, late ones specialised. "
        )
    elif early > 1.5 * late:
        text += (
            f"the floor falls from {number(early)} in the early layers to {number(late)} in the late ones: late layers"
            " can be pruned more cheaply in this model. "
        )
    else:
        text += f"the floor is much the same early ({number(early)}) and late ({number(late)}). "
    riskiest = known_extreme(risks, view.layers)
    if riskiest is None or riskiest[1] == 0:
        return text + "No dropped expert ever reaches the global top quarter of peaks."
    return (
        text + f"{percent(mean(risks), 0)} of the dropped experts have rare large outputs (a peak in the global top"
        f" quarter), most in layer {riskiest[0]} ({percent(riskiest[1], 0)}). A criterion that averages cannot"
        " protect them."
    )


def _balance(view: View) -> Chart:
    cv = statistics.balance(view.summed.count)
    hottest, calmest = known_extreme(cv, view.layers), known_extreme(cv, view.layers, largest=False)
    sentence = "0 means that every expert is used equally."
    if hottest and calmest:
        sentence += (
            f" Layer {hottest[0]} uses its experts most unevenly (CV {hottest[1]:.2f}), layer {calmest[0]} most evenly"
            f" ({calmest[1]:.2f})."
        )
    data = [bars(view.layers, cv, "--c3", "layer %{x}: CV %{y:.2f}")]
    return Chart("balance", "Routing balance", sentence, data, _by_layer(view, axis("std(N) / mean(N)")), 300)


def _coverage(view: View) -> Chart:
    covered = statistics.redundancy_coverage(view.coactivation, view.dropped)
    chance = statistics.chance_coverage(view.dropped)
    data = [
        line(view.layers, covered, "coverage", "--accent", "layer %{x}: %{y:.1%}"),
        reference(view.layers, chance, "chance"),
    ]
    layout = _by_layer(view, axis("survives", ".0%", range=[0, 1.02]))
    return Chart(
        "coverage", "Redundancy coverage", _coverage_sentence(view, covered, chance), data, layout, 300, "coverage"
    )


def _coverage_sentence(view: View, covered: list[float | None], chance: list[float | None]) -> str:
    average, even = mean(covered), mean(chance)
    lowest = known_extreme(covered, view.layers, largest=False)
    if average is None or even is None or lowest is None:
        return "Dropped experts were never routed together with another expert: 0 shared positions."
    verdict = (
        "dropped experts mostly work together with kept ones, which can take over"
        if average > even + 0.02
        else (
            "dropped experts mostly work together, so kept ones cannot take over"
            if average < even - 0.02
            else "no better than chance"
        )
    )
    return (
        f"With {view.cut}, {percent(average, 0)} of the experts that are routed together with a dropped expert stay;"
        f" chance would give {percent(even, 0)}: {verdict}. The lowest value is in layer {lowest[0]}"
        f" ({percent(lowest[1], 0)})."
    )


# ---------------------------------------------------------------------------------------------- distributions


def distributions(view: View) -> PageSection:
    """The saliency of an early, a middle and a late layer with the cut."""
    last = len(view.layers) - 1
    picks = dict.fromkeys((round(0.08 * last), round(0.5 * last), round(0.9 * last)))
    charts = [_distribution(view, row, name) for row, name in zip(picks, ("Early", "Middle", "Late"), strict=False)]
    lead = "The distribution of saliency. The dashed line is the cut: the highest saliency that is removed."
    return PageSection("distributions", "Saliency distributions", [Grid(charts)], lead, "Distributions", True)


def _distribution(view: View, row: int, name: str) -> Chart:
    choices = [
        (
            "layer",
            "Layer",
            [(str(i), f"layer {view.layers[i]}") for i in dict.fromkeys((row, *range(len(view.layers))))],
        )
    ]
    layout = {"barmode": "stack", "bargap": 0, "xaxis": axis("saliency", tick0=0), "yaxis": axis("experts")}
    return Chart(
        f"distribution-{row}",
        f"{name}: layer {view.layers[row]}",
        distribution_sentence(view, row),
        [],
        layout,
        250,
        "distribution",
        choices,
        {"layer": row},
    )
