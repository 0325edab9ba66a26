"""The sections about quality after pruning: candidates against gates, then source by source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from reapkit.core.formatting import extreme, human_bytes, listed
from reapkit.evaluation.gates import UNION
from reapkit.evaluation.metrics.metric import Metric
from reapkit.evaluation.metrics.table import METRICS, in_view, metric_of
from reapkit.report.blocks import LEFT, RIGHT, Chart, Folded, Grid, Note, PageSection, PageTable
from reapkit.report.charts import axis, names_axis, upright, whiskers
from reapkit.report.facts import RunFacts
from reapkit.report.measures import (
    TONES,
    ContinuationShare,
    axis_form,
    badge,
    generated,
    limit,
    measured_models,
    of_mix,
    share_with_interval,
    shown,
    with_interval,
)
from reapkit.report.size_curve import size_curves

# ---------------------------------------------------------------------------------------------- gates


def gates(facts: RunFacts) -> PageSection | None:
    """Every candidate against every gate."""
    evaluation = facts.evaluation
    if not evaluation or not evaluation.get("gates"):
        return None
    metrics = [metric for metric in dict.fromkeys(gate["metric"] for gate in evaluation["gates"]) if metric in METRICS]
    charts = [chart for metric in metrics for chart in _gate_charts(evaluation, METRICS[metric])]
    blocks: list[Any] = [Grid(charts, wide=True)] if charts else []
    if curves := size_curves(facts):
        blocks.append(Grid(curves, wide=True))
    if bought := _bought(evaluation):
        blocks.append(bought)
    chosen = _chosen(evaluation)
    blocks.append(results_table(f"{chosen['name']}, gate by gate", chosen["gates"]))
    if len(evaluation["candidates"]) > 1 or evaluation.get("search"):
        blocks.append(_candidate_table(facts, evaluation))
    if confirm := evaluation.get("confirm"):
        blocks.append(
            results_table(
                f"{confirm['candidate']} again on the confirm rows, which took no part in choosing it", confirm["gates"]
            )
        )
    lead = (
        "Candidates were measured as masks on the loaded model, before any weight was written. Whiskers are 95 %"
        " intervals over resampled rows."
    )
    return PageSection("gates", "Candidates against the gates", blocks, lead, "Gates")


def _chosen(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(entry for entry in evaluation["candidates"] if entry["name"] == evaluation["chosen"])


def _bought(evaluation: Mapping[str, Any]) -> Note | None:
    """What the criterion bought: how much more the same budget loses under each control, paired row by row."""
    chosen, lines, tone = _chosen(evaluation), [], "good"
    own = of_mix(chosen, "kl_mean")
    for control in evaluation.get("controls", ()):
        kl, gain = of_mix(control, "kl_mean"), _gain(control)
        if not own or not kl:
            continue
        values = f"{shown('kl_mean', kl['value'])} against {shown('kl_mean', own['value'])}"
        said = f"{control['criterion']}: mean KL {values}"
        low, high = (gain or {}).get("interval") or (kl["value"] - own["value"],) * 2
        if low > 0:
            lines.append(f"{said}, {kl['value'] / max(own['value'], 1e-12):.3g} times as much.")
        elif high < 0:
            tone = "warn"
            lines.append(
                f"{said}: the other criterion loses less. On this model and mix, try saliency.criterion:"
                f" {control['criterion']}."
            )
        else:
            tone = "warn" if tone == "warn" else "info"
            lines.append(f"{said}: no measurable difference on these rows.")
    return (
        Note(tone, title=f"{chosen['criterion']} against other criteria at the same budget", items=lines)
        if lines
        else None
    )


def _gain(control: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """By how much more a control loses than the chosen candidate, in mean KL over the mix at the longest rows."""
    against = control.get("against") or {}
    return against[max(against, key=int)][UNION]["kl_mean_delta"] if against else None


def _gate_charts(evaluation: Mapping[str, Any], metric: Metric) -> Iterator[Chart]:
    """Candidates and controls on one metric over the mix, with its limits; nothing where it was not measured."""
    gate = next(
        (gate for gate in evaluation["gates"] if gate["metric"] == metric.name and gate["source"] == UNION), None
    )
    entries = [
        (entry, of_mix(entry, metric.name)) for entry in (*evaluation["candidates"], *evaluation.get("controls", ()))
    ]
    entries = [(entry, measured) for entry, measured in entries if measured]
    if not entries or gate is None:
        return
    found = [measured for _, measured in entries]
    judged = [entry in evaluation["candidates"] for entry, _ in entries]
    names = [
        entry["name"] if ours else f"{entry['criterion']} (control)"
        for (entry, _), ours in zip(entries, judged, strict=True)
    ]
    colors = [
        f"--{TONES.get(entry.get('verdict', ''), 'accent')}" if ours else "--neutral"
        for (entry, _), ours in zip(entries, judged, strict=True)
    ]
    data = [whiskers(names, found, [with_interval(metric.name, measured) for measured in found], colors)]
    limits = [gate[side] for side in ("min", "max") if gate.get(side) is not None]
    layout = {
        "shapes": [upright(value, color="--text", width=1.5, dash="dash") for value in limits],
        "margin": {"l": 20, "b": 28},
        "xaxis": axis(form=axis_form(metric), nticks=5, zeroline=False),
        "yaxis": names_axis(showgrid=False),
    }
    sentence = _gate_sentence(metric.name, gate, names, found, max(evaluation["base"], key=int, default="–"))
    yield Chart(f"gate-{metric.name.replace('_', '-')}", metric.heading, sentence, data, layout, 56 + 32 * len(names))


def _gate_sentence(
    metric: str, gate: Mapping[str, Any], names: Sequence[str], found: Sequence[Mapping[str, Any]], length: str
) -> str:
    values = [measured["value"] for measured in found]
    least, most = (gate.get(side) for side in ("min", "max"))
    inside = [
        name
        for name, value in zip(names, values, strict=True)
        if (most is None or value <= most) and (least is None or value >= least)
    ]
    worst = extreme(values, names, largest=most is not None)
    last = (
        f"{worst[0]} is {'highest' if most is not None else 'lowest'} with {shown(metric, worst[1])}."
        if len(names) > 1
        else f"Measured: {with_interval(metric, found[0])}."
    )
    within = f"Inside it: {listed(inside)}" if inside else "No measured candidate is inside the limit"
    return f"Limit {limit(metric, gate)} over all sources, {length} tokens per row. {within}. {last}"


def results_table(title: str, results: Sequence[Mapping[str, Any]]) -> PageTable:
    """Each gate's limit, what was measured, and the margin left or lacking."""
    rows = []
    for entry in results:
        metric, excess = entry["metric"], entry.get("excess")
        margin = "–" if excess is None else f"{shown(metric, abs(excess))} {'beyond' if excess > 0 else 'to spare'}"
        value = with_interval(metric, entry) if entry.get("value") is not None else "not measured"
        rows.append(
            (
                metric_of(metric).title,
                entry["source"],
                entry["pack"] or "–",
                limit(metric, entry),
                value,
                margin,
                badge(entry["verdict"]),
            )
        )
    columns = [
        ("gate", LEFT),
        ("source", LEFT),
        ("row length", RIGHT),
        ("limit", RIGHT),
        ("measured", RIGHT),
        ("margin", RIGHT),
        ("verdict", LEFT),
    ]
    return PageTable(columns, rows, title)


def _candidate_table(facts: RunFacts, evaluation: Mapping[str, Any]) -> PageTable:
    rows, searched = [], sorted(evaluation.get("search") or (), key=lambda entry: -entry["removed"])
    for entry in (*evaluation["candidates"], *searched):
        sizes = facts.planned.get(entry["name"])
        failed = [
            f"{result['metric']} ({result['source']})"
            for result in entry["gates"]
            if result["verdict"] in ("reject", "undecided")
        ]
        why = (
            listed(dict.fromkeys(failed), 3)
            if failed
            else "larger than one that passed"
            if entry["metrics"] is None
            else ""
        )
        said = [part for part in ("tried after the rejection" if entry in searched else "", why) if part]
        rows.append(
            (
                entry["name"],
                entry.get("experts", "–"),
                human_bytes(sizes.nbytes if sizes else entry.get("bytes")),
                badge(entry["verdict"]),
                ": ".join(said) or "–",
            )
        )
    columns = [("candidate", LEFT), ("experts", RIGHT), ("size", RIGHT), ("verdict", LEFT), ("why", LEFT)]
    return PageTable(columns, rows, "Every candidate, smallest first")


# ---------------------------------------------------------------------------------------------- source by source


def quality(facts: RunFacts) -> PageSection | None:
    """Each source's loss with its interval: what an average over the mix hides."""
    models = measured_models(facts)
    if not models:
        return None
    length = max(next(iter(models.values())), key=int)
    found = {name: metrics[length] for name, metrics in models.items()}
    charts = [_source_chart(found, metric) for metric in in_view("distances")]
    metrics = in_view("final")
    rows = [
        (
            "all of the mix" if group == UNION else group,
            name,
            *(with_interval(metric.name, groups[group].get(metric.name)) for metric in metrics),
        )
        for group in next(iter(found.values()))
        for name, groups in found.items()
        if group in groups
    ]
    columns = [("source", LEFT), ("model", LEFT), *((metric.label, RIGHT) for metric in metrics)]
    lead = f"Held-out rows of {length} tokens; whiskers are 95 % intervals." + (
        " These rows took no part in any decision."
        if facts.verification and facts.recipe.evaluate.packs.confirm
        else ""
    )
    blocks: list[Any] = [Grid(charts[:2], wide=True), *charts[2:], Folded("All numbers", [PageTable(columns, rows)])]
    if written := generated(facts):
        union = [each for each in written if each.group == UNION]
        by_source = [each for each in written if each.group != UNION]
        blocks += [
            _generation_table(facts, union, "Free continuations of held-out prompts"),
            Folded("Continuations, source by source", [_generation_table(facts, by_source)]),
            *_examples(facts),
        ]
    return PageSection("quality", "Quality, source by source", blocks, lead, "Quality")


def _generation_table(facts: RunFacts, written: Sequence[ContinuationShare], title: str = "") -> PageTable:
    quantized = any(each.quantized for each in written)
    rows = [
        (
            "all of the mix" if each.group == UNION else each.group,
            metric_of(each.metric).label,
            share_with_interval(each.base),
            share_with_interval(each.mask),
            *([share_with_interval(each.quantized)] if quantized else []),
        )
        for each in written
    ]
    columns = [("source", LEFT), ("share of continuations", LEFT), ("base", RIGHT), (f"{facts.chosen} (mask)", RIGHT)]
    return PageTable([*columns, ("quantized", RIGHT)] if quantized else columns, rows, title)


def _examples(facts: RunFacts) -> list[Folded]:
    """The same prompt continued by base, candidate and quantized model, side by side."""
    examples = _chosen(facts.evaluation).get("examples") or ()
    if not examples:
        return []
    final = (facts.verification.get("continuations") or {}).get("examples", ())
    quantized = {(each["source"], each["prompt"]): each["text"] for each in final}
    said = [
        (each["prompt"], each["base"], each["candidate"])
        + ((quantized.get((each["source"], each["prompt"]), "–"),) if quantized else ())
        for each in examples
    ]
    rows = [
        (each["source"], *(Markup("<pre>{}</pre>").format(text) for text in texts))
        for each, texts in zip(examples, said, strict=True)
    ]
    columns = [("source", LEFT), ("prompt", LEFT), ("base", LEFT), (f"{facts.chosen} (mask)", LEFT)]
    return [
        Folded("What the models wrote", [PageTable([*columns, ("quantized", LEFT)] if quantized else columns, rows)])
    ]


def _source_chart(found: Mapping[str, Mapping[str, Any]], metric: Metric) -> Chart:
    """Every group of every model on one metric; `found`: {model: {group: metrics}}."""
    data = []
    for index, (name, groups) in enumerate(found.items()):
        measured = {group: each[metric.name] for group, each in groups.items() if metric.name in each}
        labels = [with_interval(metric.name, each) for each in measured.values()]
        names = ["all" if group == UNION else group for group in measured]
        color = f"--c{index + 1}"
        data.append(
            whiskers(
                names,
                list(measured.values()),
                labels,
                color,
                name=name,
                symbol=("circle", "diamond")[index % 2],
                whisker=color,
            )
        )
    last, groups = list(found.items())[-1]
    base = metric.same_as_base
    layout = {
        "shapes": [] if base is None else [upright(base, color="--muted", width=1, dash="dot")],
        "margin": {"l": 20, "b": 28},
        "xaxis": axis(form=axis_form(metric), nticks=6, zeroline=False),
        "yaxis": names_axis(),
    }
    return Chart(
        f"source-{metric.name.replace('_', '-')}",
        metric.heading,
        _source_sentence(last, groups, metric),
        data,
        layout,
        90 + 30 * len(groups),
    )


def _source_sentence(model: str, groups: Mapping[str, Any], metric: Metric) -> str:
    name = metric.name
    sources = [group for group in groups if group != UNION and name in groups[group]]
    over = (
        f"{model}: {metric.show(groups[UNION][name]['value'])} over the mix" if name in groups.get(UNION, {}) else model
    )
    if len(sources) < 2:
        return f"{over}."
    worst, _ = extreme([groups[group][name]["value"] for group in sources], sources, largest=metric.better != "higher")
    return f"{over}; {worst} loses most with {with_interval(name, groups[worst][name])}."
