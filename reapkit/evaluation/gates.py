"""Defines gates, the limits that a candidate must keep against the base, and judges measured intervals by them.
Torch-free.

A measurement is `{"value": float, "interval": [low, high] | None}`; the interval is a paired bootstrap interval over
rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from math import ceil
from typing import Any, Literal

from reapkit.core.errors import Problem, RecipeError
from reapkit.evaluation.metrics.table import is_generation
from reapkit.recipe.schema import GatesSpec

Verdict = Literal["pass", "reject", "undecided", "not measured"]

UNION = "all"
"""The group of all sources of the calibration mix together."""

PRESETS: dict[str, dict[str, dict[str, float]]] = {
    "strict": {
        "perplexity_ratio": {"max": 1.01},
        "kl_mean": {"max": 0.01},
        "top1_agreement": {"min": 0.97},
        "conflict_rate_delta": {"min": -0.002, "max": 0.002},
        "loop_share_delta": {"max": 0.0},
    },
    "near-lossless": {
        "perplexity_ratio": {"max": 1.05},
        "kl_mean": {"max": 0.05},
        "top1_agreement": {"min": 0.93},
        "conflict_rate_delta": {"min": -0.002, "max": 0.002},
        "loop_share_delta": {"max": 0.0},
    },
    "size-first": {"perplexity_ratio": {"max": 1.5}, "kl_mean": {"max": 0.5}, "top1_agreement": {"min": 0.7}},
}
"""Limits by preset and metric, against the base, over the union of the sources, at every pack length."""


@dataclass(frozen=True)
class Gate:
    """One limit: `min` ≤ metric ≤ `max` for one source or the union; `required` ones may be neither unmeasured nor
    undecided (see `overall`)."""

    metric: str
    max: float | None = None
    min: float | None = None
    source: str = UNION
    required: bool = True

    @property
    def limit(self) -> str:
        """The limit in words: `≤ 1.05`, `≥ 0.93`, `-0.002 to 0.002`."""
        return _limit(self.min, self.max)

    def breaks(self, value: float) -> bool:
        """Whether a value, taken as exact, lies beyond the limit."""
        return (self.max is not None and value > self.max) or (self.min is not None and value < self.min)


def _limit(least: float | None, most: float | None) -> str:
    if least is not None and most is not None:
        return f"{least:g} to {most:g}"
    return f"≤ {most:g}" if most is not None else f"≥ {least:g}"


@dataclass(frozen=True)
class GateResult:
    """What one gate said of one pack: numbers, verdict and, if undecided, how many more rows it would probably take."""

    gate: Gate
    pack: str
    value: float | None
    interval: tuple[float, float] | None
    verdict: Verdict
    excess: float | None = None
    """How far the value lies beyond the limit; negative: the room left."""
    rows: int | None = None
    more_rows: int | None = None

    def __str__(self) -> str:
        gate = self.gate
        if self.value is None:
            return f"{gate.metric} of {gate.source}: not measured (limit {gate.limit})"
        between = "" if self.interval is None else f" [{self.interval[0]:.4g}, {self.interval[1]:.4g}]"
        where = f"{gate.source}, {self.pack}" + (" tokens" if self.pack.isdigit() else "")
        return f"{gate.metric} {self.value:.4g}{between} ({where}), limit {gate.limit}: {self.verdict}"

    def to_json(self) -> dict[str, Any]:
        """Flat: the gate's fields, its limit in words, then the result's."""
        own = {name: value for name, value in vars(self).items() if name != "gate"}
        return {
            **asdict(self.gate),
            "limit": self.gate.limit,
            **own,
            "interval": None if self.interval is None else list(self.interval),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GateResult:
        gate = Gate(**{name: data[name] for name in ("metric", "max", "min", "source", "required")})
        own = {name: data[name] for name in ("pack", "value", "verdict", "excess", "rows", "more_rows")}
        return cls(gate, interval=None if data["interval"] is None else tuple(data["interval"]), **own)


def resolve(gates: str | GatesSpec | Mapping[str, Any] | None, sources: Iterable[str] = ()) -> tuple[Gate, ...]:
    """The gates a recipe names: a preset, or limits by metric, optionally on top of a preset and for single sources.

    `{"preset": "near-lossless", "kl_mean": {"max": 0.1, "sources": {"tools": {"max": 0.02}}}}`; a metric given there
    replaces the preset's. `None` gives no gates. `sources` are the known names; without any they are not checked.
    Raises RecipeError listing every unknown preset and source, and bounds without a number.
    """
    if gates is None:
        return ()
    if isinstance(gates, str):
        return tuple(
            Gate(metric, limit.get("max"), limit.get("min"), required=not is_generation(metric))
            for metric, limit in _preset(gates).items()
        )
    limits = dict(gates if isinstance(gates, Mapping) else gates.model_dump(exclude_none=True))
    resolved = {(gate.metric, gate.source): gate for gate in resolve(limits.pop("preset", None))}
    for metric, limit in limits.items():
        bounds = {source: dict(bound) for source, bound in (limit.get("sources") or {}).items()}
        if own := {name: limit[name] for name in ("max", "min") if limit.get(name) is not None}:
            bounds = {UNION: own} | bounds
        resolved |= {(metric, source): Gate(metric, source=source, **bound) for source, bound in bounds.items()}
    if problems := _problems(resolved.values(), tuple(sources)):
        raise RecipeError(problems)
    return tuple(resolved.values())


def _problems(gates: Iterable[Gate], sources: tuple[str, ...]) -> list[Problem]:
    problems = []
    for gate in gates:
        path = f"evaluate.gates.{gate.metric}" + ("" if gate.source == UNION else f".sources.{gate.source}")
        if sources and gate.source not in (UNION, *sources):
            problems.append(
                Problem(
                    path, f"'{gate.source}' is not a source of the mix or of extra_packs. Known: {', '.join(sources)}."
                )
            )
        if gate.max is None and gate.min is None:
            problems.append(Problem(path, "the limit has no number. Give max or min."))
    return problems


def _preset(name: str) -> dict[str, dict[str, float]]:
    if name not in PRESETS:
        close = get_close_matches(name, PRESETS, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise RecipeError([Problem("evaluate.gates", f"'{name}' is not a preset. Known: {', '.join(PRESETS)}.{hint}")])
    return PRESETS[name]


def judge(measured: Mapping[str, Mapping[str, Mapping[str, Any]]], gates: Sequence[Gate]) -> list[GateResult]:
    """Each gate's results, one per pack that it applies to.

    `measured[pack][source][metric]` is a measurement; packs are lengths as text and `generation`. One rule for all
    gates: pass where the interval lies inside the limit, reject where it lies outside, else undecided; without an
    interval (fewer than two rows) undecided. A metric that was not measured is undecided where the gate is required.
    What an undecided gate means for the candidate is `overall`'s.
    """
    results = []
    for gate in gates:
        packs = [name for name in measured if (name == "generation") == is_generation(gate.metric)]
        found = [(name, measured[name].get(gate.source)) for name in packs]
        found = [(name, group) for name, group in found if group is not None and group.get(gate.metric) is not None]
        if not found:
            results.append(GateResult(gate, "", None, None, "undecided" if gate.required else "not measured"))
        results += [_judge(gate, pack, group[gate.metric], group.get("rows")) for pack, group in found]
    return results


def _judge(gate: Gate, pack: str, measurement: Mapping[str, Any], rows: int | None) -> GateResult:
    value, interval = measurement["value"], measurement.get("interval")
    low, high = interval if interval is not None else (float("-inf"), float("inf"))
    least = float("-inf") if gate.min is None else gate.min
    most = float("inf") if gate.max is None else gate.max
    excess = max(value - most, least - value)
    verdict: Verdict = "undecided"
    if low > most or high < least:
        verdict = "reject"
    elif least <= low and high <= most:
        verdict = "pass"
    more = _more_rows(value, interval, gate, rows) if verdict == "undecided" else None
    return GateResult(gate, pack, value, None if interval is None else (low, high), verdict, excess, rows, more)


def _more_rows(value: float, interval: Sequence[float] | None, gate: Gate, rows: int | None) -> int | None:
    """Rows to add until the interval straddles no limit, its sides shrinking with 1/√rows; None: no telling."""
    if interval is None or not rows:
        return None
    low, high = interval
    straddled = [limit for limit in (gate.min, gate.max) if limit is not None and low < limit < high]
    if not straddled or value in straddled:
        return None
    sides = [(high - value if limit > value else value - low) / abs(limit - value) for limit in straddled]
    return max(1, ceil(rows * max(sides) ** 2 - 1e-6) - rows)


def overall(results: Iterable[GateResult]) -> Verdict:
    """One verdict for a candidate: any rejection rejects, any doubt about a required gate leaves it undecided, else it
    passes.

    The limits on generated text that a preset brings are not required: the usual number of prompts can show a collapse,
    not a small change. They reject, and while they are undecided the candidate passes and its advice says so; a limit
    that the recipe itself sets counts in full.
    """
    results = list(results)
    if any(result.verdict == "reject" for result in results):
        return "reject"
    return "undecided" if any(result.verdict == "undecided" and result.gate.required for result in results) else "pass"
