"""The sections that compare the result with more than its base: equal bytes, speed and memory, task benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reapkit.core.formatting import count, human_bytes
from reapkit.evaluation.gates import UNION
from reapkit.evaluation.metrics.table import METRICS, in_view
from reapkit.quantization.engines import ENGINES
from reapkit.report.blocks import LEFT, RIGHT, Note, PageSection, PageTable
from reapkit.report.facts import RunFacts
from reapkit.report.measures import shown, verified_rows, with_interval

SPEEDS = tuple(metric for metric in METRICS.values() if metric.kind == "throughput")


def equal_bytes(facts: RunFacts) -> PageSection | None:
    """The unpruned model quantized alone to about the result's bytes, beside the result."""
    control = facts.verification.get("equal_bytes")
    if not control:
        return None
    blocks: list[Any] = [Note(*verdict_of_equal_bytes(facts))]
    if control["metrics"]:
        final = verified_rows(facts)[-1]
        pack = max(control["metrics"], key=int)
        own = facts.verification["metrics"][final["name"]][pack][UNION]
        both = (
            (f"the result ({final['name']})", final["bytes"], own),
            (f"the base in {control['scheme']}", control["bytes"], control["metrics"][pack][UNION]),
        )
        columns = [("", LEFT), ("size", RIGHT), *((metric.label, RIGHT) for metric in in_view("distances"))]
        blocks.append(
            PageTable(
                columns,
                [
                    (
                        name,
                        human_bytes(nbytes),
                        *(with_interval(metric.name, found.get(metric.name)) for metric in in_view("distances")),
                    )
                    for name, nbytes, found in both
                ],
            )
        )
    return PageSection(
        "equal-bytes",
        "The same size by quantizing alone",
        blocks,
        "What it would have cost to quantize the whole model to about the same size, measured on the same rows.",
        "Same bytes",
    )


def verdict_of_equal_bytes(facts: RunFacts) -> tuple[str, str]:
    """(tone, sentence): which of the two is nearer to the base, or why there is nothing to compare with."""
    control = facts.verification["equal_bytes"]
    if not control["metrics"]:
        return "info", control["note"]
    pack = max(control["metrics"], key=int)
    own = facts.verification["metrics"][verified_rows(facts)[-1]["name"]][pack][UNION]["kl_mean"]
    other = control["metrics"][pack][UNION]["kl_mean"]
    numbers = f"mean KL {shown('kl_mean', other['value'])} against {shown('kl_mean', own['value'])}"
    if own["interval"] and other["interval"] and own["interval"][1] < other["interval"][0]:
        return "good", f"{control['note']} It is further from the base than the result: {numbers}."
    if own["interval"] and other["interval"] and other["interval"][1] < own["interval"][0]:
        return (
            "warn",
            (
                f"{control['note']} It is closer to the base than the result: {numbers}. Here quantizing alone is"
                " better."
            ),
        )
    return "info", f"{control['note']} The two do not differ measurably on these rows: {numbers}."


def speed(facts: RunFacts) -> PageSection | None:
    """Prefill and decode speed and peak memory of base and result, by each engine that was there."""
    found = facts.verification.get("throughput")
    if not found:
        return None
    columns = [("model", LEFT), ("engine", LEFT), *((metric.label, RIGHT) for metric in SPEEDS), ("remark", LEFT)]
    return PageSection(
        "speed", "Speed and memory", [PageTable(columns, list(speed_rows(found)))], speed_lead(found), "Speed"
    )


def speed_lead(found: list[Mapping[str, Any]]) -> str:
    """What was run, in a sentence."""
    measured = next((row for row in found if not row["not_measured"]), None)
    if measured is None:
        return "Requested, but not measured."
    return (
        f"One row of {measured['prompt_tokens']} random tokens was read at once, then {measured['new_tokens']}"
        f" generated one by one, on {measured['device']}; medians of {measured['repeats']} runs. Each model ran in its"
        " own process, one after another. Other work on the machine changes these numbers."
    )


def speed_rows(found: list[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Cells of `speed`: model, engine, prefill, decode, peak memory, remark."""
    for row in found:
        engine = f"{ENGINES[row['engine']].name} {row.get('version', '')}".strip()
        if row["not_measured"]:
            why = f"not measured: {row['not_measured'].splitlines()[0]}"
            yield row["model"], engine, *("–" for _ in SPEEDS), why
            continue
        idle = f"{human_bytes(row['idle_bytes'])} of it before the model" if row["idle_bytes"] else ""
        yield (
            row["model"],
            engine,
            *(metric.show(row[metric.name] or None) for metric in SPEEDS),
            "; ".join(filter(None, [idle, row["note"]])),
        )


def benchmarks(facts: RunFacts) -> PageSection | None:
    """lm-eval's own metrics of base and result."""
    found = facts.verification.get("lm_eval")
    if not found:
        return None
    columns = [("task", LEFT), ("metric", LEFT), *((name, RIGHT) for name in found)]
    first = next(iter(found.values()))
    limit = f"the first {count(first['limit'])} documents of each task" if first["limit"] else "all documents"
    lead = (
        f"By lm-eval {first['lm_eval']} on {limit}, at most {count(first['max_new_tokens'])} new tokens; its own output"
        " lies beside verify.json."
    )
    return PageSection(
        "benchmarks", "Task benchmarks", [PageTable(columns, list(benchmark_rows(found)))], lead, "Tasks"
    )


def benchmark_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Task, metric, then each model's value with lm-eval's standard error."""
    tasks = next(iter(found.values()))["tasks"]
    for task, metrics in tasks.items():
        for metric in (name for name in metrics if "_stderr" not in name):
            yield task, metric, *(_score(each["tasks"].get(task, {}), metric) for each in found.values())


def _score(metrics: Mapping[str, float], metric: str) -> str:
    name, _, rest = metric.partition(",")
    error = metrics.get(f"{name}_stderr" + (f",{rest}" if rest else ""))
    return "–" if metric not in metrics else f"{metrics[metric]:.3f}" + (f" ± {error:.3f}" if error is not None else "")
