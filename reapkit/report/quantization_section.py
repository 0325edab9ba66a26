"""The section about quantization: scheme, cost, rounding errors, what stayed in full precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reapkit.core.formatting import count, extreme, human_count, listed, mean, number, percent, plural, signed_percent
from reapkit.quantization.schemes import SCHEMES
from reapkit.report.blocks import LEFT, RIGHT, Chart, Folded, Note, PageSection, PageTable, Text, Tiles
from reapkit.report.charts import axis, bars, layer_axis
from reapkit.report.facts import RunFacts
from reapkit.report.measures import verified_rows


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
    proofs = facts.verification.get("proofs", ())
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
        "xaxis": layer_axis(layers),
        "yaxis": axis("‖packed − source‖ / ‖source‖", ".0%" if max(values) > 0.05 else ".1%", rangemode="tozero"),
    }
    return [Chart("quantization-error", "Rounding error by layer", sentence, data, layout, 280)]
