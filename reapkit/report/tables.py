"""Formats plans and results as tables for a terminal, and as JSON. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal

from reapkit.core.formatting import human_bytes, human_count, human_experts, plural
from reapkit.evaluation.metrics.table import in_view
from reapkit.planning.disk import file_systems
from reapkit.planning.measuring import measuring, reason
from reapkit.planning.plan import Plan, Sizes
from reapkit.planning.quantization_memory import quantize_memory
from reapkit.planning.recipe_differences import RecipeDifference
from reapkit.report.terminal_table import TerminalColumn, TerminalTable


def _table(
    title: str, columns: Iterable[tuple[str, Literal["left", "right"]]], *, extra: Collection[str] = ()
) -> TerminalTable:
    """Left columns hold text that may wrap; those in `extra` go first where it is narrow."""
    return TerminalTable(
        title, [TerminalColumn(name, justify, justify == "left", name in extra) for name, justify in columns]
    )


def checks_table(checks: Iterable[Any]) -> TerminalTable:
    """What `plan --check` tried, each with `name`, `detail` and whether it `ran`."""
    table = _table("checked before anything runs", [("", "left"), ("state", "left"), ("what was seen", "left")])
    for each in checks:
        table.add_row(each.name, "holds" if each.ran else "not tried", each.detail)
    return table


def plan_tables(plan: Plan) -> list[TerminalTable | str]:
    """The stages, the sizes before and after, and what it takes."""
    stages = _table(
        f"{plan.recipe.name}: stages",
        [("stage", "left"), ("state", "left"), ("key", "left"), ("why", "left")],
        extra=("key",),
    )
    for stage in plan.stages:
        stages.add_row(
            stage.name, "done" if stage.hit else "will run", (stage.key or "later")[:12], reason(plan, stage)
        )
    architecture = plan.checkpoint.architecture
    title = (
        f"{plan.recipe.model.source}: {architecture.model_type}, {architecture.num_hidden_layers} layers,"
        f" {len(plan.layout.layers)} MoE, top-{architecture.num_experts_per_tok} of {architecture.num_experts}"
    )
    sizes = _table(
        title, [("", "left"), ("experts", "right"), ("parameters", "right"), ("active", "right"), ("size", "right")]
    )
    sizes.add_row("base", *_size_cells(plan.base))
    for candidate in plan.candidates:
        pruned = plan.pruned(candidate)
        sizes.add_row(candidate.name if len(plan.candidates) > 1 else "pruned", *_size_cells(pruned))
        if (nbytes := plan.quantized_nbytes(candidate)) is not None:
            sizes.add_row(
                "  quantized" if len(plan.candidates) > 1 else "quantized",
                human_experts(pruned.experts),
                "",
                "",
                human_bytes(nbytes),
            )
    return [stages, sizes, *_estimate_tables(plan)]


def _estimate_tables(plan: Plan) -> list[TerminalTable | str]:
    """Memory per placement, and what the observation costs."""
    found = plan.estimates
    memory = _table("memory", [("placement", "left"), ("device", "right"), ("host", "right"), ("", "left")])
    for name, footprint in found.footprints.items():
        memory.add_row(
            name,
            human_bytes(footprint.device),
            human_bytes(footprint.host),
            "chosen" if name == found.placement else "",
        )
    if (quantizing := quantize_memory(plan, found.machine)) is not None:
        where = (
            f"layers on disk, {human_bytes(quantizing.disk)}"
            if quantizing.offloads
            else "weights in host memory"
            if quantizing.on_disk
            else "shard by shard"
        )
        memory.add_row(
            f"quantize ({quantizing.method})",
            human_bytes(quantizing.chosen.device),
            human_bytes(quantizing.chosen.host),
            where,
        )
    free = human_bytes(found.machine.host) if found.machine.device is None else human_bytes(found.machine.device)
    memory.add_row(
        "free here", free, human_bytes(found.machine.host), "no accelerator" if found.machine.device is None else ""
    )
    lines = [
        f"observe: {'' if found.tokens_exact else 'at most '}{found.tokens:,} tokens, {found.flops:.2g} FLOP, "
        f"{human_bytes(found.bytes_read)} read"
    ]
    if found.reroute is not None:
        lines.append(
            f"reroute: {found.reroute.tokens:,} tokens through every expert, {found.reroute.flops:.2g} FLOP,"
            f" {human_bytes(found.reroute.device)} on the device, {human_bytes(found.reroute.waiting)} on disk"
        )
    if found.knockout is not None:
        takes = "" if found.knockout.hours is None else f", {_span(found.knockout.hours)} at the observation's speed"
        lines.append(
            f"knockout: {found.knockout.tokens:,} tokens through {found.knockout.forwards:,.0f} forwards"
            f" ({found.knockout.token_forwards:.3g} token-forwards), {found.knockout.flops:.2g} FLOP{takes}"
        )
    if not found.fits:
        lines.append(
            f"memory: {found.placement} does not fit into the free memory of this machine; lower runtime.batch_tokens"
            " or use a larger machine"
        )
    elif found.placement == "streaming":
        lines.append(
            f"streaming: {human_bytes(found.hidden_bytes)} of hidden states wait between layers, "
            f"{plural(found.waves, 'wave')}"
        )
    return [memory, *_disk_tables(plan), "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])]


def _span(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{max(1, round(60 * hours))} min"


def _disk_tables(plan: Plan) -> list[TerminalTable | str]:
    """What each stage puts on each disk, and whether there is room."""
    disks = file_systems(plan)
    written = _table("disk", [("stage", "left"), ("stays", "right"), ("meanwhile", "right"), ("where", "left")])
    for disk in disks:
        for stage in dict.fromkeys(name for name, _ in disk.uses):
            uses = [use for name, use in disk.uses if name == stage]
            kept, meanwhile = sum(use.kept for use in uses), sum(use.meanwhile for use in uses)
            most = "" if all(use.is_exact for use in uses) else "≤ "
            where = ", ".join(dict.fromkeys(use.place for use in uses))
            written.add_row(
                stage, f"{most}{human_bytes(kept)}", f"{most}{human_bytes(meanwhile)}" if meanwhile else "", where
            )
    lines = [
        f"{disk.path}: at most {human_bytes(disk.peak)} at a time, {human_bytes(disk.kept)} stay,"
        f" {human_bytes(disk.free)} are free"
        for disk in disks
    ]
    lines += [f"disk: {told}" for disk in disks if (told := disk.shortage or disk.warning)]
    return [*([written] if disks else []), "\n".join(lines or ["disk: nothing will be written"])]


def _size_cells(sizes: Sizes) -> tuple[str, str, str, str]:
    return (
        human_experts(sizes.experts),
        human_count(sizes.parameters),
        human_count(sizes.active_parameters),
        human_bytes(sizes.nbytes),
    )


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The same facts as `plan_tables`, exact."""

    def sizes(value: Sizes) -> dict[str, Any]:
        return {
            "experts": {str(k): v for k, v in value.experts.items()},
            "parameters": value.parameters,
            "active_parameters": value.active_parameters,
            "bytes": value.nbytes,
        }

    quantizing, disks = quantize_memory(plan), file_systems(plan)
    return {
        "name": plan.recipe.name,
        "model": plan.recipe.model.source,
        "model_type": plan.checkpoint.architecture.model_type,
        "stages": [
            {
                "stage": s.name,
                "state": "hit" if s.hit else "run",
                "key": s.key,
                "reason": reason(plan, s),
                "inputs": list(s.inputs),
                "measures": None
                if (found := measuring(plan, s)) is None
                else {"there": len(found.there), "missing": [each.title for each in found.missing]},
            }
            for s in plan.stages
        ],
        "estimates": asdict(plan.estimates),
        "disk": [disk.to_json() for disk in disks],
        "quantize_memory": quantizing and asdict(quantizing),
        "disk_shortage": "\n".join(disk.shortage for disk in disks if disk.shortage) or None,
        "notes": list(plan.notes),
        "date": plan.identities.date,
        "base": sizes(plan.base),
        "candidates": [
            {"name": c.name, "pruned": sizes(plan.pruned(c)), "quantized_bytes": plan.quantized_nbytes(c)}
            for c in plan.candidates
        ],
    }


def difference_tables(difference: RecipeDifference) -> list[TerminalTable | str]:
    """The fields in which two recipes differ, and what that reruns."""
    fields = _table("fields that differ", [("field", "left"), ("first", "left"), ("second", "left")])
    for path, left, right in difference.fields:
        fields.add_row(
            path,
            *(
                json.dumps(value) if isinstance(value, (dict, list, bool, type(None))) else str(value)
                for value in (left, right)
            ),
        )
    if not difference.fields:
        return ["The recipes have no differences."]
    if difference.stages is None:
        return [fields, "A model is not available here, so the stages that would rerun are unknown."]
    return [fields, f"Stages that would rerun: {', '.join(difference.stages) or 'none'}"]


def result_table(verification: Mapping[str, Any]) -> TerminalTable:
    """Base, pruned and quantized side by side: experts, bytes and the narrow view of metrics on the confirm rows."""
    table = _table(
        "Measured on held-out rows kept for the final numbers",
        [
            ("", "left"),
            ("experts", "right"),
            ("size", "right"),
            *((metric.label, "right") for metric in in_view("narrow")),
        ],
    )
    for row in (*verification["rows"], *filter(None, [verification.get("equal_bytes")])):
        table.add_row(
            row["name"],
            str(row["experts"]),
            human_bytes(row["bytes"]),
            *(metric.show_plain(row.get(metric.name)) for metric in in_view("narrow")),
        )
    return table
