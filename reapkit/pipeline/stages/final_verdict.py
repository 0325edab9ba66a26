"""Judges the final directory by `gates_quantized`, and says what would help where it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.evaluation.advice import final_advice
from reapkit.evaluation.equal_bytes import next_scheme
from reapkit.evaluation.gates import judge, overall
from reapkit.pipeline.stages.context import Context
from reapkit.pipeline.stages.evaluate import gates_of


def judged(
    context: Context, metrics: dict[str, Any], continuations: Mapping[str, Mapping[str, Any] | None]
) -> tuple[str, list[dict[str, Any]], str]:
    """The verdict on the last directory, each gate's result, and what to do about it. `metrics` by directory, and
    continuations of those that wrote some."""
    recipe, gates = context.recipe, gates_of(context.recipe.evaluate.gates_quantized, context)
    if not gates:
        return "not judged", [], ""
    texts = {name: {"generation": each["generation"]} for name, each in continuations.items() if each is not None}
    measured = {name: each | texts.get(name, {}) for name, each in metrics.items()}
    results = judge(list(measured.values())[-1], gates)
    verdict = overall(results)
    return (
        verdict,
        [result.to_json() for result in results],
        (
            ""
            if verdict == "pass"
            else final_advice(
                results,
                judge(measured["pruned"], gates) if "quantized" in measured else None,
                method=recipe.quantize.method,
                next_scheme=_next_scheme(context),
                removed=_removed(context),
                samples=recipe.evaluate.packs.samples,
            )
        ),
    )


def _next_scheme(context: Context) -> tuple[str, float] | None:
    if "quantize" not in context.inputs:
        return None
    nbytes = Checkpoint.open(context.inputs["quantize"].payload).nbytes
    return next_scheme(Checkpoint.open(context.inputs["prune"].payload), context.recipe.quantize, nbytes)


def _removed(context: Context) -> float:
    """The share of routed experts that the pruning took."""
    before = sum(context.plan.base.experts.values())
    return 1 - sum(map(int, context.inputs["prune"].summary["experts"].values())) / before
