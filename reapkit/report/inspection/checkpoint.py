"""Inspects a checkpoint by its config and headers: architecture, expert layout, bytes, quantization. No weight is read.
Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reapkit.checkpoint.architecture import quantization_of
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.expert_layout import Layout, MoeLayer
from reapkit.checkpoint.parameter_counts import active_parameters
from reapkit.core.formatting import human_bytes, human_count, narrow_percent, plural, ranges
from reapkit.report.inspection.recognise import read_json
from reapkit.report.inspection.render import Block, lines, table


def facts(directory: Path) -> dict[str, Any]:
    """What config.json and the safetensors headers say. Raises UnusableError for a model without routed experts."""
    checkpoint = Checkpoint.open(directory)
    architecture, layout = checkpoint.architecture, checkpoint.layout
    weights = active_parameters(checkpoint, layout)
    by_dtype: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        by_dtype[tensor.dtype] += tensor.nbytes
    pruned = directory / "reapkit.json"
    return {
        "model_type": architecture.model_type,
        "architectures": list(checkpoint.config.get("architectures") or []),
        "num_hidden_layers": architecture.num_hidden_layers,
        "num_experts": architecture.num_experts,
        "num_experts_per_tok": architecture.num_experts_per_tok,
        "n_group": architecture.n_group,
        "experts": {str(index): layer.num_experts for index, layer in layout.layers.items()},
        "layout": _layouts(layout),
        "mtp": {"layers": list(layout.mtp), "tensors": len(layout.mtp_tensors)},
        "parameters": weights.total,
        "active_parameters": weights.active,
        "tensors": len(checkpoint.tensors),
        "shards": len(checkpoint.shards),
        "bytes": checkpoint.nbytes,
        "bytes_by_dtype": dict(by_dtype.most_common()),
        "expert_bytes": sum(kind.count * kind.tensor.nbytes for kind in layout.kinds if kind.layer is not None),
        "quantization": _quantization(checkpoint.config),
        "pruned": (
            {name: read_json(pruned).get(name) for name in ("key", "complete", "source")} if pruned.is_file() else None
        ),
    }


def _layouts(layout: Layout) -> list[dict[str, Any]]:
    """Layers alike in how they store their experts: which names per expert, which stacked or router tensors."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for index, layer in layout.layers.items():
        alike.setdefault((layer.num_experts, *_names(layer)), []).append(index)
    return [
        {"layers": indices, "experts": key[0], "per_expert": list(key[1]), "stacked": list(key[2])}
        for key, indices in alike.items()
    ]


def _names(layer: MoeLayer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(sorted(layer.parts)), tuple(sorted({name.split(f".{layer.index}.", 1)[-1] for name in layer.stacked}))


def _quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    found = quantization_of(config)
    if not found:
        return None
    groups = found.get("config_groups")
    weights = (
        [group.get("weights") or {} for group in groups.values() if isinstance(group, Mapping)]
        if isinstance(groups, Mapping)
        else []
    )
    known = {
        name: found[name]
        for name in ("quant_method", "format", "bits", "group_size", "weight_block_size")
        if found.get(name) is not None
    }
    return known | {
        "weights": [
            {name: one.get(name) for name in ("num_bits", "type", "strategy", "group_size", "symmetric")}
            for one in weights
        ],
        "ignored": len(found.get("ignore") or found.get("modules_to_not_convert") or []),
    }


def blocks(found: Mapping[str, Any], *, colour: bool) -> list[Block]:
    """Architecture, sizes, layout."""
    grouped = f" in {found['n_group']} groups" if found["n_group"] > 1 else ""
    routed = [int(layer) for layer in found["experts"]]
    made = [
        lines(
            f"checkpoint of {found['model_type']}"
            + (f" ({', '.join(found['architectures'])})" if found["architectures"] else ""),
            f"{found['num_hidden_layers']} layers, {len(routed)} MoE ({ranges(routed)}),"
            f" top-{found['num_experts_per_tok']} of {found['num_experts']} experts{grouped}",
            f"{human_count(found['parameters'])} parameters, {human_count(found['active_parameters'])} active per"
            " token",
            f"{human_bytes(found['bytes'])} in {found['tensors']:,} tensors and"
            f" {plural(found['shards'], 'shard')}; experts and routers"
            f" {human_bytes(found['expert_bytes'])}"
            f" ({narrow_percent(found['expert_bytes'] / found['bytes'] if found['bytes'] else None)})",
            f"dtypes: {', '.join(f'{dtype} {human_bytes(size)}' for dtype, size in found['bytes_by_dtype'].items())}",
            f"quantization: {_quantized(found['quantization'])}",
        )
    ]
    if found["mtp"]["tensors"]:
        made.append(
            lines(
                f"multi-token prediction: {found['mtp']['tensors']:,} tensors"
                + (f", routed layers {ranges(found['mtp']['layers'])}" if found["mtp"]["layers"] else "")
            )
        )
    if found["pruned"]:
        made.append(
            lines(
                f"pruned by reapkit from {str(found['pruned']['source'])[:12]}"
                + ("" if found["pruned"]["complete"] else ", unfinished")
            )
        )
    rows = [
        (ranges(one["layers"]), one["experts"], "per expert" if one["per_expert"] else "stacked", _stored(one))
        for one in found["layout"]
    ]
    return [
        *made,
        table(
            "Experts per layer and how they are stored",
            ("layers", "experts", "layout", "tensors"),
            rows,
            left=("layout", "tensors"),
        ),
    ]


def _stored(one: Mapping[str, Any]) -> str:
    """`down_proj, gate_proj, up_proj: weight, weight_scale; mlp.gate.weight`: names with the same endings together."""
    endings: dict[str, list[str]] = {}
    for name in one["per_expert"]:
        matrix, _, ending = name.rpartition(".")
        endings.setdefault(matrix, []).append(ending)
    matrices: dict[tuple[str, ...], list[str]] = {}
    for matrix, found in endings.items():
        matrices.setdefault(tuple(found), []).append(matrix)
    return "; ".join(
        [*(f"{', '.join(names)}: {', '.join(found)}" for found, names in matrices.items()), *one["stacked"]]
    )


def _quantized(quantization: Mapping[str, Any] | None) -> str:
    if quantization is None:
        return "none"
    method = ", ".join(
        f"{name} {value}" if name not in ("quant_method", "format") else str(value)
        for name, value in quantization.items()
        if name not in ("weights", "ignored")
    )
    schemes = dict.fromkeys(
        f"{one['num_bits']} bits {one['type']}" + (f", group {one['group_size']}" if one["group_size"] else "")
        for one in quantization["weights"]
    )
    ignored = f"; {quantization['ignored']:,} left out" if quantization["ignored"] else ""
    return (f"{method}: {'; '.join(schemes)}" if schemes else method or "unknown") + ignored
