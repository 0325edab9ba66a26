"""Estimates what a run needs: memory per placement, tokens, FLOPs, bytes read and written. From config and headers
alone; torch-free.

The figures are bounds to plan with, not measurements: weights are exact, activations are counted from the widths of one
batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reapkit.checkpoint.architecture import hidden_width, largest_number, text_config
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.expert_layout import LAYER, Layout
from reapkit.core.dtypes import BITS
from reapkit.planning.knockout_cost import KnockoutCost, knockout_cost
from reapkit.quantization.sizes import kept_share

if TYPE_CHECKING:
    from reapkit.planning.plan import Plan

COMPUTE_BYTES = 2  # bf16: FP8 and MXFP4 weights are dequantized to it
LOGITS_BYTES = 256_000_000  # logits are taken in chunks of this size
HIDDEN_COPIES = (
    8  # hidden-sized tensors that live at once in a decoder layer: residual, norms, attention in- and outputs
)
STREAMED_LAYERS = (
    2  # one computing, one read ahead, each in a block that is filled again (measured by benchmarks/streaming.py)
)
STAGED_LAYERS = 2  # pinned host memory on the way to an accelerator; without one, a layer is kept in reserve
READ_BUFFER_BYTES = 100_000_000  # what is cast or dequantized at once, the hashes' chunks, kernels that torch keeps
SAFE_SHARE = 0.85  # of what is free; the rest is for fragmentation and the libraries themselves
HOST_BASE_BYTES = 2_000_000_000  # Python, torch, transformers
REROUTE_WIDTH = 256
"""Numbers kept of an expert's output on a sampled token: inner products with the others, at most this many
projections."""
REROUTE_CHUNK_BYTES = 512 << 20  # of all experts' outputs held at once


@dataclass(frozen=True)
class Footprint:
    """Peak bytes on the device and on the host in one placement; on a machine without accelerator both are the
    host's."""

    device: int
    host: int


@dataclass(frozen=True)
class Machine:
    """Free memory of the accelerators together (None: there is none) and of the host, in bytes."""

    device: int | None
    host: int


@dataclass(frozen=True)
class RerouteCost:
    """The reroute sample: tokens, FLOPs of all experts on it in all layers, bytes on the device while one layer's path
    is found, and bytes of block inputs that wait on disk."""

    tokens: int
    flops: float
    device: int
    waiting: int


@dataclass(frozen=True)
class Estimates:
    """`tokens`: of the calibration, exact once it is prepared, else at most. `flops`: of the observing forward.
    `hidden_bytes`: what waits between two layers in streaming."""

    tokens: int
    tokens_exact: bool
    flops: float
    footprints: Mapping[str, Footprint]
    hidden_bytes: int
    bytes_read: int
    machine: Machine
    placement: str
    fits: bool
    waves: int
    host_budget: int
    reroute: RerouteCost | None = None
    knockout: KnockoutCost | None = None


def estimate(plan: Plan, share: int = 1) -> Estimates:
    """The figures of a plan on its machine, or on the `share`-th part of it that one of several processes has."""
    tokens, exact = _tokens(plan)
    footprints, hidden = _footprints(plan, tokens)
    reroute = _reroute(plan, tokens)
    if reroute is not None:
        footprints = {name: Footprint(each.device + reroute.device, each.host) for name, each in footprints.items()}
    free = plan.machine
    machine = Machine(free.device and free.device // share, free.host // share)
    placement = plan.recipe.runtime.placement
    if placement == "auto":
        placement = choose_placement(footprints["resident"], machine)
    budget = hidden_budget(footprints["streaming"], machine)
    least = plan.recipe.runtime.batch_tokens * int(text_config(plan.checkpoint.config)["hidden_size"]) * COMPUTE_BYTES
    waves = -(-hidden // max(budget, least))
    waves = 1 if placement == "resident" or plan.recipe.runtime.offload_directory else max(1, waves)
    fits = (
        footprints[placement].device <= (machine.host if machine.device is None else machine.device)
        and footprints[placement].host <= machine.host
    )
    return Estimates(
        tokens,
        exact,
        2.0 * plan.base.active_parameters * tokens,
        footprints,
        hidden,
        plan.checkpoint.nbytes * (waves if placement == "streaming" else 1),
        machine,
        placement,
        fits,
        waves,
        budget,
        reroute,
        knockout_cost(plan, tokens),
    )


def choose_placement(resident: Footprint, machine: Machine) -> str:
    """resident where the whole model fits with room to spare, else streaming."""
    room = machine.host if machine.device is None else machine.device
    return "resident" if resident.device <= SAFE_SHARE * room else "streaming"


def hidden_budget(streaming: Footprint, machine: Machine) -> int:
    """Host bytes that paused hidden states may take."""
    taken = streaming.host if machine.device is not None else max(streaming.host, streaming.device)
    return max(0, int(SAFE_SHARE * machine.host) - taken)


def machine_memory() -> Machine:
    """What is free now: of NVIDIA devices by NVML, of the host by the kernel."""
    return Machine(_nvidia_free(), _host_free())


def _tokens(plan: Plan) -> tuple[int, bool]:
    calibrate = plan.stage("calibrate")
    if calibrate.artifact is not None:
        return sum(source["tokens"] for source in calibrate.artifact.summary["sources"].values()), True
    calibration = plan.recipe.calibration
    return calibration.tokens or (calibration.samples or 0) * calibration.max_length, calibration.tokens is not None


def _footprints(plan: Plan, tokens: int) -> tuple[dict[str, Footprint], int]:
    text = text_config(plan.checkpoint.config)
    weights = layer_weights(plan.checkpoint, plan.layout)
    rest = weights.pop(None)
    batch = activation_bytes(text, plan.recipe.runtime.batch_tokens)
    hidden = tokens * hidden_width(text) * COMPUTE_BYTES
    largest = max(weights.values())
    staged = 1 if plan.machine.device is None else STAGED_LAYERS
    observed, experts = len(plan.layout.layers) + len(plan.mtp), plan.checkpoint.architecture.num_experts
    statistics = observed * len(plan.recipe.calibration.mix) * experts * 8 * (20 + experts)
    rest += _mtp_weights(plan)
    return {
        "resident": Footprint(rest + sum(weights.values()) + batch, HOST_BASE_BYTES + statistics),
        "streaming": Footprint(
            rest + STREAMED_LAYERS * largest + READ_BUFFER_BYTES + batch,
            HOST_BASE_BYTES + statistics + staged * largest,
        ),
    }, hidden


def _reroute(plan: Plan, tokens: int) -> RerouteCost | None:
    """Every expert computes every sampled token once: two FLOPs per weight of its three matrices, and the inner
    products."""
    sampled = min(plan.recipe.observe.reroute_tokens, tokens)
    if not sampled:
        return None
    text, experts, layers = (
        text_config(plan.checkpoint.config),
        plan.checkpoint.architecture.num_experts,
        len(plan.layout.layers),
    )
    hidden, kept = hidden_width(text), min(experts, REROUTE_WIDTH)
    inner = largest_number(text, "moe_intermediate_size", "intermediate_size") or hidden
    flops = 2.0 * layers * sampled * experts * hidden * (3 * inner + kept)
    waiting = sampled * hidden * COMPUTE_BYTES * (layers if plan.recipe.runtime.placement != "streaming" else 1)
    chunk = min(REROUTE_CHUNK_BYTES, 4 * sampled * experts * hidden)
    return RerouteCost(sampled, flops, 4 * sampled * experts * kept + 2 * chunk, waiting)


def _mtp_weights(plan: Plan) -> int:
    """Bytes of the multi-token-prediction blocks that are observed; they stay in memory, and share the model's
    embedding and head."""
    if not plan.mtp:
        return 0
    own = [
        kind
        for kind in plan.checkpoint.plain.layout.kinds
        if kind.tensor.name in plan.checkpoint.plain.layout.mtp_tensors
        and not kind.tensor.name.endswith(("embed_tokens.weight", "shared_head.head.weight"))
    ]
    return sum(kind.count * _computing_bytes(kind.tensor.dtype, kind.tensor.numel) for kind in own)


def layer_weights(
    checkpoint: Checkpoint, layout: Layout, kept: Mapping[int, int] | None = None
) -> dict[int | None, int]:
    """Bytes of each decoder layer as it computes, and (None) of everything else; multi-token-prediction blocks are not
    among them.

    `kept`: experts that stay, by MoE layer; None: all of them.
    """
    depth = checkpoint.architecture.num_hidden_layers
    layout = checkpoint.plain.layout if checkpoint.matrices else layout
    found: dict[int | None, int] = {None: 0}
    for kind in layout.kinds:
        tensor = kind.tensor
        if tensor.name in layout.mtp_tensors:
            continue
        match = LAYER.match(tensor.name)
        layer = int(match["index"]) if match and int(match["index"]) < depth else None
        nbytes = kind.count * _computing_bytes(tensor.dtype, tensor.numel)
        found[layer] = found.get(layer, 0) + (nbytes if kept is None else round(nbytes * kept_share(kind, kept)))
    return found


def _computing_bytes(dtype: str, numel: int) -> int:
    if dtype in ("F32", "F64", "I64"):
        return numel * BITS[dtype] // 8
    return numel * COMPUTE_BYTES


def activation_bytes(text: Mapping[str, Any], batch_tokens: int) -> int:
    """What one batch needs beside the weights: hidden-sized tensors, the experts' widest pair tensors, a chunk of
    logits."""
    hidden = hidden_width(text)
    inner = largest_number(text, "moe_intermediate_size", "intermediate_size") or hidden
    slots = next(
        (
            int(text[key])
            for key in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
            if isinstance(text.get(key), int)
        ),
        1,
    )
    return batch_tokens * COMPUTE_BYTES * (HIDDEN_COPIES * hidden + slots * (3 * inner + 2 * hidden)) + LOGITS_BYTES


def _host_free() -> int:
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _nvidia_free() -> int | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return sum(int(pynvml.nvmlDeviceGetMemoryInfo(handle).free) for handle in handles) or None
    except Exception:  # no driver, no library, no device: all mean that there is no accelerator to plan for
        return None
