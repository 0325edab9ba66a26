"""The sections about a run: result, decisions, quantization, data, proofs, and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import dedent
from typing import Any

from markupsafe import Markup

from reapkit.core.formatting import (
    arrow,
    count,
    extreme,
    human_bytes,
    human_count,
    human_experts,
    listed,
    mean,
    number,
    percent,
    plural,
    seconds,
    signed_percent,
)
from reapkit.evaluation.metrics.table import in_view
from reapkit.planning.plan import Sizes
from reapkit.quantization.schemes import SCHEMES
from reapkit.report.blocks import Chart, Code, Folded, Note, PageSection, PageTable, Text, Tiles
from reapkit.report.charts import axis, bars
from reapkit.report.charts import rows as lying_bars
from reapkit.report.facts import RunFacts, StageRow
from reapkit.report.measures import TONES, badge, verified_rows
from reapkit.report.quality_sections import results_table

LEFT, RIGHT = "left", "right"
FACTS = [("", LEFT), ("", LEFT)]


# ---------------------------------------------------------------------------------------------- result


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
    return PageSection(
        "result", "Before and after", [_tiles(facts), _before_after(facts), _size_chart(facts)], lead, "Result"
    )


def rejection(facts: RunFacts) -> list[Note | Code]:
    """Which gate, which source, by how much, what to change: the evaluation's own advice, whose last lines are there to
    be copied."""
    evaluation = facts.evaluation or {}
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
            ("same next token", percent(last["top1_agreement"]), f"KL {last['kl_mean']:.4f}"),
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


# ---------------------------------------------------------------------------------------------- quantization


def quantization(facts: RunFacts) -> PageSection | None:
    """Scheme, bits per weight, what stayed in full precision, which experts the calibration hardly reached."""
    found = facts.quantization
    if not found:
        return None
    items = [
        ("scheme", str(found.get("scheme") or "own recipe"), str(found.get("method", ""))),
        ("bits per weight", number(found.get("bits_per_weight"), 4), "packed weights and scales, as on disk"),
    ]
    if found.get("group_size"):
        items.append(("group size", str(found["group_size"]), "weights per scale"))
    if found.get("quantized_weights"):
        matrices = plural(found.get("quantized_matrices", 0), "matrix", "matrices")
        items.append(("weights quantized", human_count(found["quantized_weights"]), matrices))
    blocks: list[Any] = [Tiles(items)]
    if sentence := _quantization_cost(facts):
        blocks.append(Text(sentence))
    blocks += _error_by_layer(facts)
    if left := found.get("left"):
        rows = [(reason, count(len(modules)), listed(modules, 4)) for reason, modules in left.items()]
        table = PageTable([("reason", LEFT), ("modules", RIGHT), ("such as", LEFT)], rows)
        blocks.append(Folded("What was left in full precision, and why", [table]))
    if note := _hardly_reached(found):
        blocks.append(Note("warn", note))
    return PageSection("quantization", "Quantization", blocks, _stored(str(found.get("scheme"))), "Quantization")


def _stored(scheme: str) -> str:
    """How a scheme stores weights, in a sentence; nothing of a raw recipe."""
    return f"{scheme} stores {SCHEMES[scheme].meaning}." if scheme in SCHEMES else ""


def _quantization_cost(facts: RunFacts) -> str:
    rows = {row["name"]: row for row in verified_rows(facts)}
    if "pruned" not in rows or "quantized" not in rows:
        return ""
    pruned, quantized = rows["pruned"], rows["quantized"]
    step = quantized["perplexity_ratio"] / pruned["perplexity_ratio"] - 1
    saved = 1 - quantized["bytes"] / pruned["bytes"]
    return (
        f"Quantizing took {percent(saved, 0)} of the pruned model's bytes and changed perplexity by another"
        f" {signed_percent(step)} (pruning alone: {signed_percent(pruned['perplexity_ratio'] - 1)})."
    )


def _hardly_reached(found: Mapping[str, Any]) -> str:
    unseen, few = (
        sum(map(len, (found.get(name) or {}).values()))
        for name in ("experts_rounded_to_nearest", "experts_with_few_tokens")
    )
    if not unseen and not few:
        return ""
    return (
        f"{plural(unseen, 'expert')} received no calibration token and were rounded to nearest;"
        f" {plural(few, 'expert')} saw fewer than {found.get('few_tokens', 'a few')}. Raise calibration.samples if the"
        " quantized model loses more than the pruned one."
    )


def _error_by_layer(facts: RunFacts) -> list[Any]:
    """What the packed matrices, read back from the directory, differ by from their source; or why that says nothing."""
    proofs = (facts.verification or {}).get("proofs", ())
    proof = next(
        (proof for proof in proofs if (proof["directory"], proof["name"]) == ("quantized", "dequantized")), None
    )
    if proof is not None and not proof.get("measured", True):
        return [Text(f"The rounding error of single layers was {proof['detail']}.")]
    errors = (proof or {}).get("by_layer")
    if not errors:
        return []
    layers, values = [int(layer) for layer in errors], list(errors.values())
    worst, least = extreme(values, layers), extreme(values, layers, largest=False)
    sentence = (
        f"The matrices read back from the directory differ from the pruned ones by {percent(mean(values))} of their"
        f" norm in the mean layer, by {percent(worst[1])} in layer {worst[0]} and by {percent(least[1])} in layer"
        f" {least[0]}."
    )
    data = [bars(layers, values, "--c3", "layer %{x}: %{y:.2%}")]
    layout = {
        "xaxis": axis("layer", **({"dtick": 1} if len(layers) <= 16 else {})),
        "yaxis": axis("‖packed − source‖ / ‖source‖", ".0%" if max(values) > 0.05 else ".1%", rangemode="tozero"),
    }
    return [Chart("quantization-error", "Rounding error by layer", sentence, data, layout, 280)]


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
    found = (facts.verification or {}).get("proofs")
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
    table = PageTable([("directory", LEFT), ("proof", LEFT), ("", LEFT), ("detail", LEFT)], rows)
    blocks: list[Any] = [Note("good" if held == len(tested) else "bad", said), table]
    if results := (facts.verification or {}).get("gates"):
        blocks.append(results_table("The final directory against its own gates", results))
    lead = "The directories were loaded from disk in a fresh process."
    return PageSection("proofs", "Proofs of what was written", blocks, lead, "Proofs")


def stages(facts: RunFacts) -> PageSection:
    """Times, hits and keys, then every warning."""
    rows = [(stage.name, stage.state, seconds(stage.seconds), _code((stage.key or "–")[:12])) for stage in facts.stages]
    timed = [stage for stage in facts.stages if stage.seconds]
    warnings = (
        Note("warn", title="Warnings", items=facts.warnings)
        if facts.warnings
        else Note("good", "There were no warnings.")
    )
    table = PageTable([("stage", LEFT), ("state", LEFT), ("time", RIGHT), ("key", LEFT)], rows)
    return PageSection(
        "stages", "Stages and warnings", [*([_time_chart(timed)] if timed else []), table, warnings], "", "Stages"
    )


def _time_chart(timed: Sequence[StageRow]) -> Chart:
    total = sum(stage.seconds for stage in timed)
    longest = max(timed, key=lambda stage: stage.seconds)
    hits = [stage.name for stage in timed if stage.state == "in the store"]
    sentence = f"{longest.name} took {percent(longest.seconds / total, 0)} of {seconds(total)}. " + (
        f"Taken from the store, not run again: {listed(hits, 9)}." if hits else "No stage was taken from the store."
    )
    colors = ["--accent" if stage.state == "run" else "--neutral" for stage in timed]
    data = [
        lying_bars(
            [stage.name for stage in timed],
            [stage.seconds for stage in timed],
            colors,
            [seconds(stage.seconds) for stage in timed],
        )
    ]
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
