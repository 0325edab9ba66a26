"""Judges the final directory by `gates_quantized`, and says what would help where it fails."""

from __future__ import annotations

from typing import Any

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.evaluation.advice import final_advice
from reapkit.evaluation.equal_bytes import next_scheme
from reapkit.evaluation.gates import judge, overall
from reapkit.pipeline.stages.context import Context
from reapkit.pipeline.stages.evaluate import gates_of


def judged(context: Context, metrics: dict[str, Any]) -> tuple[str, list[dict[str, Any]], str]:
    """The verdict on the last directory, each gate's result, and what to do about it."""
    recipe, gates = context.recipe, gates_of(context.recipe.evaluate.gates_quantized, context)
    if not gates:
        return "not judged", [], ""
    results = judge(list(metrics.values())[-1], gates)
    verdict = overall(results)
    return (
        verdict,
        [result.to_json() for result in results],
        (
            ""
            if verdict == "pass"
            else final_advice(
                results,
                judge(metrics["pruned"], gates) if "quantized" in metrics else None,
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
