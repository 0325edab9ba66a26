"""The part of a model card that says what was measured and proved, and what was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reapkit.core.formatting import count, human_bytes, listed, plural
from reapkit.evaluation.gates import UNION
from reapkit.evaluation.metrics.table import in_view
from reapkit.report.comparison_sections import SPEEDS, benchmark_rows, speed_lead, speed_rows, verdict_of_equal_bytes
from reapkit.report.facts import RunFacts
from reapkit.report.markdown import table
from reapkit.report.measures import generated, measured_models, share_with_interval, verified_rows, with_interval


def results(facts: RunFacts, which: str) -> str:
    rows = [row for row in verified_rows(facts) if row["name"] in ("base", which)]
    if len(rows) == 2:
        return _verified_results(facts, rows, which)
    return _mask_results(facts)


def _verified_results(facts: RunFacts, rows: Sequence[Mapping[str, Any]], which: str) -> str:
    finals = table(
        ("Model", "Size", *(metric.heading for metric in in_view("final"))),
        [
            (
                row["name"],
                human_bytes(row["bytes"]),
                *(metric.show(row.get(metric.name)) for metric in in_view("final")),
            )
            for row in rows
        ],
    )
    text = (
        "## Results\n\nMeasured on held-out rows of the calibration's sources, with the directory loaded from"
        f" disk.\n\n{finals}"
    )
    metrics = measured_models(facts).get(which)
    return "\n\n".join(
        part
        for part in (
            text,
            _by_source(metrics) if metrics else "",
            _equal_bytes(facts, which),
            _speed(facts, which),
            _benchmarks(facts, which),
        )
        if part
    )


def _equal_bytes(facts: RunFacts, which: str) -> str:
    """The control at the same bytes, on the card of the model it was sized for."""
    measured = facts.verification.get("equal_bytes") and verified_rows(facts)[-1]["name"] == which
    return verdict_of_equal_bytes(facts)[1] if measured else ""


def _speed(facts: RunFacts, which: str) -> str:
    found = [row for row in facts.verification.get("throughput") or () if row["model"] in ("base", which)]
    if {row["model"] for row in found} != {"base", which} or all(row["not_measured"] for row in found):
        return ""
    speeds = table(("Model", "Engine", *(metric.heading for metric in SPEEDS), "Remark"), list(speed_rows(found)))
    return f"### Speed and memory\n\n{speed_lead(found)}\n\n{speeds}"


def _benchmarks(facts: RunFacts, which: str) -> str:
    found = {name: each for name, each in (facts.verification.get("lm_eval") or {}).items() if name in ("base", which)}
    if which not in found:
        return ""
    first = found[which]
    limit = f"first {count(first['limit'])} documents of each" if first["limit"] else "all documents"
    return f"### Task benchmarks (lm-eval {first['lm_eval']}, {limit})\n\n" + table(
        ("Task", "Metric", *found), list(benchmark_rows(found))
    )


def _mask_results(facts: RunFacts) -> str:
    found = measured_models(facts)
    if not found:
        return "## Results\n\nThis run measured nothing on this model."
    metrics = next(iter(found.values()))
    return (
        "## Results\n\nThe written directory itself was not measured. Measured was the same selection as a mask on the"
        f" base model, before quantization, on held-out rows.\n\n{_by_source(metrics)}"
    )


def _by_source(metrics: Mapping[str, Any]) -> str:
    pack = max(metrics, key=int)
    shown = in_view("distances")
    rows = [
        (
            "all of the mix" if group == UNION else group,
            *(with_interval(metric.name, found.get(metric.name)) for metric in shown),
        )
        for group, found in metrics[pack].items()
    ]
    return f"By source, rows of {pack} tokens, 95 % intervals in parentheses:\n\n" + table(
        ("Source", *(metric.heading for metric in shown)), rows
    )


def proofs(facts: RunFacts, which: str) -> str:
    """What the verify stage proved on the directories behind this model; what it could not test is left out."""
    wanted = ("pruned", "quantized")[: 1 if which == "pruned" else 2]
    found = [
        proof
        for proof in facts.verification.get("proofs", ())
        if proof["directory"] in wanted and proof["passed"] and proof.get("measured", True)
    ]
    lines = [f"- {proof['directory']}, {proof['name']}: {proof['detail']}" for proof in found]
    return "### Proved on the written directories, in a fresh process\n\n" + "\n".join(lines) if lines else ""


def limits(facts: RunFacts, which: str) -> str:
    sources = [entry.name for entry in facts.recipe.calibration.mix]
    extra = [entry.name for entry in facts.recipe.evaluate.extra_packs]
    outside = f" and, outside the calibration, {listed(extra, 12)}" if extra else ""
    lines = [
        (
            f"Quality was compared with the base model on {listed(sources, 12)}{outside}. What is not listed was not"
            " measured: pruning may have cost languages, domains and skills that these rows do not exercise."
        ),
        (
            "Perplexity, KL and agreement say how close the model is to its base on given text; they are no benchmark"
            " scores."
        ),
    ]
    if not generated(facts):
        lines.append("Free generation (loops, broken tool calls) was not measured.")
    if facts.recipe.evaluate.lm_eval is None:
        lines.append("No task benchmark was run.")
    lines += [
        f"Free continuations that loop: {share_with_interval(each.base)} of the base's,"
        f" {share_with_interval(each.mask)} of the pruned model's (as a mask)"
        + (
            f", {share_with_interval(each.quantized)} of this one's."
            if each.quantized and which == "quantized"
            else "."
        )
        for each in generated(facts)
        if each.group == UNION and each.metric == "loop_share"
    ]
    lines += _verdicts(facts, which)
    if never := (facts.selection.details.get("never_routed") if facts.selection else None):
        lines.append(
            f"{plural(sum(map(len, never.values())), 'expert')} received no calibration token and ranked last."
        )
    return "### Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _verdicts(facts: RunFacts, which: str) -> list[str]:
    """What the gates said of the pruning, judged as a mask, and of the final directory."""
    words = {"pass": "passed", "reject": "were not passed", "undecided": "were left undecided"}
    lines = []
    if said := words.get(facts.evaluation.get("verdict", "")):
        lines.append(f"The recipe's gates for the pruning {said}, judged as a mask on the base model.")
    final = facts.verification.get("verdict")
    if which == "quantized" and final:
        lines.append(
            f"The recipe's gates for the quantized model {words[final]}."
            if final in words
            else "The recipe set no gates for the quantized model."
        )
        lines += [f"It breaks a limit that the pruning kept: {result}." for result in facts.outcome.breaking]
    return lines
