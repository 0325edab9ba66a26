"""The sections that need only an observation, in the order of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from reapkit.core.formatting import count, extreme, listed, number, percent, plural
from reapkit.report.blocks import Chart, Folded, Note, PageSection, PageTable, Text, Tiles
from reapkit.report.charts import axis, grid, line, reference, shade
from reapkit.report.cut_sections import cut_sections, grid_height, grid_layout
from reapkit.report.eaft_section import eaft_section
from reapkit.report.reroute_section import reroute_section
from reapkit.report.view import View
from reapkit.selection import statistics

VARIABLES = (
    ("count", "N", "positions routed to the expert"),
    ("gate_sum", "Σg", "gate weight that the model multiplied its output with"),
    ("norm_sum", "Σn", "L2 norm of its output before the gate"),
    ("gate_norm_sum, gate_norm_sq_sum", "Σgn, Σ(gn)²", "what it added to the layer's output"),
    ("relative_sq_sum", "Σ(gn/‖r‖)²", "the same as a squared share of the residual stream behind the layer"),
    (
        "norm_max, gate_norm_max, activation_max",
        "max",
        "largest norm, contribution and component, also over scored tokens alone",
    ),
    ("coactivation", "C", "positions that two experts share"),
    ("snapshots", "N, Σgn", "after 1/16, 1/8, 1/4 and 1/2 of the rows"),
)


def observation_sections(view: View) -> list[PageSection]:
    """Every section that this observation can fill."""
    several, material, paths = len(view.observation.sources) > 1, view.observation.eaft, view.observation.reroute
    return [
        recorded(view),
        *cut_sections(view),
        *([specialisation(view)] if several else []),
        *([eaft_section(view, material)] if material is not None else []),
        *([reroute_section(view, paths)] if paths is not None else []),
        convergence(view),
        never_routed(view),
    ]


# ---------------------------------------------------------------------------------------------- what was recorded


def recorded(view: View) -> PageSection:
    """Sizes, tokens by source, what each statistic means, how it was measured."""
    observation = view.observation
    tokens, scored = int(observation.tokens.sum()), int(observation.scored_tokens.sum())
    routed = int(observation.statistics["count"].sum())
    blocks = f", {listed(observation.meta['mtp'])} multi-token prediction" if observation.meta.get("mtp") else ""
    tiles = Tiles(
        [
            ("MoE layers", count(len(view.layers)), f"layers {view.layers[0]} to {view.layers[-1]}{blocks}"),
            ("routed experts", count(view.experts), f"top-{observation.num_experts_per_tok} per token"),
            ("tokens read", count(tokens), plural(len(observation.sources), "source")),
            ("scored tokens", count(scored), f"{_share(scored, tokens)} of the tokens"),
            ("expert decisions", count(routed), f"{number(routed / (len(view.layers) * view.experts))} per expert"),
        ]
    )
    columns = [
        ("source", "left"),
        ("tokens", "right"),
        ("scored", "right"),
        ("scored share", "right"),
        ("share of all scored", "right"),
    ]
    by_source = zip(observation.sources, observation.tokens.tolist(), observation.scored_tokens.tolist(), strict=True)
    note = _identity(observation.meta)
    sources = PageTable(
        columns,
        [(name, count(read), count(seen), _share(seen, read), _share(seen, scored)) for name, read, seen in by_source],
        note=note,
    )
    folded = [
        Folded(
            "What each statistic means",
            [PageTable([("statistic", "left"), ("symbol", "left"), ("meaning", "left")], VARIABLES)],
        )
    ]
    if facts := [(key, _shown(value)) for key, value in sorted(observation.meta.items())]:
        folded.append(Folded("How it was measured", [PageTable([("fact", "left"), ("value", "left")], facts)]))
    lead = (
        "Every routed token was observed with the gate weights that the model really used. The numbers do not depend"
        " on a ratio, a criterion or a mix; these are applied afterwards."
    )
    return PageSection("recorded", "What was recorded", [tiles, sources, *folded], lead, "Recorded")


def _identity(meta: Mapping[str, Any]) -> str:
    """Which weights were watched, and how they ran."""
    hashed = f"Model {meta['model']}" if meta.get("model") else "The model was not recorded"
    ran = [str(meta[name]) for name in ("dtype", "device", "placement") if meta.get(name)]
    return f"{', '.join([hashed, *ran])}."


def _share(part: float, whole: float) -> str:
    return percent(part / whole if whole else None)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# ---------------------------------------------------------------------------------------------- sources


def specialisation(view: View) -> PageSection:
    """Which source each expert serves, and what leaving a source out of the mix would cost it."""
    observation = view.observation
    shares = statistics.specialisation(observation)
    routed = observation.statistics["count"].sum(1) > 0
    special = (shares.max(1) > 0.5) & routed
    by_source = {
        name: int((special & (shares.argmax(1) == index)).sum()) for index, name in enumerate(observation.sources)
    }
    sentence = (
        f"{percent(float(special.sum()) / max(1, int(routed.sum())), 0)} of the experts serve one source more often"
        f" than all others together: {listed(f'{count(size)} for {name}' for name, size in by_source.items())}."
    )
    views = [
        ("-1", "most frequent source"),
        *((str(index), f"{name} against even") for index, name in enumerate(observation.sources)),
    ]
    chart = Chart(
        "specialists",
        "Which source each expert serves",
        sentence,
        [grid(view.layers, showlegend=False)],
        {**grid_layout(), "showlegend": True},
        grid_height(view) + 40,
        "specialists",
        [("source", "Show", views)],
    )
    lead = "Rates are per scored token of the source, so that a large source does not look special."
    return PageSection("sources", "Who serves what", [chart, *_without_each(view)], lead, "Sources")


def _without_each(view: View) -> list[Any]:
    """What calibrating without each source would have pruned, and what each source would have lost."""
    sources, mass = view.observation.sources, view.observation.statistics["gate_norm_sum"]
    cuts = {"all sources": view.dropped, **{f"without {name}": view.dropped_without(name) for name in sources}}
    lost = {
        name: [statistics.share_deleted(mass[:, s], dropped) for s in range(len(sources))]
        for name, dropped in cuts.items()
    }
    before, after = lost["all sources"], [lost[f"without {name}"][index] for index, name in enumerate(sources)]
    moved = {name: cuts[f"without {name}"] & ~view.dropped for name in sources}
    swapped = [int(each.sum()) for each in moved.values()]
    dropped = max(1, int(view.dropped.sum()))
    rows = [
        (name, count(swapped[s]), percent(swapped[s] / dropped, 0), percent(before[s]), percent(after[s]))
        for s, name in enumerate(sources)
    ]
    columns = [
        ("left out of the mix", "left"),
        ("kept experts that would be removed", "right"),
        ("share of the cut", "right"),
        ("its mass lost, as calibrated", "right"),
        ("without it", "right"),
    ]
    named = [
        (name, layer, listed(np.flatnonzero(experts).tolist(), 24))
        for name, each in moved.items()
        for layer, experts in zip(view.layers, each, strict=True)
        if experts.any()
    ]
    blocks: list[Any] = [_losses(sources, lost, before, after), PageTable(columns, rows)]
    if named:
        blocks.append(
            Folded(
                "Which experts would be removed instead",
                [PageTable([("left out", "left"), ("layer", "right"), ("experts", "left")], named)],
            )
        )
    if view.spec.criterion != view.criterion:
        blocks.append(
            Text(
                f"The cuts without a source are by {view.spec.criterion} at the same budget: the decision of"
                f" {view.criterion} cannot be recomputed from sums alone."
            )
        )
    return blocks


def _losses(
    sources: tuple[str, ...], lost: dict[str, list[float | None]], before: list[float | None], after: list[float | None]
) -> Chart:
    worst = max(range(len(sources)), key=lambda s: (after[s] or 0) - (before[s] or 0))
    sentence = (
        "Each row is a calibration. Each column shows how much of that source's saliency mass its cut would remove."
        f" Leaving {sources[worst]} out would change its loss from {percent(before[worst])} to {percent(after[worst])},"
        " the largest rise."
    )
    names = list(lost)
    trace = {
        "type": "heatmap",
        "x": list(sources),
        "y": names,
        "z": [lost[name] for name in names],
        "zmin": 0,
        "showscale": False,
        "text": [[percent(value, 0) for value in lost[name]] for name in names],
        "texttemplate": "%{text}",
        "xgap": 3,
        "ygap": 3,
        "colorscale": shade("--drop-low", "--drop-high"),
        "hovertemplate": "calibrated on %{y}: %{z:.1%} of %{x} removed<extra></extra>",
    }
    layout = {
        "xaxis": axis(side="top", showgrid=False),
        "yaxis": axis(autorange="reversed", showgrid=False),
        "margin": {"t": 40, "b": 10},
    }
    return Chart("without", "What a source loses if it is left out", sentence, [trace], layout, 60 + 38 * len(names))


# ---------------------------------------------------------------------------------------------- convergence, never
# routed


def convergence(view: View) -> PageSection:
    """Whether more calibration would have decided otherwise."""
    steps = [step for step in statistics.convergence(view.observation, view.counts, view.mix) if step["by_layer"]]
    if not steps or steps[-1]["rows"] != statistics.SNAPSHOT_ROWS[-1]:
        few = Note(
            "warn", "Too few rows were read to compare with the decision after half of them. Raise calibration.samples."
        )
        return PageSection(
            "convergence",
            "Was it enough?",
            [few],
            "REAP's kept set after part of the calibration, compared with the final one.",
            "Convergence",
        )
    at = [*(step["rows"] for step in steps), "all"]
    overlap = [*(step["overlap"] for step in steps), 1.0]
    worst = [*(min(step["by_layer"].values()) for step in steps), 1.0]
    chance, half = steps[0]["chance"], steps[-1]
    slowest = extreme(list(half["by_layer"].values()), list(half["by_layer"]), largest=False)
    missing = 1 - half["overlap"]
    verdict = (
        "more calibration would change little"
        if missing < 0.03
        else (
            "more calibration would still change some experts"
            if missing < 0.1
            else "the decision still depends on the amount of data: raise calibration.samples"
        )
    )
    sentence = (
        f"After half of the rows {percent(half['overlap'])} of the kept experts were already the final ones (random"
        f" sets: {percent(chance, 0)}), and {percent(slowest[1])} in layer {slowest[0]}; {verdict}."
    )
    data = [
        line(at, overlap, "mean over layers", "--accent", "%{y:.1%}"),
        line(at, worst, "slowest layer", "--drop", "%{y:.1%}", width=2),
        reference(at, [chance] * len(at), "random sets"),
    ]
    layout = {
        "xaxis": axis("share of the rows read", type="category"),
        "yaxis": axis("kept set in common", ".0%", range=[0.95 * min(chance, *worst), 1.02]),
    }
    lead = "REAP's kept set after part of the calibration, compared with the final one."
    chart = Chart("convergence", "Convergence of the decision", sentence, data, layout, 300)
    return PageSection("convergence", "Was it enough?", [chart], lead, "Convergence")


def never_routed(view: View) -> PageSection:
    """Experts that no scored position was routed to."""
    silent = {
        layer: np.flatnonzero(row == 0).tolist() for layer, row in zip(view.layers, view.summed.count, strict=True)
    }
    silent = {layer: experts for layer, experts in silent.items() if experts}
    total, whole = sum(map(len, silent.values())), view.experts * len(view.layers)
    if not total:
        rare = int((view.summed.count < 10).sum())
        text = f"Every one of the {count(whole)} experts received at least one scored token"
        text += f"; {plural(rare, 'expert')} fewer than ten." if rare else ", and none fewer than ten."
        return PageSection("never", "Experts never routed", [Note("good", text)], "", "Never routed")
    note = Note(
        "warn",
        f"{count(total)} of {count(whole)} experts ({percent(total / whole)}) received no scored token, in"
        f" {plural(len(silent), 'layer')}. They rank last. If that is unexpected, raise calibration.samples or add a"
        " source.",
    )
    rows = [(layer, len(experts), listed(experts, 24)) for layer, experts in silent.items()]
    table = PageTable([("layer", "right"), ("how many", "right"), ("experts", "left")], rows)
    blocks = [note, Folded("Layer by layer", [table]) if len(silent) > 12 else table]
    return PageSection("never", "Experts never routed", blocks, "", "Never routed")
