"""The sections that an observation alone can fill: what was recorded, what a cut costs, where, and for which source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reapkit import statistics
from reapkit.report.blocks import Chart, Folded, Grid, Note, Section, Slider, Table, Text, Tiles
from reapkit.report.view import View, decided_label
from reapkit.report.wording import count, extreme, listed, mean, number, percent, plural

VARIABLES = (
    ("count", "N", "positions routed to the expert"),
    ("gate_sum", "Σg", "gate weight that the model multiplied its output with"),
    ("norm_sum", "Σn", "L2 norm of its output before the gate"),
    ("gate_norm_sum, gate_norm_sq_sum", "Σgn, Σ(gn)²", "what it added to the layer's output"),
    ("norm_max, gate_norm_max, activation_max", "max", "largest norm, contribution and single component, also over scored positions alone"),
    ("coactivation", "C", "positions that two experts share"),
    ("snapshots", "N, Σgn", "after 1/16, 1/8, 1/4 and 1/2 of the rows"),
)
DRIVER_NAMES = {"count": "how often it is used (N)", "gate_mean": "gate weight (Σg/N)", "norm_mean": "output magnitude (Σn/N)",
                "norm_max": "largest output (max n)"}


def observation_sections(view: View) -> list[Section]:
    """Every section that this observation can fill."""
    sections: list[Section | None] = [recorded(view), cut(view), heat_map(view), drivers(view), geography(view), distributions(view),
                                      specialisation(view), regions(view), convergence(view), never_routed(view)]
    return [section for section in sections if section is not None]


# ---------------------------------------------------------------------------------------------- what was recorded


def recorded(view: View) -> Section:
    observation = view.observation
    tokens, scored = int(observation.tokens.sum()), int(observation.scored_tokens.sum())
    routed = int(observation.statistics["count"].sum())
    tiles = Tiles([("MoE layers", count(len(view.layers)), f"layers {view.layers[0]} to {view.layers[-1]}"),
                   ("routed experts", count(view.experts), f"top-{observation.num_experts_per_tok} per token"),
                   ("tokens read", count(tokens), plural(len(observation.sources), "source")),
                   ("positions scored", count(scored), f"{percent(scored / tokens if tokens else None)} of the tokens"),
                   ("expert decisions", count(routed), f"{number(routed / (len(view.layers) * view.experts))} per expert")])
    rows = [(name, count(read), count(seen), percent(seen / read if read else None), percent(seen / scored if scored else None))
            for name, read, seen in zip(observation.sources, observation.tokens.tolist(), observation.scored_tokens.tolist(), strict=True)]
    sources = Table([("source", "left"), ("tokens", "right"), ("scored", "right"), ("scored share", "right"), ("share of all scored", "right")], rows)
    variables = Table([("statistic", "left"), ("symbol", "left"), ("meaning", "left")], VARIABLES)
    facts = Table([("fact", "left"), ("value", "left")], [(key, _shown(value)) for key, value in sorted(observation.meta.items())])
    folded = [Folded("What each statistic means", [variables])] + ([Folded("How it was measured", [facts])] if observation.meta else [])
    lead = ("Every routed token was watched with the gate weights the model really used. Nothing here is tied to a ratio, a criterion or a mix: "
            "those are applied afterwards.")
    return Section("recorded", "What was recorded", [tiles, sources, *folded], lead, "Recorded")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# ---------------------------------------------------------------------------------------------- the cut


def cut(view: View) -> Section:
    curve = statistics.cut_curve(view.summed, view.saliency)
    traffic = statistics.share_deleted(view.summed.count, view.dropped)
    mass = statistics.share_deleted(view.summed.gate_norm_sum, view.dropped)
    share = view.removed_share
    sentence = (f"With {view.cut}, {percent(traffic)} of the routed traffic and {percent(mass)} of the saliency mass go; "
                f"random pruning would lose {percent(share, 0)} of each. " + _steepens(curve))
    at = [k / view.experts for k in range(view.experts + 1)]
    hover = "%{y:.1%} deleted at %{x:.1%}<extra>%{fullData.name}</extra>"
    data = [{"x": at, "y": curve.traffic, "mode": "lines", "name": "routing traffic", "line": {"color": "--neutral", "width": 2.5}, "hovertemplate": hover},
            {"x": at, "y": curve.mass, "mode": "lines", "name": "saliency mass", "line": {"color": "--drop", "width": 2.5}, "hovertemplate": hover},
            {"x": [0, 1], "y": [0, 1], "mode": "lines", "name": "random", "line": {"color": "--muted", "width": 1, "dash": "dot"}, "hoverinfo": "skip"}]
    layout = {"xaxis": {"title": {"text": "experts removed"}, "tickformat": ".0%", "range": [0, 1]},
              "yaxis": {"title": {"text": "deleted"}, "tickformat": ".0%", "range": [0, 1.02]}}
    decided = "As decided" if view.selection is not None else ""
    slider = Slider("Experts removed per layer", view.experts, round(share * view.experts), decided)
    lead = ("Any ratio can be cut from this one observation. Move the slider: the cut, the heat map, the layer charts and the distributions follow it."
            + ("" if view.selection is None else f" It starts where the recipe decided: {decided_label(view).removesuffix(', as decided')}."))
    return Section("cut", "The cut trade-off", [slider, Chart("cut-curve", "What a cut deletes", sentence, data, layout, 360, "cut")], lead, "Cut")


def _steepens(curve: statistics.CutCurve) -> str:
    if curve.steepens_at is None:
        return "No step of the saliency curve costs more than its even share."
    return (f"The saliency curve steepens past {percent(curve.steepens_at, 0)}: from there each further expert costs more than its even share, "
            "the cheap forecast of the quality cliff.")


# ---------------------------------------------------------------------------------------------- heat map


def heat_map(view: View) -> Section:
    row, share = extreme(statistics_by_layer(view), view.layers, largest=True) or (view.layers[0], None)
    low, least = extreme(statistics_by_layer(view), view.layers, largest=False) or (view.layers[0], None)
    sentence = (f"Blue experts stay, orange ones go; darker (in the dark theme: brighter) means more salient than the layer's median. The cut takes "
                f"least from layer {low} ({percent(least)} of its saliency mass) and most from layer {row} ({percent(share)}).")
    scale = lambda name: {"type": "heatmap", "z": [[0]], "y": list(view.layers), "zmin": -1, "zmax": 1, "hoverongaps": False, "xgap": 0,  # noqa: E731
                          "colorscale": [[0, f"--{name}-low"], [1, f"--{name}-high"]], "showscale": False, "hovertemplate": "%{text}<extra></extra>"}
    layout = {"xaxis": {"title": {"text": "expert"}, "showgrid": False, "zeroline": False},
              "yaxis": {"title": {"text": "layer"}, "autorange": "reversed", "showgrid": False, "zeroline": False}}
    choices = [("order", "Order", [("index", "expert number"), ("saliency", "saliency")]),
               ("value", "Colour", [("saliency", "saliency"), ("traffic", "traffic")])]
    height = min(900, max(220, 14 * len(view.layers) + 90))
    chart = Chart("heat", "Layers by experts", sentence, [scale("keep"), scale("drop")], layout, height, "heat", choices)
    return Section("experts", "Every expert, kept or dropped", [chart], "", "Experts")


def statistics_by_layer(view: View) -> list[float | None]:
    """Share of each layer's saliency mass that the cut deletes."""
    return [statistics.share_deleted(*pair) for pair in zip(view.summed.gate_norm_sum, view.dropped, strict=True)]


# ---------------------------------------------------------------------------------------------- drivers


def drivers(view: View) -> Section:
    found = statistics.drivers(view.summed, view.saliency)
    names = list(found)[::-1]
    data = [{"type": "bar", "orientation": "h", "name": kind.capitalize(), "y": [DRIVER_NAMES[name] for name in names],
             "x": [found[name][kind] for name in names], "marker": {"color": color}, "hovertemplate": "%{x:.3f}<extra>" + kind.capitalize() + "</extra>"}
            for kind, color in (("spearman", "--neutral"), ("pearson", "--accent"))]
    layout = {"xaxis": {"range": [-1, 1], "title": {"text": "correlation with saliency"}}, "yaxis": {"showgrid": False}, "legend": {"traceorder": "reversed"}}
    chart = Chart("drivers", "Correlation with each candidate driver, mean over layers", _driver_sentence(found), data, layout, 290)
    tops = statistics.concentration(view.summed.gate_norm_sum)
    blocks: list[Any] = [chart]
    if tops:
        blocks.append(_concentration(view, tops))
    return Section("drivers", "What drives saliency", blocks, f"Saliency here is {view.formula} ({view.criterion}).", "Drivers")


def _driver_sentence(found: dict[str, dict[str, float | None]]) -> str:
    best = extreme([None if found[name]["pearson"] is None else abs(found[name]["pearson"]) for name in found], list(found))
    if best is None:
        return "No layer has experts that differ, so there is nothing to correlate."
    use, strength = found["count"]["pearson"], found[best[0]]["pearson"]
    if best[0] == "count":
        return f"Saliency follows how often an expert is used (r = {strength:.2f}): the cut removes the rarely routed experts."
    weak = "hardly" if use is not None and abs(use) < 0.3 else "less"
    return (f"Saliency follows {DRIVER_NAMES[best[0]]} most (r = {strength:.2f}) and {weak} how often an expert is used "
            f"(r = {'–' if use is None else format(use, '.2f')}): the cut removes the quiet experts, not the rarely routed ones."
            if weak == "hardly" else
            f"Saliency follows {DRIVER_NAMES[best[0]]} most (r = {strength:.2f}); how often an expert is used matters less (r = {use:.2f})."
            if use is not None else f"Saliency follows {DRIVER_NAMES[best[0]]} most (r = {strength:.2f}).")


def _concentration(view: View, tops: dict[int, list[float | None]]) -> Chart:
    colors = ["--c1", "--c3", "--c4", "--c5", "--c6", "--c7", "--c8"]
    shown = list(tops)[:5]
    data = [{"x": list(view.layers), "y": tops[size], "mode": "lines+markers", "name": f"top {size}", "marker": {"size": 4},
             "line": {"color": colors[index % 7], "width": 2}, "hovertemplate": f"layer %{{x}}: %{{y:.1%}} in the top {size}<extra></extra>"}
            for index, size in enumerate(shown)]
    size = shown[min(1, len(shown) - 1)]
    most = extreme(tops[size], view.layers)
    sentence = (f"The top {size} of {view.experts} experts hold {percent(mean(tops[size]), 0)} of Σgn on average; an even layer would have "
                f"{percent(size / view.experts, 0)}. " + (f"Layer {most[0]} is the most concentrated, with {percent(most[1], 0)}." if most else ""))
    return Chart("concentration", "Concentration: share of Σgn in the top experts", sentence, data, _layer_axes("share of Σgn", ".0%", range=[0, 1.02]), 300)


def _layer_axes(title: str, tickformat: str = "", **extra: Any) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": "layer"}}, "yaxis": {"title": {"text": title}, "tickformat": tickformat, "rangemode": "tozero", **extra}}


# ---------------------------------------------------------------------------------------------- geography


def geography(view: View) -> Section:
    layers = list(view.layers)
    floors = statistics.floors(view.saliency, view.dropped)
    risks = statistics.tail_risks(view.summed.gate_norm_max, view.dropped)
    where = Chart("floor", "Saliency floor and tail risk", _floor_sentence(view, floors, risks), [
        {"x": layers, "y": floors, "mode": "lines+markers", "name": "saliency floor", "marker": {"size": 5}, "line": {"color": "--accent", "width": 2.5},
         "hovertemplate": "layer %{x}: highest dropped saliency %{y:.3g}<extra></extra>"},
        {"x": layers, "y": risks, "mode": "lines+markers", "name": "tail risk", "yaxis": "y2", "marker": {"size": 5},
         "line": {"color": "--drop", "width": 2.5}, "hovertemplate": "layer %{x}: %{y:.0%} of the dropped spike<extra></extra>"}],
        {"xaxis": {"title": {"text": "layer"}, "anchor": "y2"}, "yaxis": {"title": {"text": "floor"}, "domain": [0.56, 1], "rangemode": "tozero"},
         "yaxis2": {"title": {"text": "tail risk"}, "domain": [0, 0.44], "tickformat": ".0%", "rangemode": "tozero"}}, 400, "geography")
    cv = statistics.balance(view.summed.count)
    hottest, calmest = extreme(cv, layers), extreme(cv, layers, largest=False)
    balance = Chart("balance", "Routing balance", "0 means that every expert is used equally. " + (
        f"Layer {hottest[0]} leans most on a few hot experts (CV {hottest[1]:.2f}), layer {calmest[0]} least ({calmest[1]:.2f})." if hottest else ""),
        [{"type": "bar", "x": layers, "y": cv, "marker": {"color": "--c3"}, "hovertemplate": "layer %{x}: CV %{y:.2f}<extra></extra>"}],
        _layer_axes("std(N) / mean(N)"), 300)
    blocks: list[Any] = [where, Grid([balance] + ([_coverage(view)] if view.coactivation is not None else []), wide=True)]
    return Section("layers", "Layer geography", blocks, "Where the prunable slack lies.", "Layers")


def _floor_sentence(view: View, floors: list[float | None], risks: list[float | None]) -> str:
    third = max(1, len(floors) // 3)
    early, late = mean(floors[:third]), mean(floors[-third:])
    text = f"With {view.cut}, "
    if early is None or late is None:
        text += "some layers drop nothing that was routed. "
    elif late > 1.5 * early:
        text += (f"the best expert dropped has a saliency of {number(early)} in the early layers and {number(late)} in the late ones: "
                 "early layers are redundant, late ones specialised. ")
    elif early > 1.5 * late:
        text += f"the floor falls from {number(early)} in the early layers to {number(late)} in the late ones: the slack lies late in this model. "
    else:
        text += f"the floor is much the same early ({number(early)}) and late ({number(late)}). "
    riskiest = extreme(risks, view.layers)
    if riskiest is None or riskiest[1] == 0:
        return text + "No dropped expert ever reaches the global top quarter of peaks."
    return (text + f"{percent(mean(risks), 0)} of the dropped experts spike now and then (peak in the global top quarter), most in layer "
            f"{riskiest[0]} ({percent(riskiest[1], 0)}): an average cannot protect them.")


def _coverage(view: View) -> Chart:
    layers = list(view.layers)
    covered, chance = statistics.redundancy_coverage(view.coactivation, view.dropped), statistics.chance_coverage(view.dropped)
    lowest = extreme(covered, layers, largest=False)
    gap = None if mean(covered) is None or mean(chance) is None else mean(covered) - mean(chance)
    sentence = f"{percent(mean(covered), 0)} of what fires beside a dropped expert survives, where chance would give {percent(mean(chance), 0)}"
    sentence += "" if gap is None else (": the survivors are the busy partners, so the work is reabsorbed. " if gap > 0.02 else
                                        ": dropped experts fire together, so their work is not reabsorbed. " if gap < -0.02 else ": no better than chance. ")
    sentence += f"Least in layer {lowest[0]} ({percent(lowest[1], 0)})." if lowest else ""
    data = [{"x": layers, "y": covered, "mode": "lines+markers", "name": "coverage", "marker": {"size": 5}, "line": {"color": "--accent", "width": 2.5},
             "hovertemplate": "layer %{x}: %{y:.1%}<extra>coverage</extra>"},
            {"x": layers, "y": chance, "mode": "lines", "name": "chance", "line": {"color": "--muted", "width": 1.5, "dash": "dot"},
             "hovertemplate": "%{y:.1%}<extra>chance</extra>"}]
    return Chart("coverage", "Redundancy coverage", sentence, data, _layer_axes("survives", ".0%", range=[0, 1.02]), 300, "coverage")


# ---------------------------------------------------------------------------------------------- distributions


def distributions(view: View) -> Section:
    last = len(view.layers) - 1
    picks = dict.fromkeys((round(0.08 * last), round(0.5 * last), round(0.9 * last)))
    names = ("Early", "Middle", "Late")
    charts = [_distribution(view, row, name) for row, name in zip(picks, names, strict=False)]
    lead = "The shape of the expert pool. The dashed line is the cut: the highest saliency that goes."
    return Section("distributions", "Saliency distributions", [Grid(charts)], lead, "Distributions")


def _distribution(view: View, row: int, name: str) -> Chart:
    values = view.saliency[row][view.saliency[row].isfinite()]
    lost = statistics.share_deleted(view.summed.gate_norm_sum[row], view.dropped[row])
    floor = statistics.floors(view.saliency[row : row + 1], view.dropped[row : row + 1])[0]
    median = float(values.median()) if values.numel() else None
    top = float(values.max()) if values.numel() else None
    sentence = f"Median {number(median)}, highest {number(top)}"
    if floor is not None and top and median:
        sentence += f"; the cut lies at {number(floor)}, {percent(floor / top, 0)} of the highest. What goes holds {percent(lost, 0)} of the layer's mass."
    else:
        sentence += "; nothing that was routed goes here."
    choices = [("layer", "Layer", [(str(row), f"layer {view.layers[row]}")] + [(str(i), f"layer {layer}") for i, layer in enumerate(view.layers) if i != row])]
    layout = {"barmode": "stack", "bargap": 0, "xaxis": {"title": {"text": "saliency"}, "nticks": 6}, "yaxis": {"title": {"text": "experts"}}}
    return Chart(f"distribution-{row}", f"{name}: layer {view.layers[row]}", sentence, [], layout, 250, "distribution", choices, {"layer": row})


# ---------------------------------------------------------------------------------------------- sources


def specialisation(view: View) -> Section | None:
    observation = view.observation
    if len(observation.sources) < 2:
        return None
    shares = statistics.specialisation(observation)
    routed = observation.statistics["count"].sum(1) > 0
    special = (shares.amax(1) > 0.5) & routed
    by_source = {name: int((special & (shares.argmax(1) == index)).sum()) for index, name in enumerate(observation.sources)}
    sentence = (f"{percent(float(special.sum()) / max(1, int(routed.sum())), 0)} of the experts serve one source more often than all others together: "
                f"{listed(f'{size} for {name}' for name, size in by_source.items())}.")
    trace = {"type": "heatmap", "z": [[0]], "y": list(view.layers), "hoverongaps": False, "hovertemplate": "%{text}<extra></extra>",
             "colorbar": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "thickness": 10, "len": 0.9, "x": 0.5, "outlinewidth": 0, "tickfont": {"size": 11, "color": "--muted"}}}
    layout = {"xaxis": {"title": {"text": "expert"}, "showgrid": False, "zeroline": False}, "margin": {"t": 40},
              "yaxis": {"title": {"text": "layer"}, "autorange": "reversed", "showgrid": False, "zeroline": False}}
    choices = [("source", "Show", [("-1", "most frequent source"), *((str(i), f"{name} against even") for i, name in enumerate(observation.sources))])]
    height = min(900, max(260, 14 * len(view.layers) + 130))
    chart = Chart("specialists", "Which source each expert serves", sentence, [trace], layout, height, "specialists", choices)
    lead = "Rates are per scored token of the source, so that a large source does not look special."
    return Section("sources", "Who serves what", [chart, *_without_each(view)], lead, "Sources")


def _without_each(view: View) -> list[Any]:
    """What calibrating without each source would have pruned, and what each source would have lost."""
    sources = view.observation.sources
    mass = view.observation.statistics["gate_norm_sum"]
    cuts = {"all sources": view.dropped, **{f"without {name}": view.dropped_without(name) for name in sources}}
    lost = {name: [statistics.share_deleted(mass[:, s], dropped) for s in range(len(sources))] for name, dropped in cuts.items()}
    rows = []
    for index, name in enumerate(sources):
        swapped = int((cuts[f"without {name}"] & ~view.dropped).sum())
        rows.append((name, count(swapped), percent(swapped / max(1, int(view.dropped.sum())), 0), percent(lost["all sources"][index]),
                     percent(lost[f"without {name}"][index])))
    worst = extreme([(lost[f"without {name}"][i] or 0) - (lost["all sources"][i] or 0) for i, name in enumerate(sources)], sources)
    index = sources.index(worst[0])
    sentence = (f"Each row is a calibration, each column what its cut would delete of that source's own saliency mass. Leaving {worst[0]} out would raise "
                f"its loss from {percent(lost['all sources'][index])} to {percent(lost[f'without {worst[0]}'][index])}, the largest change.")
    names = list(cuts)
    data = [{"type": "heatmap", "x": list(sources), "y": names, "z": [lost[name] for name in names], "zmin": 0,
             "text": [[percent(value, 0) for value in lost[name]] for name in names], "texttemplate": "%{text}", "showscale": False, "xgap": 3, "ygap": 3,
             "colorscale": [[0, "--drop-low"], [1, "--drop-high"]], "hovertemplate": "calibrated on %{y}: %{z:.1%} of %{x} deleted<extra></extra>"}]
    layout = {"xaxis": {"side": "top", "showgrid": False, "title": {"text": ""}}, "yaxis": {"autorange": "reversed", "showgrid": False, "title": {"text": ""}},
              "margin": {"t": 40, "b": 10}}
    table = Table([("left out of the mix", "left"), ("experts pruned that stay now", "right"), ("share of the cut", "right"), ("its mass lost, as calibrated", "right"),
                   ("without it", "right")], rows)
    criterion = "" if view.spec.criterion == view.criterion else f"Follows {view.spec.criterion}, which sums alone can recompute."
    return [Chart("without", "What leaving a source out would cost it", sentence, data, layout, 60 + 38 * len(names)), table, *([Text(criterion)] if criterion else [])]


# ---------------------------------------------------------------------------------------------- EAFT regions


def regions(view: View) -> Section | None:
    if view.observation.eaft is None:
        return None
    from reapkit.report.eaft_section import eaft_section

    return eaft_section(view)


# ---------------------------------------------------------------------------------------------- convergence, never routed


def convergence(view: View) -> Section:
    steps = statistics.convergence(view.observation, view.counts, view.mix)
    at = [*(step["rows"] for step in steps), "all"]
    overlap = [step["overlap"] for step in steps] + [1.0]
    worst = [min(step["by_layer"].values()) for step in steps] + [1.0]
    chance = steps[0]["chance"]
    missing = 1 - steps[-1]["overlap"]
    slowest = extreme(list(steps[-1]["by_layer"].values()), list(steps[-1]["by_layer"]), largest=False)
    verdict = ("more calibration would change little" if missing < 0.03 else
               "more calibration would still move some experts" if missing < 0.1 else "the decision still depends on how much was read: calibrate longer")
    sentence = (f"After half of the rows {percent(steps[-1]['overlap'])} of the kept experts were already the final ones (random sets: {percent(chance, 0)}), "
                f"in layer {slowest[0]} {percent(slowest[1])}; {verdict}.")
    data = [{"x": at, "y": overlap, "mode": "lines+markers", "name": "mean over layers", "line": {"color": "--accent", "width": 2.5}, "hovertemplate": "%{y:.1%}<extra>mean</extra>"},
            {"x": at, "y": worst, "mode": "lines+markers", "name": "slowest layer", "line": {"color": "--drop", "width": 2}, "hovertemplate": "%{y:.1%}<extra>slowest</extra>"},
            {"x": at, "y": [chance] * len(at), "mode": "lines", "name": "random sets", "line": {"color": "--muted", "width": 1.5, "dash": "dot"}, "hoverinfo": "skip"}]
    layout = {"xaxis": {"title": {"text": "share of the rows read"}, "type": "category"},
              "yaxis": {"title": {"text": "kept set in common"}, "tickformat": ".0%", "range": [min(0.95 * chance, 0.95 * min(worst)), 1.02]}}
    lead = "REAP's kept set after part of the calibration, compared with the final one."
    return Section("convergence", "Was it enough?", [Chart("convergence", "Convergence of the decision", sentence, data, layout, 300)], lead, "Convergence")


def never_routed(view: View) -> Section:
    silent = {layer: (row == 0).nonzero().flatten().tolist() for layer, row in zip(view.layers, view.summed.count, strict=True)}
    silent = {layer: experts for layer, experts in silent.items() if experts}
    total = sum(map(len, silent.values()))
    whole = view.experts * len(view.layers)
    least: Callable[[int], str] = lambda layer: listed(silent[layer], 24)  # noqa: E731
    if not total:
        rare = int((view.summed.count < 10).sum())
        text = f"Every one of the {count(whole)} experts received at least one scored token" + (
            f"; {plural(rare, 'expert')} fewer than ten." if rare else ", and none fewer than ten.")
        return Section("never", "Experts never routed", [Note("good", text)], "", "Never routed")
    share = total / whole
    note = Note("warn", f"{count(total)} of {count(whole)} experts ({percent(share)}) received no scored token, in {plural(len(silent), 'layer')}. They rank "
                "last. If that is unexpected, raise calibration.samples or add a source.")
    table = Table([("layer", "right"), ("how many", "right"), ("experts", "left")], [(layer, len(silent[layer]), least(layer)) for layer in silent])
    return Section("never", "Experts never routed", [note, Folded("Layer by layer", [table]) if len(silent) > 12 else table], "", "Never routed")
