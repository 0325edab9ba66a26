"""Measured numbers as people read them, and where a run keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from reapkit.core.formatting import percent
from reapkit.report.facts import RunFacts

METRICS = {
    "perplexity_ratio": "perplexity against the base",
    "kl_mean": "mean KL from the base",
    "top1_agreement": "same most likely token",
    "conflict_rate_delta": "change of confident conflicts",
    "loop_share_delta": "change of looping continuations",
}
SHARES = ("top1_agreement", "conflict_rate_delta", "loop_share_delta")
TONES = {"pass": "good", "reject": "bad", "undecided": "warn"}


def heading(metric: str) -> str:
    """A metric's name as a title."""
    name = METRICS.get(metric, metric)
    return name[0].upper() + name[1:]


def shown(metric: str, value: float | None) -> str:
    """A metric's value: shares in percent, ratios and KL as numbers."""
    if value is None:
        return "–"
    if metric in SHARES:
        return percent(value, 2 if "delta" in metric else 1)
    return f"{value:.4f}" if metric == "kl_mean" else f"{value:.3f}"


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


def badge(verdict: str) -> Markup:
    """A verdict as a coloured word."""
    return Markup('<span class="verdict {}">{}</span>').format(TONES.get(verdict, "info"), verdict)


def generated(facts: RunFacts) -> list[tuple[str, str, Mapping[str, Any] | None, Mapping[str, Any]]]:
    """(group, metric, base's, candidate's) for every share measured on free continuations of the chosen candidate, else
    nothing."""
    evaluation = facts.evaluation or {}
    chosen = next(
        (entry for entry in evaluation.get("candidates", ()) if entry["name"] == evaluation.get("chosen")), {}
    )
    base = evaluation.get("base_generation") or {}
    return [
        (group, metric, base.get(group, {}).get(metric), found)
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
    return list((facts.verification or {}).get("rows", ()))


def measured_models(facts: RunFacts) -> dict[str, Mapping[str, Any]]:
    """{model: {length: {group: metrics}}} of what was written, else of the chosen candidate as a mask on the base."""
    written = (facts.verification or {}).get("metrics") or {}
    if found := {name: metrics for name, metrics in written.items() if name != "base" and metrics}:
        return found
    evaluation = facts.evaluation or {}
    if confirm := evaluation.get("confirm"):
        return {f"{confirm['candidate']} (mask)": confirm["metrics"]}
    chosen = next(
        (entry for entry in evaluation.get("candidates", ()) if entry["name"] == evaluation.get("chosen")), None
    )
    return {f"{chosen['name']} (mask)": chosen["metrics"]} if chosen and chosen.get("metrics") else {}
