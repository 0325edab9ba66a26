"""The sections about a run: its result, the gates, quality by source, quantization, how it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from reapkit.gates import UNION
from reapkit.planning import Sizes
from reapkit.report.blocks import Chart, Code, Folded, Grid, Note, Section, Table, Text, Tiles
from reapkit.report.facts import RunFacts
from reapkit.report.wording import count, extreme, listed, number, percent, plural, seconds
from reapkit.tables import human_bytes, human_count, human_experts

METRICS = {"perplexity_ratio": "perplexity against the base", "kl_mean": "mean KL from the base", "top1_agreement": "same most likely token",
           "conflict_rate_delta": "change of confident conflicts", "loop_share_delta": "change of looping continuations"}
SHARES = ("top1_agreement", "conflict_rate_delta", "loop_share_delta")
TONES = {"pass": "good", "reject": "bad", "undecided": "warn"}
SAME_AS_BASE = {"perplexity_ratio": 1.0, "kl_mean": 0.0, "top1_agreement": 1.0}

RIGHT, LEFT = "right", "left"


def heading(metric: str) -> str:
    """A metric's name as a title."""
    return METRICS[metric][0].upper() + METRICS[metric][1:]


def shown(metric: str, value: float | None) -> str:
    """A metric's value as people read it: shares in percent, ratios and KL as numbers."""
    if value is None:
        return "–"
    return percent(value, 2 if "delta" in metric else 1) if metric in SHARES else f"{value:.4f}" if metric == "kl_mean" else f"{value:.3f}"


def with_interval(metric: str, measurement: Mapping[str, Any] | None) -> str:
    """`1.034 (1.020 to 1.051)`."""
    if measurement is None:
        return "–"
    interval = measurement.get("interval")
    return shown(metric, measurement["value"]) + (f" ({shown(metric, interval[0])} to {shown(metric, interval[1])})" if interval else "")


def badge(verdict: str) -> Markup:
    """A verdict as a coloured word."""
    return Markup('<span class="verdict {}">{}</span>').format(TONES.get(verdict, "info"), verdict)


# ---------------------------------------------------------------------------------------------- result


def result(facts: RunFacts) -> Section:
    """Before and after, in one table and one chart."""
    blocks: list[Any] = []
    if facts.stopped:
        blocks.append(rejection(facts))
    blocks += [_tiles(facts), _before_after(facts)]
    if not facts.stopped:
        blocks.append(_size_chart(facts))
    lead = ("No weight was written: this is what the candidates would have been." if facts.stopped else
            "Measured on held-out rows that no decision has seen." if facts.verification else "")
    return Section("result", "Before and after", blocks, lead, "Result")


def rejection(facts: RunFacts) -> Note:
    """Which gate, which source, by how much, what to change: the evaluation's own advice, line by line."""
    evaluation = facts.evaluation or {}
    verdict = evaluation.get("verdict", "not judged")
    title = {"reject": "Rejected by the gates: nothing was written.", "undecided": "Undecided: nothing was written.",
             "pass": "The evaluation passed; the run ended before it wrote the model."}.get(verdict, "The run ended before the evaluation.")
    lines = [line.strip() for line in str(evaluation.get("advice", "")).splitlines() if line.strip()]
    return Note(TONES.get(verdict, "info"), title=title, items=lines) if lines else Note(TONES.get(verdict, "info"), "", title)


def _written(facts: RunFacts) -> list[tuple[str, Sizes]]:
    if facts.stopped:
        return [("base", facts.base), *facts.planned.items()]
    rows = [("base", facts.base), ("pruned", facts.pruned), ("quantized", facts.quantized)]
    return [(name, sizes) for name, sizes in rows if sizes is not None]


def _tiles(facts: RunFacts) -> Tiles:
    final = facts.quantized or facts.pruned or (facts.planned.get(facts.chosen) if facts.chosen else None) or facts.base
    removed = 1 - sum(final.experts.values()) / sum(facts.base.experts.values())
    items = [("experts per layer", f"{human_experts(facts.base.experts)} → {human_experts(final.experts)}", f"{percent(removed, 0)} removed"),
             ("size on disk", f"{human_bytes(facts.base.nbytes)} → {human_bytes(final.nbytes)}", f"{facts.base.nbytes / final.nbytes:.2f} times smaller"),
             ("parameters", f"{human_count(facts.base.parameters)} → {human_count(final.parameters)}",
              f"{human_count(facts.base.active_parameters)} → {human_count(final.active_parameters)} active")]
    rows = verified_rows(facts)
    if len(rows) > 1:
        last = rows[-1]
        items += [("perplexity", f"{rows[0]['perplexity']:.3f} → {last['perplexity']:.3f}", f"{100 * (last['perplexity_ratio'] - 1):+.1f} %"),
                  ("same next token", percent(last["top1_agreement"]), f"KL {last['kl_mean']:.4f}")]
    return Tiles(items)


def verified_rows(facts: RunFacts) -> list[Mapping[str, Any]]:
    """The verification's rows: base, pruned, quantized."""
    return list((facts.verification or {}).get("rows", ()))


def _before_after(facts: RunFacts) -> Table:
    measured = {row["name"]: row for row in verified_rows(facts)}
    columns = [("", LEFT), ("experts", RIGHT), ("parameters", RIGHT), ("active", RIGHT), ("size", RIGHT)]
    if measured:
        columns += [("perplexity", RIGHT), ("against base", RIGHT), ("KL", RIGHT), ("same top-1", RIGHT)]
    rows = []
    for name, sizes in _written(facts):
        row = [name, human_experts(sizes.experts), human_count(sizes.parameters), human_count(sizes.active_parameters),
               f"{human_bytes(sizes.nbytes)} ({percent(sizes.nbytes / facts.base.nbytes, 0)})"]
        if measured:
            found = measured.get(name, {})
            row += [number(found.get("perplexity"), 4), number(found.get("perplexity_ratio"), 4), shown("kl_mean", found.get("kl_mean")),
                    shown("top1_agreement", found.get("top1_agreement"))]
        rows.append(row)
    return Table(columns, rows)


def _size_chart(facts: RunFacts) -> Chart:
    rows = _written(facts)
    names = [name for name, _ in rows][::-1]
    sizes = [sizes.nbytes for _, sizes in rows][::-1]
    first, last = rows[0][1].nbytes, rows[-1][1].nbytes
    sentence = f"{human_bytes(first - last)} of {human_bytes(first)} are gone" + (
        f": {percent((first - facts.pruned.nbytes) / (first - last), 0)} of that by pruning, the rest by quantizing." if facts.quantized else ".")
    data = [{"type": "bar", "orientation": "h", "x": sizes, "y": names, "text": [human_bytes(size) for size in sizes], "textposition": "auto",
             "marker": {"color": ["--c3", "--accent", "--neutral"][-len(names):]}, "hovertemplate": "%{y}: %{text}<extra></extra>", "cliponaxis": False}]
    layout = {"xaxis": {"showticklabels": False, "showgrid": False, "zeroline": False}, "yaxis": {"showgrid": False}, "margin": {"b": 8}, "bargap": 0.35}
    return Chart("sizes", "Size on disk", sentence, data, layout, 60 + 42 * len(names))


# ---------------------------------------------------------------------------------------------- gates


def gates(facts: RunFacts) -> Section | None:
    """Every candidate against every gate."""
    evaluation = facts.evaluation
    if not evaluation or not evaluation.get("gates"):
        return None
    entries = [*evaluation["candidates"], *evaluation.get("controls", ())]
    metrics = [metric for metric in dict.fromkeys(gate["metric"] for gate in evaluation["gates"]) if metric in METRICS]
    charts = [chart for metric in metrics for chart in _gate_charts(evaluation, entries, metric)]
    blocks: list[Any] = [Grid(charts, wide=True)] if charts else []
    blocks.append(_gate_table(evaluation))
    if len(evaluation["candidates"]) > 1:
        blocks.append(_candidate_table(facts, evaluation))
    if confirm := evaluation.get("confirm"):
        blocks.append(_results_table(f"{confirm['candidate']} again on the confirm rows, which it was not chosen on", confirm["gates"]))
    lead = "Candidates were measured as masks on the loaded model, before any weight was written. Whiskers are 95 % intervals over resampled rows."
    return Section("gates", "Candidates against the gates", blocks, lead, "Gates")


def _gate_charts(evaluation: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], metric: str) -> Iterator[Chart]:
    """One chart per metric at the longest rows."""
    pack = max(evaluation["base"], key=int) if evaluation["base"] else None
    gate = next((gate for gate in evaluation["gates"] if gate["metric"] == metric and gate["source"] == UNION), None)
    found = [(entry, (entry.get("metrics") or {}).get(pack, {}).get(UNION, {}).get(metric)) for entry in entries]
    found = [(entry, measurement) for entry, measurement in found if measurement]
    if not found or gate is None:
        return
    values = [measurement["value"] for _, measurement in found]
    names = [entry["name"] if entry in evaluation["candidates"] else f"{entry['criterion']} (control)" for entry, _ in found]
    colors = ["--neutral" if entry not in evaluation["candidates"] else f"--{TONES.get(entry.get('verdict', ''), 'accent')}" for entry, _ in found]
    limits = [gate[side] for side in ("min", "max") if gate.get(side) is not None]
    inside = [name for name, value in zip(names, values, strict=True)
              if (gate.get("max") is None or value <= gate["max"]) and (gate.get("min") is None or value >= gate["min"])]
    worst = "highest" if gate.get("max") is not None else "lowest"
    chosen = extreme(values, names, largest=worst == "highest")
    sentence = (f"Limit {_limit(metric, gate)} over all sources, {pack} tokens per row. " + (
        f"Inside it: {listed(inside)}." if inside else "None is inside it.") + (
        f" {chosen[0]} is {worst} with {shown(metric, chosen[1])}." if len(names) > 1 else f" Measured: {with_interval(metric, found[0][1])}."))
    data = [{"type": "scatter", "mode": "markers", "x": values, "y": names, "marker": {"size": 11, "color": colors}, "showlegend": False,
             "error_x": {"type": "data", "symmetric": False, "thickness": 2, "width": 5, "color": "--muted",
                         "array": [_side(m, 1) for _, m in found], "arrayminus": [_side(m, 0) for _, m in found]},
             "text": [with_interval(metric, m) for _, m in found], "hovertemplate": "%{y}: %{text}<extra></extra>"}]
    shapes = [{"type": "line", "x0": limit, "x1": limit, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": "--text", "width": 1.5, "dash": "dash"}}
              for limit in limits]
    axis = {"tickformat": ".1%" if "delta" in metric else ".0%"} if metric in SHARES else {}
    layout = {"shapes": shapes, "xaxis": {"nticks": 5, "zeroline": False, **axis}, "margin": {"l": 20, "b": 28},
              "yaxis": {"autorange": "reversed", "type": "category", "showgrid": False, "ticklabelstandoff": 6}}
    yield Chart(f"gate-{metric.replace('_', '-')}", heading(metric), sentence, data, layout, 56 + 32 * len(names))


def _side(measurement: Mapping[str, Any], side: int) -> float:
    interval = measurement.get("interval")
    return 0.0 if not interval else max(0.0, (interval[1] - measurement["value"]) if side else (measurement["value"] - interval[0]))


def _limit(metric: str, gate: Mapping[str, Any]) -> str:
    low, high = gate.get("min"), gate.get("max")
    if low is not None and high is not None:
        return f"{shown(metric, low)} to {shown(metric, high)}"
    return f"at most {shown(metric, high)}" if high is not None else f"at least {shown(metric, low)}"


def _gate_table(evaluation: Mapping[str, Any]) -> Table:
    chosen = next(entry for entry in evaluation["candidates"] if entry["name"] == evaluation["chosen"])
    return _results_table(f"{chosen['name']}, gate by gate", chosen["gates"])


def _results_table(title: str, results: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for entry in results:
        excess = entry.get("excess")
        room = "–" if excess is None else f"{shown(entry['metric'], abs(excess))} {'beyond' if excess > 0 else 'to spare'}"
        rows.append((METRICS.get(entry["metric"], entry["metric"]), entry["source"], entry["pack"] or "–", _limit(entry["metric"], entry),
                     with_interval(entry["metric"], entry) if entry.get("value") is not None else "not measured", room, badge(entry["verdict"])))
    return Table([("gate", LEFT), ("source", LEFT), ("rows of", RIGHT), ("limit", RIGHT), ("measured", RIGHT), ("room", RIGHT), ("", LEFT)], rows, title)


def _candidate_table(facts: RunFacts, evaluation: Mapping[str, Any]) -> Table:
    rows = []
    for entry in evaluation["candidates"]:
        sizes = facts.planned.get(entry["name"])
        failed = [f"{result['metric']} ({result['source']})" for result in entry["gates"] if result["verdict"] in ("reject", "undecided")]
        rows.append((entry["name"], entry.get("experts", "–"), human_bytes(sizes.nbytes if sizes else entry.get("bytes")), badge(entry["verdict"]),
                     listed(dict.fromkeys(failed), 3) if failed else "larger than one that passed" if entry["metrics"] is None else "–"))
    return Table([("candidate", LEFT), ("experts", RIGHT), ("size", RIGHT), ("", LEFT), ("why", LEFT)], rows, "Every candidate, smallest first")


# ---------------------------------------------------------------------------------------------- quality by source


def quality(facts: RunFacts) -> Section | None:
    """Each source's loss with its interval: what an average over the mix hides."""
    stages = measured_by_stage(facts)
    if not stages:
        return None
    pack = max(next(iter(stages.values())), key=int)
    groups = [group for group in next(iter(stages.values()))[pack]]
    charts = [_source_chart(stages, pack, groups, metric) for metric in ("perplexity_ratio", "kl_mean", "top1_agreement")]
    rows = [(group if group != UNION else "all of the mix", name, *(with_interval(metric, found[pack][group].get(metric))
             for metric in ("perplexity", "perplexity_ratio", "kl_mean", "top1_agreement")))
            for group in groups for name, found in stages.items() if group in found[pack]]
    table = Table([("source", LEFT), ("model", LEFT), ("perplexity", RIGHT), ("against base", RIGHT), ("KL", RIGHT), ("same top-1", RIGHT)], rows)
    lead = f"Held-out rows of {pack} tokens; whiskers are 95 % intervals. " + ("These rows took no part in any decision." if facts.verification else "")
    return Section("quality", "Quality, source by source", [Grid(charts[:2], wide=True), charts[2], Folded("All numbers", [table])], lead.strip(), "Quality")


def measured_by_stage(facts: RunFacts) -> dict[str, Mapping[str, Any]]:
    """{model: {length: {group: metrics}}} of what was written, else of the chosen candidate as a mask."""
    written = (facts.verification or {}).get("metrics") or {}
    if found := {name: metrics for name, metrics in written.items() if name != "base" and metrics}:
        return found
    evaluation = facts.evaluation or {}
    if confirm := evaluation.get("confirm"):
        return {f"{confirm['candidate']} (mask)": confirm["metrics"]}
    chosen = next((entry for entry in evaluation.get("candidates", ()) if entry["name"] == evaluation.get("chosen")), None)
    return {f"{chosen['name']} (mask)": chosen["metrics"]} if chosen and chosen.get("metrics") else {}


def _source_chart(stages: Mapping[str, Mapping[str, Any]], pack: str, groups: Sequence[str], metric: str) -> Chart:
    data = []
    for index, (name, found) in enumerate(stages.items()):
        shown_groups = [group for group in groups if metric in found[pack].get(group, {})]
        measured = [found[pack][group][metric] for group in shown_groups]
        data.append({"type": "scatter", "mode": "markers", "name": name, "x": [m["value"] for m in measured],
                     "y": [group if group != UNION else "all" for group in shown_groups], "marker": {"size": 10, "color": f"--c{index + 1}", "symbol": ("circle", "diamond")[index % 2]},
                     "error_x": {"type": "data", "symmetric": False, "thickness": 2, "width": 4, "color": f"--c{index + 1}",
                                 "array": [_side(m, 1) for m in measured], "arrayminus": [_side(m, 0) for m in measured]},
                     "text": [with_interval(metric, m) for m in measured], "hovertemplate": "%{y}: %{text}<extra>" + name + "</extra>"})
    last, found = list(stages.items())[-1]
    sources = [group for group in groups if group != UNION and metric in found[pack].get(group, {})]
    worst = extreme([found[pack][group][metric]["value"] for group in sources], sources, largest=metric != "top1_agreement")
    union = found[pack].get(UNION, {}).get(metric)
    sentence = f"{last}: {shown(metric, union['value'])} over the mix" if union else last
    sentence += f"; {worst[0]} suffers most with {with_interval(metric, found[pack][worst[0]][metric])}." if worst and len(sources) > 1 else "."
    same = SAME_AS_BASE[metric]
    shapes = [{"type": "line", "x0": same, "x1": same, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": "--muted", "width": 1, "dash": "dot"}}]
    layout = {"shapes": shapes, "xaxis": {"nticks": 6, "zeroline": False, **({"tickformat": ".0%"} if metric in SHARES else {})}, "margin": {"l": 20},
              "yaxis": {"autorange": "reversed", "type": "category", "showgrid": True, "ticklabelstandoff": 6}}
    return Chart(f"source-{metric.replace('_', '-')}", heading(metric), sentence, data, layout, 90 + 30 * len(groups))


# ---------------------------------------------------------------------------------------------- decision


def decision(facts: RunFacts) -> Section | None:
    """How experts were chosen, who was protected and what was close."""
    selection = facts.selection
    if selection is None:
        return None
    details = selection.details
    protected = {name: sum(map(len, layers.values())) for name, layers in (details.get("protected") or {}).items() if layers}
    rows = [("criterion", f"{selection.criterion}: {details.get('formula', '')}".rstrip(": ")), ("candidate", facts.chosen),
            ("dropped", f"{count(sum(len(layer.drop) for layer in selection.layers.values()))} of "
                        f"{count(sum(len(layer.saliency) for layer in selection.layers.values()))} experts in {plural(len(selection.layers), 'layer')}"),
            ("allocation", details.get("allocation", "uniform")),
            ("protected", listed(f"{size} {name}" for name, size in protected.items()) if protected else "none"),
            ("near-ties", f"{count(len(details.get('near_ties') or ()))} pairs another device might decide otherwise")]
    if details.get("mix"):
        rows.append(("post-hoc mix", listed((f"{name} {weight}" for name, weight in details["mix"].items()), 12)))
    if selection.experts_per_token:
        rows.append(("experts per token", f"{facts.model.num_experts_per_tok} → {selection.experts_per_token}"))
    kept = [(layer, f"{len(chosen.keep)} of {len(chosen.saliency)}", listed(chosen.drop, 1000)) for layer, chosen in selection.layers.items()]
    table = Table([("", LEFT), ("", LEFT)], rows, narrow=True)
    dropped = Folded("Every dropped expert, layer by layer", [Table([("layer", RIGHT), ("kept", RIGHT), ("dropped", LEFT)], kept)])
    return Section("decision", "What was decided", [table, dropped], "", "Decision")


# ---------------------------------------------------------------------------------------------- quantization


def quantization(facts: RunFacts) -> Section | None:
    """Scheme, bits per weight, what stayed in full precision."""
    found = facts.quantization
    if not found:
        return None
    items = [("scheme", str(found.get("scheme") or "own recipe"), str(found.get("method", ""))),
             ("bits per weight", number(found.get("bits_per_weight"), 4), "packed weights and scales, as on disk")]
    if found.get("group_size"):
        items.append(("group size", str(found["group_size"]), "weights per scale"))
    if found.get("quantized_weights"):
        items.append(("weights quantized", human_count(found["quantized_weights"]), plural(found.get("quantized_matrices", 0), "matrix", "matrices")))
    blocks: list[Any] = [Tiles(items)]
    if sentence := _quantization_cost(facts):
        blocks.append(Text(sentence))
    if errors := found.get("error_by_layer"):
        blocks.append(_error_chart(errors))
    if left := found.get("left"):
        rows = [(reason, count(len(modules)), listed(modules, 4)) for reason, modules in left.items()]
        blocks.append(Folded("What was left in full precision, and why", [Table([("reason", LEFT), ("modules", RIGHT), ("such as", LEFT)], rows)]))
    starved = sum(map(len, (found.get("experts_rounded_to_nearest") or {}).values()))
    few = sum(map(len, (found.get("experts_with_few_tokens") or {}).values()))
    if starved or few:
        blocks.append(Note("warn", f"{count(starved)} experts saw no calibration token and were rounded to nearest; {count(few)} saw fewer than "
                                   f"{found.get('few_tokens', '–')}. Raise calibration.samples if the quantized model loses more than the pruned one."))
    return Section("quantization", "Quantization", blocks, "", "Quantization")


def _quantization_cost(facts: RunFacts) -> str:
    rows = {row["name"]: row for row in verified_rows(facts)}
    if "pruned" not in rows or "quantized" not in rows:
        return ""
    pruned, quantized = rows["pruned"], rows["quantized"]
    step = quantized["perplexity_ratio"] / pruned["perplexity_ratio"] - 1
    saved = 1 - quantized["bytes"] / pruned["bytes"]
    return (f"Quantizing took {percent(saved, 0)} of the pruned model's bytes and changed perplexity by another {100 * step:+.1f} % "
            f"(pruning alone: {100 * (pruned['perplexity_ratio'] - 1):+.1f} %).")


def _error_chart(errors: Mapping[str, float]) -> Chart:
    layers = [int(layer) for layer in errors]
    worst = extreme(list(errors.values()), layers)
    data = [{"type": "bar", "x": layers, "y": list(errors.values()), "marker": {"color": "--c3"}, "hovertemplate": "layer %{x}: %{y:.3g}<extra></extra>"}]
    return Chart("quantization-error", "Rounding error by layer", f"Layer {worst[0]} is hit hardest ({number(worst[1])}).", data,
                 {"xaxis": {"title": {"text": "layer"}}, "yaxis": {"title": {"text": "relative error"}}}, 280)


# ---------------------------------------------------------------------------------------------- calibration


def calibration(facts: RunFacts) -> Section | None:
    """What the model read: each source's share, hash and one sample with its scored stretches marked."""
    found = facts.calibration
    if not found:
        return None
    scored = found.get("scored_tokens") or sum(source["scored_tokens"] for source in found["sources"])
    rows = [(source["name"], source["source"], count(source["samples"]), count(source["rows"]), count(source["tokens"]), count(source["scored_tokens"]),
             percent(source["scored_tokens"] / scored if scored else None, 0)) for source in found["sources"]]
    table = Table([("name", LEFT), ("source", LEFT), ("samples", RIGHT), ("rows", RIGHT), ("tokens", RIGHT), ("scored", RIGHT), ("share", RIGHT)], rows)
    hashes = Table([("source", LEFT), ("assistant spans found by", LEFT), ("sha256 of its samples", LEFT)],
                   [(source["name"], source.get("spans_text") or "–", Markup("<code>{}</code>").format(source["sha256"])) for source in found["sources"]])
    examples = [Code(_marked(source["example"]), f"{source['name']}: what is scored is highlighted") for source in found["sources"] if source.get("example")]
    lead = f"Rows of up to {found.get('max_length', '–')} tokens, packing {found.get('packing', '–')}, scored: {found.get('score', '–')}, seed {found.get('seed', '–')}."
    blocks = [table, Folded("Hashes and spans", [hashes])] + ([Folded("A sample of each source", examples)] if examples else [])
    return Section("calibration", "Calibration mix", blocks, lead, "Calibration")


def _marked(example: Sequence[Sequence[Any]]) -> Markup:
    return Markup("").join(Markup("<mark>{}</mark>").format(text) if assistant else Markup("{}").format(text) for text, assistant in example)


# ---------------------------------------------------------------------------------------------- proofs, stages, reproduce


def proofs(facts: RunFacts) -> Section | None:
    """What the verify stage checked on the written directories in a fresh process."""
    found = (facts.verification or {}).get("proofs")
    if not found:
        return None
    held = sum(bool(proof["passed"]) for proof in found)
    tone = "good" if held == len(found) else "bad"
    rows = [(proof["directory"], proof["name"], badge("pass" if proof["passed"] else "reject"), proof.get("detail", "")) for proof in found]
    blocks: list[Any] = [Note(tone, f"{held} of {plural(len(found), 'proof')} hold."), Table([("directory", LEFT), ("proof", LEFT), ("", LEFT), ("detail", LEFT)], rows)]
    if results := (facts.verification or {}).get("gates"):
        blocks.append(_results_table("The final directory against its own gates", results))
    return Section("proofs", "Proofs of what was written", blocks, "The directories were loaded from disk in a fresh process.", "Proofs")


def stages(facts: RunFacts) -> Section:
    """Times, hits and keys, then every warning."""
    rows = [(stage.name, stage.state, seconds(stage.seconds), Markup("<code>{}</code>").format((stage.key or "–")[:12])) for stage in facts.stages]
    blocks: list[Any] = []
    timed = [stage for stage in facts.stages if stage.seconds]
    if timed:
        blocks.append(_time_chart(timed))
    blocks.append(Table([("stage", LEFT), ("state", LEFT), ("seconds", RIGHT), ("key", LEFT)], rows))
    warnings = Note("warn", title="Warnings", items=facts.warnings) if facts.warnings else Note("good", "No warning was given.")
    return Section("stages", "Stages and warnings", [*blocks, warnings], "", "Stages")


def _time_chart(timed: Sequence[Any]) -> Chart:
    total = sum(stage.seconds for stage in timed)
    longest = max(timed, key=lambda stage: stage.seconds)
    hits = [stage.name for stage in timed if stage.state == "in the store"]
    sentence = f"{longest.name} took {percent(longest.seconds / total, 0)} of {seconds(total)}. " + (
        f"Taken from the store, not run again: {listed(hits, 9)}." if hits else "Nothing was in the store yet.")
    names = [stage.name for stage in timed][::-1]
    data = [{"type": "bar", "orientation": "h", "y": names, "x": [stage.seconds for stage in timed][::-1], "cliponaxis": False,
             "marker": {"color": ["--accent" if stage.state == "run" else "--neutral" for stage in timed][::-1]},
             "text": [seconds(stage.seconds) for stage in timed][::-1], "textposition": "auto", "hovertemplate": "%{y}: %{text}<extra></extra>"}]
    layout = {"xaxis": {"title": {"text": "seconds"}}, "yaxis": {"showgrid": False}, "bargap": 0.3}
    return Chart("times", "Where the time went", sentence, data, layout, 80 + 26 * len(names))


def reproduce(facts: RunFacts) -> Section:
    """The command, the resolved recipe, the model's identity and the versions."""
    versions = Table([("package", LEFT), ("version", LEFT)], list(facts.versions.items()), narrow=True)
    identity = Table([("", LEFT), ("", LEFT)], [("model", facts.model.source), ("revision", facts.model.revision or "not pinned"),
                                               ("identity", Markup("<code>{}</code>").format(facts.model.identity))])
    blocks = [Code(facts.command, "The command"), identity, Folded("Versions", [versions]), Code(facts.recipe_yaml, "The recipe with every default written out")]
    return Section("reproduce", "Reproduce it", blocks, "", "Reproduce")
