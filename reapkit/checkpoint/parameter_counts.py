"""Counts a checkpoint's parameters and bytes, in total and active per token, before and after pruning, from headers
alone. Torch-free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reapkit.checkpoint.architecture import quantization_of
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.expert_layout import Kind, Layout
from reapkit.checkpoint.projection_names import QUANTIZER_STATE, Part, part_of
from reapkit.core.safetensors_header import TensorInfo


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights: all, and those that one token passes through."""

    total: int
    active: int


def pruned_sizes(checkpoint: Checkpoint, kept: Mapping[int, int]) -> tuple[int, int]:
    """(numel, nbytes) of all tensors once layer `l` keeps `kept[l]` experts; layers that `kept` omits stay whole.

    Multi-token-prediction blocks that route stay only where `kept` names all of them (their index continues the
    decoder's); otherwise the whole block is counted as dropped. Experts of a layer count as equally large.
    """
    layout = checkpoint.layout
    numel, nbytes = checkpoint.numel, checkpoint.nbytes
    mtp_stays = all(index in kept for index in layout.mtp)
    if not mtp_stays:
        dropped = [kind for kind in layout.kinds if kind.names[0] in layout.mtp_tensors]
        numel -= sum(kind.count * kind.tensor.numel for kind in dropped)
        nbytes -= sum(kind.count * kind.tensor.nbytes for kind in dropped)
    kinds = _by_layer(layout)
    for index, layer in {**layout.layers, **(layout.mtp if mtp_stays else {})}.items():
        removed = layer.num_experts - kept.get(index, layer.num_experts)
        numel -= removed * round(sum(kind.count * kind.tensor.numel / kind.experts for kind in kinds[index]))
        nbytes -= removed * round(sum(kind.count * kind.tensor.nbytes / kind.experts for kind in kinds[index]))
    return numel, nbytes


def _by_layer(layout: Layout) -> Mapping[int, list[Kind]]:
    """The kinds with an expert axis, by the layer that owns it."""
    found: dict[int, list[Kind]] = defaultdict(list)
    for kind in layout.kinds:
        if kind.layer is not None:
            found[kind.layer.index].append(kind)
    return found


def active_parameters(
    checkpoint: Checkpoint, layout: Layout, kept: Mapping[int, int] | None = None, experts_per_token: int | None = None
) -> Parameters:
    """Weights in all and per token: each layer counts `experts_per_token` of its experts, multi-token prediction counts
    not at all.

    Packed weights count as what they stand for, scales and zero points as nothing; router rows stay active.
    """
    top_k = experts_per_token or checkpoint.architecture.num_experts_per_tok
    layout = checkpoint.plain.layout if checkpoint.matrices else layout
    bits = _packed_bits(checkpoint.config)
    total = active = sum(
        kind.count * _weights(kind.tensor, bits) for kind in layout.kinds if kind.names[0] not in layout.mtp_tensors
    )
    kinds = _by_layer(layout)
    for index, layer in layout.layers.items():
        remaining = (kept or {}).get(index, layer.num_experts)
        experts = router = 0
        for kind in kinds[index]:
            weights = kind.count * _weights(kind.tensor, bits)
            if kind.tensor.name in layer.routers:
                router += weights * (layer.num_experts - remaining) // kind.experts
            else:
                experts += weights
        total -= experts * (layer.num_experts - remaining) // layer.num_experts + router
        active -= experts * (layer.num_experts - min(top_k, remaining)) // layer.num_experts + router
    return Parameters(total, active)


def _packed_bits(config: Mapping[str, Any]) -> int:
    """Bits per packed weight as the quantization config declares them, 4 where it does not say."""
    found: list[int] = []

    def walk(value: Any) -> None:
        if isinstance(value, Mapping):
            found.extend(value[key] for key in ("num_bits", "bits") if isinstance(value.get(key), int))
            for inner in value.values():
                walk(inner)

    quantization = quantization_of(config)
    groups = quantization.get("config_groups")
    walk({key: group.get("weights") for key, group in groups.items()} if isinstance(groups, Mapping) else quantization)
    return next((bits for bits in found if bits > 0), 4)


def _weights(tensor: TensorInfo, bits: int) -> int:
    part = part_of(tensor.name)
    if part in QUANTIZER_STATE:
        return 0
    if part is Part.PACKED and tensor.dtype == "I32":
        return tensor.numel * 32 // bits
    if part is Part.PACKED and tensor.dtype == "U8":
        return tensor.numel * 2
    return tensor.numel
