"""Formats measured numbers for people, and finds them in a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from reapkit.core.formatting import percent
from reapkit.evaluation.gates import UNION
from reapkit.evaluation.metrics.metric import Metric
from reapkit.evaluation.metrics.table import metric_of
from reapkit.report.facts import RunFacts

TONES = {"pass": "good", "reject": "bad", "undecided": "warn"}


def shown(metric: str, value: float | None) -> str:
    """A metric's value: shares in percent, ratios and KL as numbers."""
    return metric_of(metric).show(value)


def axis_form(metric: Metric) -> str:
    """How an axis writes a metric's values, in d3's notation: shares in percent, a digit less than tables show."""
    return f".{metric.digits - 1}%" if metric.is_share else ""


def with_interval(metric: str, measurement: Mapping[str, Any] | None) -> str:
    """`1.034 (1.020 to 1.051)`."""
    if measurement is None:
        return "–"
    interval = measurement.get("interval")
    between = f" ({shown(metric, interval[0])} to {shown(metric, interval[1])})" if interval else ""
    return shown(metric, measurement["value"]) + between


def limit(metric: str, gate: Mapping[str, Any]) -> str:
    """`at most 1.050`, `at least 93.0 %`, `-0.20 % to 0.20 %`."""
    low, high = gate.get("min"), gate.get("max")
    if low is not None and high is not None:
        return f"{shown(metric, low)} to {shown(metric, high)}"
    return f"at most {shown(metric, high)}" if high is not None else f"at least {shown(metric, low)}"


def of_mix(entry: Mapping[str, Any], metric: str) -> Mapping[str, Any] | None:
    """A candidate's metric over the whole mix, at the longest rows."""
    metrics = entry.get("metrics") or {}
    return metrics[max(metrics, key=int)].get(UNION, {}).get(metric) if metrics else None


def badge(verdict: str, tone: str | None = None) -> Markup:
    """A verdict as a coloured word; its own tone, or this one."""
    return Markup('<span class="verdict {}">{}</span>').format(tone or TONES.get(verdict, "info"), verdict)


class ContinuationShare(NamedTuple):
    """A share of free continuations, `{"value", "interval"}`, of the base, the chosen candidate as a mask and the
    quantized model (None where it wrote none)."""

    group: str
    metric: str
    base: Mapping[str, Any] | None
    mask: Mapping[str, Any]
    quantized: Mapping[str, Any] | None


def generated(facts: RunFacts) -> list[ContinuationShare]:
    """Every share measured on free continuations of the chosen candidate, else nothing."""
    evaluation = facts.evaluation
    chosen = next(
        (entry for entry in evaluation.get("candidates", ()) if entry["name"] == evaluation.get("chosen")), {}
    )
    base = evaluation.get("base_generation") or {}
    quantized = (facts.verification.get("continuations") or {}).get("generation", {})
    return [
        ContinuationShare(group, metric, base.get(group, {}).get(metric), found, quantized.get(group, {}).get(metric))
        for group, metrics in (chosen.get("generation") or {}).items()
        for metric, found in metrics.items()
        if isinstance(found, Mapping) and not metric.endswith("_delta") and metric in base.get(group, {})
    ]


def share_with_interval(measurement: Mapping[str, Any] | None) -> str:
    """`18.8 % (8.3 % to 29.2 %)`."""
    if measurement is None or measurement.get("value") is None:
        return "–"
    interval = measurement.get("interval")
    return percent(measurement["value"]) + (f" ({percent(interval[0])} to {percent(interval[1])})" if interval else "")


def verified_rows(facts: RunFacts) -> list[Mapping[str, Any]]:
    """The verification's rows: base, pruned, quantized."""
    return list(facts.verification.get("rows", ()))


def measured_models(facts: RunFacts) -> dict[str, Mapping[str, Any]]:
    """{model: {length: {group: metrics}}} of what was written, else of the chosen candidate as a mask on the base."""
    written = facts.verification.get("metrics") or {}
    if found := {name: metrics for name, metrics in written.items() if name != "base" and metrics}:
        return found
    evaluation = facts.evaluation
    if confirm := evaluation.get("confirm"):
        return {f"{confirm['candidate']} (mask)": confirm["metrics"]}
    chosen = next(
        (entry for entry in evaluation.get("candidates", ()) if entry["name"] == evaluation.get("chosen")), None
    )
    return {f"{chosen['name']} (mask)": chosen["metrics"]} if chosen and chosen.get("metrics") else {}
