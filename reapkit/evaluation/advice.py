"""Writes what an evaluation tells its reader: the rows of the table, and what to change after a rejection.
Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from math import ceil
from textwrap import wrap
from typing import Any

from reapkit.core.formatting import human_bytes, percent
from reapkit.evaluation.gates import PRESETS, UNION, Gate, GateResult, judge, overall, resolve
from reapkit.evaluation.metrics.power import detectable_rise
from reapkit.evaluation.metrics.table import in_view, is_generation, metric_of

WIDTH = 80


def summary_rows(evaluation: Mapping[str, Any], group: str = UNION) -> Iterator[dict[str, Any]]:
    """The rows of a terminal's table: base, candidates, what was tried after a rejection, controls and the confirmed
    choice, each at every length.

    `{"name", "role": "base" | "candidate" | "searched" | "control" | "confirm", "length", "experts", "bytes", "rows",
    "verdict"}` and, for each metric of the view `summary`, the value with its interval as `NAME_interval`; None where
    there is none. `group`: `all` or a source.
    """
    yield from _rows({"name": "base", "metrics": evaluation["base"]}, "base", group)
    for role, entries in (
        ("candidate", evaluation["candidates"]),
        ("searched", evaluation.get("search") or ()),
        ("control", evaluation["controls"]),
    ):
        for entry in entries:
            yield from _rows(entry, role, group)
    if (confirm := evaluation["confirm"]) is not None:
        described = next(entry for entry in evaluation["candidates"] if entry["name"] == confirm["candidate"])
        yield from _rows({"name": "base", "metrics": confirm["base"]}, "confirm", group)
        yield from _rows({**described, **confirm}, "confirm", group)


def _rows(entry: Mapping[str, Any], role: str, group: str) -> Iterator[dict[str, Any]]:
    for length, groups in (entry["metrics"] or {"-": {}}).items():
        found = groups.get(group, {})
        row = {
            "name": entry["name"],
            "role": role,
            "length": length,
            "experts": entry.get("experts"),
            "bytes": entry.get("bytes"),
            "rows": found.get("rows"),
            "verdict": entry.get("verdict"),
        }
        for metric in in_view("summary"):
            measurement = found.get(metric.name) or {"value": None, "interval": None}
            row |= {metric.name: measurement["value"], f"{metric.name}_interval": measurement["interval"]}
        yield row


def advice(evaluation: Mapping[str, Any]) -> str:
    """What happened and what to change, in lines of a terminal: which gate, which source, by how much, what would
    pass."""
    chosen = next(entry for entry in evaluation["candidates"] if entry["name"] == evaluation["chosen"])
    confirm, verdict = evaluation["confirm"], evaluation["verdict"]
    overturned = confirm if confirm and chosen["verdict"] == "pass" and confirm["verdict"] != "pass" else None
    judged = overturned or chosen
    if verdict == "pass":
        doubtful = _doubtful(chosen, evaluation)
        passes = "passes; not every gate could be decided:" if doubtful else "passes every gate."
        return "\n".join([f"{chosen['name']} {passes}", *doubtful, *_weak_sources(judged)])
    tried = [entry for entry in evaluation["candidates"] if entry["metrics"] is not None]
    among = f"None of {len(tried)} candidates passes the gates; nearest is" if len(tried) > 1 else "The candidate"
    said = {"reject": "rejected", "undecided": "undecided"}[verdict]
    where = " on the confirm rows, after passing on the others" if overturned else ""
    why = [] if verdict == "reject" else ["Its intervals straddle the limits, so these rows cannot tell:"]
    changes = _changes(judged, chosen, evaluation) if verdict == "reject" else _more_samples(judged, evaluation)
    return "\n".join(
        [
            f"{among} {chosen['name']} ({chosen['experts']} experts kept): {said}{where}.",
            *why,
            *gate_lines(judged["gates"], verdict),
            *_worst_sources(judged, verdict, evaluation.get("outside", ())),
            *_found(evaluation),
            *changes,
        ]
    )


def gate_lines(results: Sequence[Mapping[str, Any]], verdict: str) -> list[str]:
    """The gates with this verdict as an aligned table, and what their metrics mean."""
    found = [entry for entry in results if entry["verdict"] == verdict]
    rows = [("gate", "source", "row length", "measured", "limit", "beyond by"), *map(_cells, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return table + [
        f"  {metric}: {meaning}"
        for metric in dict.fromkeys(entry["metric"] for entry in found)
        if (meaning := metric_of(metric).meaning)
    ]


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    value, interval = entry["value"], entry["interval"]
    between = f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else ""
    pack = entry["pack"] if entry["pack"].isdigit() else "prompts" if entry["pack"] else "-"
    return (
        entry["metric"],
        entry["source"],
        pack,
        "not measured" if value is None else f"{value:.4g}{between}",
        entry["limit"],
        f"{entry['excess']:.3g}" if entry["excess"] is not None and entry["excess"] > 0 else "-",
    )


def _worst_sources(judged: Mapping[str, Any], verdict: str, outside: Sequence[str] = ()) -> list[str]:
    """Beside each gate on the union that failed, the source of the union that is furthest beyond it, on the rows that
    failed most."""
    worst: dict[str, tuple[float, str]] = {}
    for result in map(GateResult.from_json, judged["gates"]):
        metric, groups = result.gate.metric, judged["metrics"].get(result.pack, {})
        values = {
            source: found[metric]["value"]
            for source, found in groups.items()
            if source not in (UNION, *outside) and metric in found
        }
        if result.verdict == verdict and result.gate.source == UNION and len(values) > 1:
            source = max(values, key=lambda name: _beyond(result.gate, values[name]))
            by, said = _beyond(result.gate, values[source]), f"{metric} {values[source]:.4g} ({source})"
            worst[metric] = max(worst.get(metric, (by, said)), (by, said))
    said = ", ".join(said for _, said in worst.values())
    return wrap(f"worst source: {said}", WIDTH, initial_indent="  ", subsequent_indent="    ") if worst else []


def _beyond(gate: Gate, value: float) -> float:
    """How far a value lies beyond the limit, negative inside it."""
    return max(
        value - gate.max if gate.max is not None else float("-inf"),
        gate.min - value if gate.min is not None else float("-inf"),
    )


def _found(evaluation: Mapping[str, Any]) -> list[str]:
    """The nearest candidate that passes, where the budgets below the rejected one were searched."""
    if not (tried := evaluation.get("search")):
        return []
    if (nearest := _nearest_passing(evaluation)) is None:
        return wrap(
            f"None of the smaller cuts that were tried passes either: {', '.join(entry['name'] for entry in tried)}.",
            WIDTH,
            subsequent_indent="  ",
        )
    size = f", {human_bytes(nearest['bytes'])}" if nearest["bytes"] else ""
    return [f"Nearest candidate that passes: {nearest['name']} ({nearest['experts']} experts kept{size})."]


def _nearest_passing(evaluation: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The one that removes most of those that were found to pass after the rejection."""
    passing = [entry for entry in evaluation.get("search") or () if entry["verdict"] == "pass"]
    return max(passing, key=lambda entry: entry["removed"], default=None)


def _doubtful(chosen: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    """Gates that passed nothing and rejected nothing: what these prompts can show, and how many would decide."""
    lines = []
    for result in map(GateResult.from_json, chosen["gates"]):
        if result.verdict == "undecided" and result.value is not None:
            said = f"{result}. {power(result, evaluation)}".strip()
            lines += wrap(said, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return lines


def power(result: GateResult, evaluation: Mapping[str, Any]) -> str:
    """What the number of prompts behind a change of a share can show, and how many would decide; nothing elsewhere."""
    base = (evaluation.get("base_generation") or {}).get(result.gate.source, {})
    share, prompts = base.get(result.gate.metric.removesuffix("_delta")), result.rows
    if not is_generation(result.gate.metric) or share is None or not prompts:
        return ""
    least = detectable_rise(share["value"], prompts)
    more = f"; about {prompts + result.more_rows} would decide" if result.more_rows else ""
    return f"{prompts} prompts show a rise of {percent(least)} or more over the base's {percent(share['value'])}{more}."


def _weak_sources(judged: Mapping[str, Any]) -> list[str]:
    """Sources that alone would break a limit that the union is held to: an average hides them."""
    lines = []
    for result in map(GateResult.from_json, judged["gates"]):
        for source, found in judged["metrics"].get(result.pack, {}).items():
            measurement = found.get(result.gate.metric)
            if (
                result.gate.source == UNION != source
                and measurement is not None
                and result.gate.breaks(measurement["value"])
            ):
                lines.append(
                    f"  {source} alone: {result.gate.metric} {measurement['value']:.4g} on rows of {result.pack}, "
                    f"limit {result.gate.limit}"
                )
    return lines


def _changes(judged: Mapping[str, Any], chosen: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    """Overrides for the command line, what keeps the size first; none of them observes the model again."""
    options = [
        *_better_criterion(chosen, evaluation),
        *((step["override"], step["why"]) for step in evaluation.get("steps", {}).get("same_size", ())),
        *_smaller_ratios(chosen, evaluation),
        *_more_of_the_worst(judged, evaluation),
        *_looser_preset(judged),
    ]
    lines = ["What to change: repeat the command with one of these (the observation is kept):"]
    for override, why in options:
        lines += [f"  {why}:", f"    --set {override}"]
    return lines


def _smaller_ratios(chosen: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The ratio that was found to pass; where none was searched, half of what was removed (in a grid also a quarter and
    an eighth), at least one expert."""
    removed, fewest = chosen.get("removed"), 1 / max(chosen.get("num_experts") or 1, 1)
    if evaluation.get("search"):
        nearest = _nearest_passing(evaluation)
        if nearest is None:
            return []
        why = f"prune {nearest['ratio']} instead of {removed:.4g}; it passed on the same rows"
        return [(_budget([nearest["ratio"]], chosen, evaluation), why)]
    ratios = [f"{removed / part:.4g}" for part in (2, 4, 8) if removed and removed / part >= fewest]
    if not ratios:
        return []
    grid = evaluation.get("steps", {}).get("grid")
    why = f"prune less than {removed:.4g}" + ("; the smallest that passes is taken" if grid else "")
    return [(_budget(ratios if grid else ratios[:1], chosen, evaluation), why)]


def _budget(ratios: Sequence[str], chosen: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """The override that sets these budgets in the field that the recipe uses."""
    steps = evaluation.get("steps", {})
    if steps.get("grid"):
        return f"'prune.candidates.ratio=[{', '.join(ratios)}]'"
    field, ratio = steps.get("budget", "ratio"), Decimal(ratios[0])
    if field == "keep_experts":
        return f"prune.keep_experts={chosen['num_experts'] - int(ratio * chosen['num_experts'])}"
    return f"prune.keep_ratio={1 - ratio}" if field == "keep_ratio" else f"prune.ratio={ratio}"


def _better_criterion(chosen: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A control of the same budget that loses significantly less."""
    better = [
        (gain["value"], entry["criterion"])
        for entry in evaluation["controls"]
        if (gain := _gain(entry)) and gain["interval"] and gain["interval"][1] < 0
    ]
    if not better:
        return []
    name = min(better)[1]
    gates = [Gate(**gate) for gate in evaluation["gates"] if not is_generation(gate["metric"])]
    measured = next(entry["metrics"] for entry in evaluation["controls"] if entry["criterion"] == name)
    said = {"pass": " and passes", "reject": ", but is rejected too"}.get(overall(judge(measured, gates)), "")
    return [(f"saliency.criterion={name}", f"{name} loses less than {chosen['criterion']} at the same budget{said}")]


def _gain(control: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """By how much a control's mean KL exceeds the chosen candidate's over the union, at the longest rows."""
    against = control.get("against") or {}
    return against[max(against, key=int)][UNION]["kl_mean_delta"] if against else None


def _more_of_the_worst(judged: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The source that lost most, at twice its share of the saliency, where one clearly stands out."""
    groups = judged["metrics"][max(judged["metrics"], key=int)]
    inside = {
        name: found for name, found in groups.items() if name != UNION and name not in evaluation.get("outside", ())
    }
    if len(inside) < 2:
        return []
    worst = max(inside, key=lambda name: inside[name]["kl_mean"]["value"])
    if inside[worst]["kl_mean"]["value"] < 1.5 * groups[UNION]["kl_mean"]["value"]:
        return []
    weights = {name: found["positions"] * (2 if name == worst else 1) for name, found in inside.items()}
    shares = ", ".join(f"{name}: {weight / sum(weights.values()):.2g}" for name, weight in weights.items())
    return [(f"'saliency.mix={{{shares}}}'", f"{worst} lost most; count it twice when experts are ranked")]


def _looser_preset(judged: Mapping[str, Any]) -> list[tuple[str, str]]:
    measured: Mapping[str, Any] = judged["metrics"]
    passing = [name for name in PRESETS if overall(judge(measured, resolve(name))) == "pass"]
    return (
        [(f"evaluate.gates={passing[0]}", f"accept more loss; it passes {passing[0]}")]
        if passing
        else [("evaluate.on_reject=warn", "write it all the same, to look at it (it passes no preset)")]
    )


def _more_samples(judged: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    """How many more rows would tell, and what to set for that."""
    warn = ["  or go on without knowing:", "    --set evaluate.on_undecided=warn"]
    undecided = [entry for entry in judged["gates"] if entry["verdict"] == "undecided"]
    known = [entry for entry in undecided if entry["more_rows"] is not None]
    samples = evaluation.get("pack_samples")
    unmeasured = dict.fromkeys(
        entry["metric"] for entry in undecided if entry["value"] is None and is_generation(entry["metric"])
    )
    if unmeasured:
        return [
            "What to change:",
            f"  {', '.join(unmeasured)} cannot be measured where layers stream; judge by the others:",
            *(f"    --set evaluate.gates.{metric}=null" for metric in unmeasured),
            *warn,
        ]
    if not known:
        return [
            "What to change:",
            "  measure on more samples; these rows are too few to say how many it would take:",
            f"    --set evaluate.packs.samples={2 * samples if samples else 'N'}",
            *warn,
        ]
    worst = max(known, key=lambda entry: entry["more_rows"] / entry["rows"])
    if is_generation(worst["metric"]):
        return [
            "What to change:",
            f"  generate from about {worst['more_rows']} more prompts beside these {worst['rows']}:",
            f"    --set evaluate.generation.prompts={worst['rows'] + worst['more_rows']}",
            *_said_power(worst, evaluation),
            *warn,
        ]
    target = ceil(samples * (1 + worst["more_rows"] / worst["rows"])) if samples else "N"
    return [
        "What to change:",
        f"  measure on about {worst['more_rows']} more rows beside these {worst['rows']}:",
        f"    --set evaluate.packs.samples={target}",
        *warn,
    ]


def _said_power(entry: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    said = power(GateResult.from_json(entry), evaluation)
    return wrap(said, WIDTH, initial_indent="  ", subsequent_indent="  ") if said else []


def final_advice(
    results: Sequence[GateResult],
    pruned: Sequence[GateResult] | None,
    *,
    method: str | None = None,
    next_scheme: tuple[str, float] | None = None,
    removed: float | None = None,
    samples: int | None = None,
) -> str:
    """What to tell of a final directory that its gates did not pass: which gates, whose fault it is, the cheapest next
    step.

    `pruned`: the same gates on the pruned directory where the final one is quantized. `next_scheme`: the next larger
    one and its bytes as a multiple of the present ones. `removed`: the share of experts that was pruned.
    """
    entries, verdict = [result.to_json() for result in results], overall(results)
    said = {"reject": "rejected", "undecided": "undecided"}[verdict]
    lines = [f"The final model is {said} by evaluate.gates_quantized:", *gate_lines(entries, verdict)]
    if verdict == "undecided":
        return "\n".join([*lines, *_more_samples({"gates": entries}, {"pack_samples": samples})])
    steps = []
    if pruned is None or overall(pruned) == "reject":
        lines += [] if pruned is None else ["The pruned model alone breaks them too, so no scheme will do."]
        steps.append(("prune less", f"prune.ratio={(removed or 0) / 2:.4g}"))
    else:
        lines.append("The pruned model alone does not break them: what is lost is lost by quantizing.")
        steps += [("calibrated rounding at the same size", "quantize.method=gptq")] if method == "rtn" else []
        if next_scheme is not None:
            name, times = next_scheme
            steps.append((f"the cheapest next scheme, {times:.2f} times these bytes", f"quantize.scheme={name}"))
        else:
            steps.append(("no larger scheme is left: keep the pruned model as it is", "quantize.scheme=null"))
    return "\n".join(
        [
            *lines,
            "What to change:",
            *(line for why, override in steps for line in (f"  {why}:", f"    --set {override}")),
        ]
    )
