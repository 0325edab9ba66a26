"""The sections about a run: decisions, data, proofs, and how to repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from reapkit.core.formatting import arrow, count, extreme, listed, percent, plural, ranges, seconds
from reapkit.report.blocks import LEFT, RIGHT, Chart, Code, Folded, Note, PageSection, PageTable
from reapkit.report.charts import axis
from reapkit.report.charts import rows as lying_bars
from reapkit.report.facts import RunFacts, StageRow
from reapkit.report.measures import badge
from reapkit.report.quality_sections import results_table
from reapkit.selection.selection import TABLE

FACTS = [("", LEFT), ("", LEFT)]


# ---------------------------------------------------------------------------------------------- decision


def decision(facts: RunFacts) -> PageSection | None:
    """How experts were chosen, who was protected and what was close."""
    selection = facts.selection
    if selection is None:
        return None
    details = selection.details
    protected = {
        name: sum(map(len, layers.values())) for name, layers in (details.get("protected") or {}).items() if layers
    }
    dropped = sum(len(layer.drop) for layer in selection.layers.values())
    experts = sum(len(layer.drop) + len(layer.keep) for layer in selection.layers.values())
    rows = [
        (
            "criterion",
            f"{selection.criterion}: {details['formula']}" if details.get("formula") else selection.criterion,
        ),
        ("candidate", facts.chosen),
        ("dropped", f"{count(dropped)} of {count(experts)} experts in {plural(len(selection.layers), 'layer')}"),
        ("allocation", details.get("allocation", "uniform")),
        ("protected", listed(f"{size} {name}" for name, size in protected.items())),
        (
            "near-ties",
            f"{plural(len(details.get('near_ties') or ()), 'pair')} that may be decided differently on another device",
        ),
    ]
    if selection.table_layers:
        rows.append(("layers kept whole", f"{ranges(selection.table_layers)} ({TABLE})"))
    if details.get("mix"):
        rows.append(("post-hoc mix", listed((f"{name} {weight}" for name, weight in details["mix"].items()), 12)))
    if selection.experts_per_token:
        rows.append(
            ("experts per token", arrow(str(facts.model.num_experts_per_tok), str(selection.experts_per_token)))
        )
    by_layer = [
        (layer, f"{len(chosen.keep)} of {len(chosen.keep) + len(chosen.drop)}", listed(chosen.drop, 1000))
        for layer, chosen in selection.layers.items()
    ]
    every = PageTable([("layer", RIGHT), ("kept", RIGHT), ("dropped", LEFT)], by_layer)
    blocks = [PageTable(FACTS, rows, narrow=True), Folded("Every dropped expert, layer by layer", [every])]
    return PageSection("decision", "What was decided", blocks, "", "Decision")


# ---------------------------------------------------------------------------------------------- calibration


def calibration(facts: RunFacts) -> PageSection | None:
    """What the model read: each source's share, hash and one sample with its scored stretches marked."""
    found = facts.calibration
    if not found:
        return None
    sources = found["sources"]
    scored = sum(source["scored_tokens"] for source in sources)
    rows = [
        (
            source["name"],
            source["source"],
            *(count(source[name]) for name in ("samples", "rows", "tokens", "scored_tokens")),
            percent(source["scored_tokens"] / scored if scored else None, 0),
        )
        for source in sources
    ]
    columns = [
        ("name", LEFT),
        ("source", LEFT),
        ("samples", RIGHT),
        ("rows", RIGHT),
        ("tokens", RIGHT),
        ("scored", RIGHT),
        ("share", RIGHT),
    ]
    hashes = PageTable(
        [("source", LEFT), ("assistant spans found by", LEFT), ("sha256 of its samples", LEFT)],
        [(source["name"], source.get("spans_text") or "–", _code(source["sha256"])) for source in sources],
    )
    blocks: list[Any] = [PageTable(columns, rows), Folded("Hashes and spans", [hashes])]
    if examples := [
        Code(_marked(source["example"]), f"{source['name']}: what is scored is highlighted")
        for source in sources
        if source.get("example")
    ]:
        blocks.append(Folded("A sample of each source", examples))
    lead = (
        f"Rows of up to {found.get('max_length', '–')} tokens, packing {found.get('packing', '–')}, scored:"
        f" {found.get('score', '–')}, seed {found.get('seed', '–')}."
        + (f" Weights are shares of {found['balance'].replace('_', ' ')}." if found.get("balance") else "")
        + (f" Chat templates see {found['date']}." if found.get("date") else "")
    )
    return PageSection("calibration", "Calibration mix", blocks, lead, "Calibration")


def _marked(example: Sequence[Sequence[Any]]) -> Markup:
    parts = (Markup("<mark>{}</mark>") if assistant else Markup("{}") for _, assistant in example)
    return Markup("").join(part.format(text) for part, (text, _) in zip(parts, example, strict=True))


def _code(text: str) -> Markup:
    return Markup("<code>{}</code>").format(text)


# ---------------------------------------------------------------------------------------------- proofs, stages,
# reproduce


def proofs(facts: RunFacts) -> PageSection | None:
    """What the verify stage checked on the written directories in a fresh process."""
    found = facts.verification.get("proofs")
    if not found:
        return None
    tested = [proof for proof in found if proof.get("measured", True)]
    held, untested = sum(bool(proof["passed"]) for proof in tested), len(found) - len(tested)
    said = f"{held} of {plural(len(tested), 'proof')} hold." + (
        f" {plural(untested, 'claim')} could not be tested here." if untested else ""
    )
    rows = [
        (
            proof["directory"],
            proof["name"],
            badge("pass" if proof["passed"] else "reject") if proof in tested else "not tested",
            proof.get("detail", ""),
        )
        for proof in found
    ]
    table = PageTable([("directory", LEFT), ("proof", LEFT), ("verdict", LEFT), ("detail", LEFT)], rows)
    blocks: list[Any] = [Note("good" if held == len(tested) else "bad", said), table]
    if results := facts.verification.get("gates"):
        blocks.append(results_table("The final directory against its own gates", results))
    lead = "The directories were loaded from disk in a fresh process."
    return PageSection("proofs", "Proofs of what was written", blocks, lead, "Proofs")


def stages(facts: RunFacts) -> PageSection:
    """Times, hits and keys, then every warning."""
    rows = [(stage.name, stage.state, seconds(stage.seconds), _code((stage.key or "–")[:12])) for stage in facts.stages]
    timed = [(stage, stage.seconds) for stage in facts.stages if stage.seconds]
    warnings = (
        Note("warn", title="Warnings", items=facts.warnings)
        if facts.warnings
        else Note("good", "There were no warnings.")
    )
    table = PageTable([("stage", LEFT), ("state", LEFT), ("time", RIGHT), ("key", LEFT)], rows)
    return PageSection(
        "stages", "Stages and warnings", [*([_time_chart(timed)] if timed else []), table, warnings], "", "Stages"
    )


def _time_chart(timed: Sequence[tuple[StageRow, float]]) -> Chart:
    names, times = [stage.name for stage, _ in timed], [took for _, took in timed]
    total, (longest, most) = sum(times), extreme(times, names)
    hits = [stage.name for stage, _ in timed if stage.state == "in the store"]
    sentence = f"{longest} took {percent(most / total, 0)} of {seconds(total)}. " + (
        f"Taken from the store, not run again: {listed(hits, 9)}." if hits else "No stage was taken from the store."
    )
    colors = ["--accent" if stage.state == "run" else "--neutral" for stage, _ in timed]
    data = [lying_bars(names, times, colors, [seconds(took) for took in times])]
    layout = {"xaxis": axis("seconds"), "yaxis": {"showgrid": False}, "bargap": 0.3}
    return Chart("times", "Where the time went", sentence, data, layout, 80 + 26 * len(timed))


def reproduce(facts: RunFacts) -> PageSection:
    """The command, the model's identity, the versions, the resolved recipe."""
    identity = PageTable(
        FACTS,
        [
            ("model", facts.model.source),
            ("revision", facts.model.revision or "not pinned"),
            ("identity", _code(facts.model.identity)),
        ],
    )
    versions = PageTable([("package", LEFT), ("version", LEFT)], list(facts.versions.items()), narrow=True)
    blocks = [
        Code(facts.command, "The command"),
        identity,
        Folded("Versions", [versions]),
        Code(facts.recipe_yaml, "The recipe with every default written out"),
    ]
    return PageSection("reproduce", "Reproduce it", blocks, "", "Reproduce")
