"""Draws what every measured cut costs: size on disk against quality, with intervals and the gates' limits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from reapkit.core.formatting import byte_unit, human_bytes, percent
from reapkit.evaluation.gates import UNION
from reapkit.evaluation.metrics.metric import Metric
from reapkit.evaluation.metrics.table import METRICS
from reapkit.report.blocks import Chart
from reapkit.report.charts import across, axis, error_bars
from reapkit.report.facts import RunFacts
from reapkit.report.measures import TONES, axis_form, of_mix, shown, with_interval

DRAWN = ("kl_mean", "perplexity_ratio")
"""The metrics that are drawn against size; the second only where a gate limits it."""
COLORS = ("--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7", "--c8")


class MeasuredCut(NamedTuple):
    """A candidate of some size and what was measured of it: `{"value", "interval"}`."""

    name: str
    series: str
    nbytes: int
    removed: float | None
    measured: Mapping[str, Any]
    verdict: str


def size_curves(facts: RunFacts) -> list[Chart]:
    """A chart per metric, where two sizes or more were measured on the same rows."""
    gated = {gate["metric"] for gate in facts.evaluation.get("gates", ())}
    charts = []
    for name in DRAWN:
        cuts = measured_cuts(facts, name)
        if len({cut.nbytes for cut in cuts}) > 1 and (name == DRAWN[0] or name in gated):
            charts.append(_curve(facts, METRICS[name], cuts))
    return charts


def measured_cuts(facts: RunFacts, metric: str) -> list[MeasuredCut]:
    """Every cut that was measured on the rows that gave the verdict, the largest model first."""
    evaluation = facts.evaluation
    tried, searched = list(evaluation.get("candidates", ())), list(evaluation.get("search") or ())
    confirm = evaluation.get("confirm")
    if searched and confirm and _passed_first(evaluation):  # smaller cuts were then measured on the confirm rows
        chosen = next(entry for entry in tried if entry["name"] == confirm["candidate"])
        tried = [{**chosen, "metrics": confirm["metrics"], "verdict": confirm["verdict"]}]
    cuts = []
    for entry in (*tried, *searched):
        sizes, measured = facts.planned.get(entry["name"]), of_mix(entry, metric)
        nbytes = sizes.nbytes if sizes else entry.get("bytes")
        if measured and nbytes:
            cuts.append(
                MeasuredCut(
                    entry["name"], _series(entry["name"]), nbytes, entry.get("removed"), measured, entry["verdict"]
                )
            )
    return sorted(cuts, key=lambda cut: -cut.nbytes)


def _passed_first(evaluation: Mapping[str, Any]) -> bool:
    return any(entry["verdict"] == "pass" for entry in evaluation["candidates"])


def _series(name: str) -> str:
    """A candidate's name without its budget: `reap-global` of `reap-r0.5-global`."""
    return re.sub(r"-(r|keep)?\d+(\.\d+)?(?=-|$)", "", name, count=1)


def _curve(facts: RunFacts, metric: Metric, cuts: Sequence[MeasuredCut]) -> Chart:
    unit, scale = byte_unit(facts.base.nbytes)
    gate = next(
        (each for each in facts.evaluation["gates"] if (each["metric"], each["source"]) == (metric.name, UNION)), {}
    )
    limits = [gate[side] for side in ("min", "max") if gate.get(side) is not None]
    layout = {
        "shapes": [across(value, color="--text", width=1.5, dash="dash") for value in limits],
        "annotations": [_limit_label(metric, value) for value in limits],
        "xaxis": axis(f"size of the pruned weights, {unit}", zeroline=False, nticks=6),
        "yaxis": axis(metric.title, axis_form(metric), rangemode="tozero" if metric.same_as_base == 0 else "normal"),
    }
    data = list(_traces(facts, metric, cuts, scale))
    name = metric.name.replace("_", "-")
    return Chart(f"size-{name}", f"Size against {metric.title}", _sentence(facts, metric, cuts, limits), data, layout)


def _traces(facts: RunFacts, metric: Metric, cuts: Sequence[MeasuredCut], scale: float) -> Iterator[dict[str, Any]]:
    """The base, then a line with an interval at each cut for every way of pruning."""
    series = list(dict.fromkeys(cut.series for cut in cuts))
    for index, name in enumerate(series):
        own, color = [cut for cut in cuts if cut.series == name], COLORS[index % len(COLORS)]
        yield {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [cut.nbytes / scale for cut in own],
            "y": [cut.measured["value"] for cut in own],
            "error_y": error_bars([cut.measured for cut in own], color),
            "line": {"color": color, "width": 2},
            "marker": {
                "size": 9,
                "color": [f"--{TONES.get(cut.verdict, 'accent')}" for cut in own],
                "line": {"color": color, "width": 2},
            },
            "text": [f"{_named(cut)}: {with_interval(metric.name, cut.measured)}, {cut.verdict}" for cut in own],
            "hovertemplate": "%{text}<extra></extra>",
            "showlegend": True,
        }
    yield {
        "type": "scatter",
        "mode": "markers",
        "name": "base",
        "x": [facts.base.nbytes / scale],
        "y": [metric.same_as_base],
        "marker": {"size": 9, "color": "--neutral", "symbol": "square"},
        "cliponaxis": False,
        "hovertemplate": f"base: {human_bytes(facts.base.nbytes)}<extra></extra>",
        "showlegend": True,
    }


def _limit_label(metric: Metric, value: float) -> dict[str, Any]:
    return {
        "text": f"limit {shown(metric.name, value)}",
        "xref": "paper",
        "x": 1,
        "xanchor": "right",
        "y": value,
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 11, "color": "--muted"},
    }


def _named(cut: MeasuredCut) -> str:
    share = f", {percent(cut.removed, 0)} of the experts removed" if cut.removed is not None else ""
    return f"{cut.name} ({human_bytes(cut.nbytes)}{share})"


def _sentence(facts: RunFacts, metric: Metric, cuts: Sequence[MeasuredCut], limits: Sequence[float]) -> str:
    largest, smallest = cuts[0], cuts[-1]
    ends = (
        f"From {human_bytes(largest.nbytes)} to {human_bytes(smallest.nbytes)} (base:"
        f" {human_bytes(facts.base.nbytes)}) the {metric.title} goes from"
        f" {with_interval(metric.name, largest.measured)} to {with_interval(metric.name, smallest.measured)}."
    )
    passing = [cut for cut in cuts if cut.verdict == "pass"]
    if not passing:
        return f"{ends} No measured size passes every gate."
    within = f"The smallest size that passes every gate is {human_bytes(passing[-1].nbytes)} ({passing[-1].name})."
    return f"{ends} {within}" + (" The dashed line is this metric's limit." if limits else "")
