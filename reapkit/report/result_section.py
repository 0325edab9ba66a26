"""The section about a run's result: sizes and quality before and after, or why it stopped."""

from __future__ import annotations

from textwrap import dedent

from reapkit.core.formatting import arrow, human_bytes, human_count, human_experts, percent, signed_percent
from reapkit.evaluation.metrics.table import in_view
from reapkit.planning.plan import Sizes
from reapkit.report.blocks import LEFT, RIGHT, Chart, Code, Note, PageSection, PageTable, Tiles
from reapkit.report.charts import rows as lying_bars
from reapkit.report.facts import RunFacts
from reapkit.report.measures import TONES, verified_rows


def result(facts: RunFacts) -> PageSection:
    """Before and after, in one table and one chart; of a stopped run why it stopped."""
    if facts.stopped:
        lead = "No weight was written. These are the sizes that the candidates would have had."
        return PageSection(
            "result", "Before and after", [*rejection(facts), _tiles(facts), _before_after(facts)], lead, "Result"
        )
    unseen = facts.verification and facts.recipe.evaluate.packs.confirm
    lead = (
        "Measured on held-out rows that took no part in any decision."
        if unseen
        else "Measured on held-out rows."
        if facts.verification
        else ""
    )
    blocks = [*_judged(facts), _tiles(facts), _before_after(facts), _size_chart(facts)]
    return PageSection("result", "Before and after", blocks, lead, "Result")


def _judged(facts: RunFacts) -> list[Note | Code]:
    """What was judged, by which gates, and the limits that the final directory does not keep."""
    found = facts.outcome
    breaking = [Code("\n".join(map(str, found.breaking)), "Limits that the final directory does not keep")]
    return [Note(found.tone, found.sentence), *(breaking if found.breaking else [])]


def rejection(facts: RunFacts) -> list[Note | Code]:
    """Which gate, which source, by how much, what to change: the evaluation's own advice, whose last lines are there to
    be copied."""
    evaluation = facts.evaluation
    verdict = evaluation.get("verdict", "not judged")
    title = {
        "reject": "Rejected by the gates: nothing was written.",
        "undecided": "Undecided: nothing was written.",
        "pass": "The evaluation passed; the run ended before it wrote the model.",
    }.get(verdict, "The run ended before the evaluation.")
    tone = TONES.get(verdict, "info")
    said, _, details = str(evaluation.get("advice") or "").partition("\n")
    first = next((line.strip() for line in details.splitlines() if line.strip().startswith("--set ")), None)
    return [
        Note(tone, said, title) if said else Note(tone, title),
        *([Code(dedent(details), "Why, and what to change")] if details else []),
        *([Code(f"{facts.command} {first}", "The first of these, to paste")] if first else []),
    ]


def _written(facts: RunFacts) -> dict[str, Sizes]:
    if facts.stopped:
        return {"base": facts.base, **facts.planned}
    found = {"base": facts.base, "pruned": facts.pruned, "quantized": facts.quantized}
    return {name: sizes for name, sizes in found.items() if sizes is not None}


def _tiles(facts: RunFacts) -> Tiles:
    base, final = facts.base, facts.quantized or facts.pruned or facts.planned.get(facts.chosen or "") or facts.base
    removed = 1 - sum(final.experts.values()) / sum(base.experts.values())
    items = [
        (
            "experts per layer",
            arrow(human_experts(base.experts), human_experts(final.experts)),
            f"{percent(removed, 0)} removed",
        ),
        (
            "size on disk",
            arrow(human_bytes(base.nbytes), human_bytes(final.nbytes)),
            f"{base.nbytes / final.nbytes:.2f} times smaller",
        ),
        (
            "parameters",
            arrow(human_count(base.parameters), human_count(final.parameters)),
            f"{arrow(human_count(base.active_parameters), human_count(final.active_parameters))} active",
        ),
    ]
    measured = verified_rows(facts)
    if len(measured) > 1:
        first, last = measured[0], measured[-1]
        change = signed_percent(last["perplexity_ratio"] - 1)
        items += [
            ("perplexity", arrow(f"{first['perplexity']:.3f}", f"{last['perplexity']:.3f}"), change),
            ("top-1 agreement", percent(last["top1_agreement"]), f"mean KL {last['kl_mean']:.4f}"),
        ]
    return Tiles(items)


def _before_after(facts: RunFacts) -> PageTable:
    measured = {row["name"]: row for row in verified_rows(facts)}
    columns = [("", LEFT), ("experts", RIGHT), ("parameters", RIGHT), ("active", RIGHT), ("size", RIGHT)]
    if measured:
        columns += [(metric.label, RIGHT) for metric in in_view("final")]
    rows = []
    for name, sizes in _written(facts).items():
        row = [
            name,
            human_experts(sizes.experts),
            human_count(sizes.parameters),
            human_count(sizes.active_parameters),
            f"{human_bytes(sizes.nbytes)} ({percent(sizes.nbytes / facts.base.nbytes, 0)})",
        ]
        if measured:
            found = measured.get(name, {})
            row += [metric.show(found.get(metric.name)) for metric in in_view("final")]
        rows.append(row)
    return PageTable(columns, rows)


def _size_chart(facts: RunFacts) -> Chart:
    sizes = {name: size.nbytes for name, size in _written(facts).items()}
    gone = facts.base.nbytes - list(sizes.values())[-1]
    sentence = f"{human_bytes(gone)} of {human_bytes(facts.base.nbytes)} were saved"
    if facts.quantized and gone:
        sentence += (
            f": {percent((facts.base.nbytes - sizes['pruned']) / gone, 0)} of that by pruning, the rest by quantizing"
        )
    colors = ["--neutral", "--accent", "--c3"][: len(sizes)]
    data = [lying_bars(list(sizes), list(sizes.values()), colors, [human_bytes(size) for size in sizes.values()])]
    layout = {
        "xaxis": {"showticklabels": False, "showgrid": False, "zeroline": False, "ticks": ""},
        "yaxis": {"showgrid": False},
        "margin": {"b": 8},
        "bargap": 0.35,
    }
    return Chart("sizes", "Size on disk", f"{sentence}.", data, layout, 60 + 42 * len(sizes))
