"""Writes the model card: what a directory is, how it was made, what was measured, how to serve it. The card says
nothing that the run did not measure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml

from reapkit.core.formatting import count, human_bytes, human_count, human_experts, listed, percent, plural
from reapkit.evaluation.gates import UNION
from reapkit.evaluation.metrics.table import in_view
from reapkit.planning.plan import Sizes
from reapkit.quantization.engines import ENGINES
from reapkit.report.comparison_sections import SPEEDS, benchmark_rows, speed_lead, speed_rows, verdict_of_equal_bytes
from reapkit.report.facts import RunFacts
from reapkit.report.measures import generated, measured_models, share_with_interval, verified_rows, with_interval
from reapkit.selection.criteria.criterion import Criterion
from reapkit.selection.criteria.registry import described

WrittenModel = Literal["pruned", "quantized"]
"""The models that a run writes, by what their directories are called."""
PURPOSES = {
    "theblackcat102/evol-codealpaca-v1": "code generation",
    "Salesforce/xlam-function-calling-60k": "function and tool calling",
    "SWE-bench/SWE-smith-trajectories": "agentic, multi-turn software work",
    "open-r1/Mixture-of-Thoughts": "step-by-step reasoning",
    "builtin:code": "code",
    "builtin:tools": "function and tool calling",
    "builtin:prose": "English prose",
    "builtin:math": "arithmetic and word problems",
}
FORMAT_PURPOSES = {
    "xlam": "function and tool calling",
    "messages": "conversations",
    "prompt": "instructions",
    "text": "plain text",
    "tokens": "given tokens",
}


def model_card(facts: RunFacts, which: WrittenModel) -> str:
    """README.md of a written model directory: hub front matter, properties, calibration, method, results with limits,
    serving, recipe.

    Raises ValueError where the run wrote no such directory.
    """
    sizes = facts.quantized if which == "quantized" else facts.pruned
    if sizes is None:
        raise ValueError(f"this run wrote no {which} model")
    scheme = _scheme(facts) if which == "quantized" else None
    text = [
        f"# {_title(facts, sizes, scheme)}",
        _opening(facts, sizes, scheme),
        _properties(facts, sizes, scheme),
        _calibration(facts),
        _method(facts, sizes, which),
        _results(facts, which),
        _proofs(facts, which),
        _limits(facts, which),
    ]
    code = [_serving(facts, sizes, which, scheme), _recipe(facts), _citation(facts)]
    return "\n\n".join(part for part in (_front_matter(facts, scheme), *map(_text, text), *code) if part) + "\n"


def _text(markdown: str) -> str:
    """Markdown in which nothing is raw HTML and no line opens a block of code, whatever names and descriptions hold."""
    return re.sub(r"(?m)^(\s*)(`{3,}|~{3,})", r"\1\\\2", markdown.replace("<", "&lt;"))


def _fenced(language: str, text: str) -> str:
    """A block of code that no line of its text can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _scheme(facts: RunFacts) -> str:
    return str((facts.quantization or {}).get("scheme") or facts.recipe.quantize.scheme or "own recipe")


def _criterion(facts: RunFacts) -> Criterion:
    return described(facts.selection.criterion if facts.selection else facts.recipe.saliency.criterion)


def _base_name(facts: RunFacts) -> str:
    return facts.model.source.rstrip("/").rsplit("/", 1)[-1].removeprefix("builtin:")


def _title(facts: RunFacts, sizes: Sizes, scheme: str | None) -> str:
    return f"{_base_name(facts)}, {_removed(facts, sizes)} of its experts pruned" + (f", {scheme}" if scheme else "")


def _removed(facts: RunFacts, sizes: Sizes) -> str:
    return percent(1 - sum(sizes.experts.values()) / sum(facts.base.experts.values()), 0)


def _front_matter(facts: RunFacts, scheme: str | None) -> str:
    criterion = _criterion(facts)
    tags = [
        "moe",
        "mixture-of-experts",
        "pruning",
        *([criterion.name] if criterion.citations else []),
        "reapkit",
        facts.model.model_type,
        *(["compressed-tensors", scheme.lower()] if scheme else []),
    ]
    fields: dict[str, Any] = {"base_model": facts.model.source} if facts.model.hub else {}
    if scheme and facts.model.hub:
        fields["base_model_relation"] = "quantized"
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if facts.model.license:
        fields["license"] = facts.model.license
    if facts.hub_datasets:
        fields["datasets"] = list(facts.hub_datasets)
    return f"---\n{yaml.safe_dump(fields | {'tags': tags}, sort_keys=False, allow_unicode=True, width=120)}---"


def _opening(facts: RunFacts, sizes: Sizes, scheme: str | None) -> str:
    quantized = f" and its weights quantized to {scheme}" if scheme else ""
    text = (
        f"[{facts.model.source}](https://huggingface.co/{facts.model.source})"
        if facts.model.hub
        else f"`{facts.model.source}`"
    )
    removed = f"{_removed(facts, sizes)} of its routed experts removed{quantized}"
    return f"{text} with {removed}. {facts.recipe.description}".strip()


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


# ---------------------------------------------------------------------------------------------- what it is


def _properties(facts: RunFacts, sizes: Sizes, scheme: str | None) -> str:
    selection, base = facts.selection, facts.base
    top_k = (selection.experts_per_token if selection else None) or facts.model.num_experts_per_tok
    before = facts.model.num_experts_per_tok
    parameters, base_parameters = (
        f"{human_count(each.parameters)}, {human_count(each.active_parameters)} active" for each in (sizes, base)
    )
    rows = [
        ("Base model", facts.model.source + (f" @ {facts.model.revision}" if facts.model.revision else "")),
        ("Architecture", facts.model.model_type),
        ("Routed experts per layer", f"{human_experts(sizes.experts)} (base: {human_experts(base.experts)})"),
        ("Experts per token", f"{top_k}" + (f" (base: {before})" if top_k != before else "")),
        ("Parameters", f"{parameters} (base: {base_parameters})"),
        ("Size of the weights", f"{human_bytes(sizes.nbytes)} (base: {human_bytes(base.nbytes)})"),
    ]
    if scheme:
        found = facts.quantization or {}
        bits = (
            f", {found['bits_per_weight']:.3f} bits per quantized weight on disk"
            if found.get("bits_per_weight")
            else ""
        )
        group = f", group size {found['group_size']}" if found.get("group_size") else ""
        rows.append(("Quantization", f"{scheme} ({found.get('method', facts.recipe.quantize.method)}{group}{bits})"))
    if facts.mtp is not None:
        rows.append(
            (
                "Multi-token prediction",
                "kept, for speculative decoding" if facts.mtp else "removed, so engines cannot draft tokens with it",
            )
        )
    if facts.model.license:
        rows.append(("License", f"{facts.model.license}, from the base model"))
    return _table(("Property", "Value"), rows)


def _calibration(facts: RunFacts) -> str:
    found = facts.calibration
    if not found:
        return ""
    formats = {entry.name: entry.format for entry in facts.recipe.calibration.mix}
    samples = sum(source["samples"] for source in found["sources"])
    scored = sum(source["scored_tokens"] for source in found["sources"])
    rows = [
        (
            _linked(source["source"], facts),
            count(source["samples"]),
            percent(source["samples"] / samples, 0),
            count(source["scored_tokens"]),
            percent(source["scored_tokens"] / scored if scored else None, 0),
            _purpose(source, formats.get(source["name"])),
        )
        for source in found["sources"]
    ]
    table = _table(("Source", "Samples", "Share of samples", "Scored tokens", "Share of scored", "Purpose"), rows)
    length = found.get("max_length", facts.recipe.calibration.max_length)
    completion = found.get("score", facts.recipe.calibration.score) == "completion"
    what = "positions that predict an assistant token" if completion else "every position"
    return (
        "## Calibration mix\n\nWhich experts stay depends on what the model read: an expert that none of these sources"
        f" uses ranks last.\n\n{table}\n\nRows of up to {count(length)} tokens; scored: {what}."
    )


def _linked(source: str, facts: RunFacts) -> str:
    return f"[{source}](https://huggingface.co/datasets/{source})" if source in facts.hub_datasets else f"`{source}`"


def _purpose(source: Mapping[str, Any], given: Any) -> str:
    if source["source"] in PURPOSES:
        return PURPOSES[source["source"]]
    keys = list(type(given).model_fields) if given is not None else []
    return next((FORMAT_PURPOSES[key] for key in keys if key in FORMAT_PURPOSES), source["name"])


# ---------------------------------------------------------------------------------------------- how it was made


def _method(facts: RunFacts, sizes: Sizes, which: str) -> str:
    selection, criterion = facts.selection, _criterion(facts)
    details = selection.details if selection else {}
    formula = f" (`{details['formula']}`)" if details.get("formula") else ""
    least = "In each layer the least salient experts"
    if details.get("allocation") == "global":
        least = "The least salient experts of all layers together"
    steps = [
        (
            "The calibration ran through the base model once; for every scored token the routing the model really used"
            " was recorded: which experts, with which gate weight, and the norm of their outputs."
        ),
        (f"Each routed expert got a saliency by `{criterion.name}`{formula}: {criterion.explanation}."),
        (
            f"{least} went; {human_experts(sizes.experts)} of {human_experts(facts.base.experts)} stay."
            f" {_protected(details)}Router rows were removed with their experts."
        ),
    ]
    if selection and selection.experts_per_token:
        steps.append(
            f"Each token is routed to {selection.experts_per_token} experts instead of"
            f" {facts.model.num_experts_per_tok}."
        )
    if facts.recipe.prune.repair:
        steps.append(f"The kept experts were re-fitted in closed form ({facts.recipe.prune.repair}).")
    if which == "quantized":
        found = facts.quantization or {}
        how = f"{_scheme(facts)}, {found.get('method', facts.recipe.quantize.method)}"
        left = f"; left in full precision: {listed(found['left'], 12)}" if found.get("left") else ""
        steps.append(f"Weights were quantized with llm-compressor ({how}){left}.")
    return "## Method\n\n" + "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))


def _protected(details: Mapping[str, Any]) -> str:
    sizes = {
        name: sum(map(len, layers.values())) for name, layers in (details.get("protected") or {}).items() if layers
    }
    return (
        f"Protected whatever their saliency: {listed(f'{size} ({name})' for name, size in sizes.items())}. "
        if sizes
        else ""
    )


# ---------------------------------------------------------------------------------------------- what was measured


def _results(facts: RunFacts, which: str) -> str:
    rows = [row for row in verified_rows(facts) if row["name"] in ("base", which)]
    if len(rows) == 2:
        return _verified_results(facts, rows, which)
    return _mask_results(facts)


def _verified_results(facts: RunFacts, rows: Sequence[Mapping[str, Any]], which: str) -> str:
    table = _table(
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
        f" disk.\n\n{table}"
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
    measured = (facts.verification or {}).get("equal_bytes") and verified_rows(facts)[-1]["name"] == which
    return verdict_of_equal_bytes(facts)[1] if measured else ""


def _speed(facts: RunFacts, which: str) -> str:
    found = [row for row in (facts.verification or {}).get("throughput") or () if row["model"] in ("base", which)]
    if {row["model"] for row in found} != {"base", which} or all(row["not_measured"] for row in found):
        return ""
    table = _table(("Model", "Engine", *(metric.heading for metric in SPEEDS), "Remark"), list(speed_rows(found)))
    return f"### Speed and memory\n\n{speed_lead(found)}\n\n{table}"


def _benchmarks(facts: RunFacts, which: str) -> str:
    found = {
        name: each
        for name, each in ((facts.verification or {}).get("lm_eval") or {}).items()
        if name in ("base", which)
    }
    if which not in found:
        return ""
    first = found[which]
    limit = f"first {count(first['limit'])} documents of each" if first["limit"] else "all documents"
    return f"### Task benchmarks (lm-eval {first['lm_eval']}, {limit})\n\n" + _table(
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
    return f"By source, rows of {pack} tokens, 95 % intervals in parentheses:\n\n" + _table(
        ("Source", *(metric.heading for metric in shown)), rows
    )


def _proofs(facts: RunFacts, which: str) -> str:
    """What the verify stage proved on the directories behind this model; what it could not test is left out."""
    wanted = ("pruned", "quantized")[: 1 if which == "pruned" else 2]
    found = [
        proof
        for proof in (facts.verification or {}).get("proofs", ())
        if proof["directory"] in wanted and proof["passed"] and proof.get("measured", True)
    ]
    lines = [f"- {proof['directory']}, {proof['name']}: {proof['detail']}" for proof in found]
    return "### Proved on the written directories, in a fresh process\n\n" + "\n".join(lines) if lines else ""


def _limits(facts: RunFacts, which: str) -> str:
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
        f"Free continuations, pruned as a mask, share that loop: {share_with_interval(found)}; base:"
        f" {share_with_interval(base)}."
        for group, metric, base, found in generated(facts)
        if group == UNION and metric == "loop_share"
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
    if said := words.get((facts.evaluation or {}).get("verdict", "")):
        lines.append(f"The recipe's gates for the pruning {said}, judged as a mask on the base model.")
    final = (facts.verification or {}).get("verdict")
    if which == "quantized" and final:
        lines.append(
            f"The recipe's gates for the quantized model {words[final]}."
            if final in words
            else "The recipe set no gates for the quantized model."
        )
    return lines


# ---------------------------------------------------------------------------------------------- use


def _served(facts: RunFacts, which: str) -> str:
    """Whether an engine really ran this directory."""
    ran = next(
        (
            row
            for row in (facts.verification or {}).get("throughput") or ()
            if (row["model"], row["engine"]) == (which, "vllm") and not row["not_measured"]
        ),
        None,
    )
    return (
        f"This run generated text with it in vLLM {ran['version']} on {ran['device']}."
        if ran
        else "This run started no serving engine on it."
    )


def _serving(facts: RunFacts, sizes: Sizes, which: str, scheme: str | None) -> str:
    target = facts.recipe.output.push_to_hub or "path/to/this/directory"
    ragged = len(set(sizes.experts.values())) > 1
    trust = facts.recipe.model.trust_remote_code or ragged
    packages = ("transformers", "torch", *(["compressed-tensors"] if scheme else []))
    versions = [f"{name} {facts.versions[name]}" for name in packages if facts.versions.get(name)]
    made = f" (made with {listed(versions)})" if versions else ""
    reload = (facts.quantization or {}).get("experts_reload_in_transformers", True) or scheme is None
    reads = (
        f"reads it{'; `compressed-tensors` must be installed' if scheme else ''}"
        if reload
        else "does not read routed experts in this scheme"
    )
    notes = [
        f"transformers: {reads}{made}.",
        *(
            f"{engine.name}: {engine.support(scheme, ragged=ragged).sentence}"
            for engine in ENGINES.values()
            if engine.on_card
        ),
        _served(facts, which),
    ]
    blocks = ["## Use it", _text("\n".join(f"- {note}" for note in notes))]
    if not ragged:
        blocks.append(_fenced("bash", f"vllm serve {target}{' --trust-remote-code' if trust else ''}"))
    if reload:
        code = ", trust_remote_code=True" if trust else ""
        lines = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{target}", dtype="auto", device_map="auto"{code})\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{target}")'
        )
        blocks.append(_fenced("python", lines))
    return "\n\n".join(blocks)


def _recipe(facts: RunFacts) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return (
        f"## Recipe\n\n{_fenced('bash', facts.command)}\n\n<details><summary>The recipe with every default written"
        f" out</summary>\n\n{_fenced('yaml', facts.recipe_yaml)}\n\n</details>"
        + (f"\n\nMade with {_text(versions)}." if versions else "")
    )


def _citation(facts: RunFacts) -> str:
    found = _criterion(facts).citations
    return "## Citation\n\n" + _fenced("bibtex", "\n\n".join(found)) if found else ""
