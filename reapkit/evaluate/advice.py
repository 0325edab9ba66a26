"""What an evaluation tells its reader: the table's rows, and what to change after a rejection. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Any

from reapkit.gates import PRESETS, UNION, GateResult, judge, overall, resolve

SHOWN = ("perplexity", "perplexity_ratio", "kl_mean", "top1_agreement", "conflict_rate_delta", "js_distance")


def summary_rows(evaluation: Mapping[str, Any], group: str = UNION) -> Iterator[dict[str, Any]]:
    """The rows of a terminal's table: base, candidates, controls and the confirmed choice, each at every length.

    `{"name", "role": "base" | "candidate" | "control" | "confirm", "length", "experts", "bytes", "rows", "verdict"}` and, for
    each of `SHOWN`, the value with its interval as `NAME_interval`; None where there is none. `group`: `all` or a source.
    """
    yield from _rows({"name": "base", "metrics": evaluation["base"]}, "base", group)
    for role, entries in (("candidate", evaluation["candidates"]), ("control", evaluation["controls"])):
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
        for metric in SHOWN:
            measurement = found.get(metric) or {"value": None, "interval": None}
            row |= {metric: measurement["value"], f"{metric}_interval": measurement["interval"]}
        yield row


def advice(evaluation: Mapping[str, Any]) -> str:
    """What happened and what to change, in a few lines: which gate, which source, by how much, what would pass."""
    chosen = next(entry for entry in evaluation["candidates"] if entry["name"] == evaluation["chosen"])
    confirm = evaluation["confirm"]
    overturned = confirm is not None and chosen["verdict"] == "pass" and confirm["verdict"] != "pass"
    judged = confirm if overturned else chosen
    where = " on the confirm rows, after passing on the others" if overturned else ""
    if evaluation["verdict"] == "pass":
        return "\n".join([f"{chosen['name']} passes every gate.", *_weak_sources(chosen)])
    tried = [entry for entry in evaluation["candidates"] if entry["metrics"] is not None]
    among = f"None of {len(tried)} candidates passes; nearest is" if len(tried) > 1 else "The candidate"
    if evaluation["verdict"] == "undecided":
        return "\n".join([f"{among} {chosen['name']}: undecided{where}. The intervals straddle the limits:",
                          *_failures(judged, "undecided"), *_more_samples(judged, evaluation)])
    return "\n".join(
        [
            f"{among} {chosen['name']}: rejected{where}.",
            *_failures(judged, "reject"),
            *_weak_sources(judged),
            "What to change: prune less (a lower prune.ratio, or smaller values in prune.candidates.ratio), calibrate on "
            "more of what is lost (calibration.mix, calibration.samples), or accept more loss (evaluate.gates)."
            + _looser_preset(judged),
        ]
    )


def _failures(judged: Mapping[str, Any], verdict: str) -> list[str]:
    return [f"  {GateResult.from_json(entry)}" + (f", {entry['excess']:.4g} beyond it" if verdict == "reject" else "")
            for entry in judged["gates"] if entry["verdict"] == verdict]


def _weak_sources(judged: Mapping[str, Any]) -> list[str]:
    """Sources that alone would break a limit that the union is held to: an average hides them."""
    lines = []
    for result in map(GateResult.from_json, judged["gates"]):
        for source, found in judged["metrics"].get(result.pack, {}).items():
            measurement = found.get(result.gate.metric)
            if result.gate.source == UNION != source and measurement is not None and result.gate.breaks(measurement["value"]):
                lines.append(f"  {source} alone: {result.gate.metric} {measurement['value']:.4g} at {result.pack} tokens, "
                             f"limit {result.gate.limit}")
    return lines


def _more_samples(judged: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    undecided = [entry for entry in judged["gates"] if entry["verdict"] == "undecided"]
    known = [entry for entry in undecided if entry["more_rows"] is not None]
    if not known:
        return ["What to change: raise evaluate.packs.samples; these rows are too few to say how many it would take."]
    worst = max(known, key=lambda entry: entry["more_rows"] / entry["rows"])
    factor = 1 + worst["more_rows"] / worst["rows"]
    samples = evaluation.get("pack_samples")
    target = f" from {samples} to about {ceil(samples * factor)}" if samples else f" about {factor:.1f}-fold"
    return [f"What to change: it would take about {worst['more_rows']} more rows beside the {worst['rows']} measured: raise "
            f"evaluate.packs.samples{target}, or prune less, or set evaluate.on_undecided: warn."]


def _looser_preset(judged: Mapping[str, Any]) -> str:
    measured: Mapping[str, Any] = judged["metrics"]
    passing: Sequence[str] = [name for name in PRESETS if overall(judge(measured, resolve(name))) == "pass"]
    return f" It would pass {passing[0]}." if passing else " It passes no preset."
