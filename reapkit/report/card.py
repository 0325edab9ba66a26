"""Writes the model card: what a directory is, how it was made, what was measured, how to serve it. The card says
nothing that the run did not measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import yaml

from reapkit.core.formatting import count, human_bytes, human_count, human_experts, listed, percent, ranges
from reapkit.planning.plan import Sizes
from reapkit.report.card_results import limits, proofs, results
from reapkit.report.card_use import recipe, serving
from reapkit.report.facts import RunFacts
from reapkit.report.markdown import escaped, fenced, table
from reapkit.selection.criteria.criterion import Criterion
from reapkit.selection.criteria.registry import described
from reapkit.selection.selection import Selection

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
        results(facts, which),
        proofs(facts, which),
        limits(facts, which),
    ]
    code = [serving(facts, sizes, which, scheme), recipe(facts), _citation(facts)]
    return "\n\n".join(part for part in (_front_matter(facts, scheme), *map(escaped, text), *code) if part) + "\n"


def _scheme(facts: RunFacts) -> str:
    return str(facts.quantization.get("scheme") or facts.recipe.quantize.scheme or "own recipe")


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
        found = facts.quantization
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
    return table(("Property", "Value"), rows)


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
    mix = table(("Source", "Samples", "Share of samples", "Scored tokens", "Share of scored", "Purpose"), rows)
    length = found.get("max_length", facts.recipe.calibration.max_length)
    completion = found.get("score", facts.recipe.calibration.score) == "completion"
    what = "positions that predict an assistant token" if completion else "every position"
    return (
        "## Calibration mix\n\nWhich experts stay depends on what the model read: an expert that none of these sources"
        f" uses ranks last.\n\n{mix}\n\nRows of up to {count(length)} tokens; scored: {what}."
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
            f" {_protected(details)}{_by_table(selection)}Router rows were removed with their experts."
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
        found = facts.quantization
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


def _by_table(selection: Selection | None) -> str:
    layers = selection.table_layers if selection else ()
    return f"A fixed table routes the tokens of layers {ranges(layers)}, which keep all experts. " if layers else ""


def _citation(facts: RunFacts) -> str:
    found = _criterion(facts).citations
    return "## Citation\n\n" + fenced("bibtex", "\n\n".join(found)) if found else ""
