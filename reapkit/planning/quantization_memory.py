"""Estimates the memory that quantizing the pruned model takes, and decides whether its layers wait on disk. From
headers alone; torch-free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reapkit.checkpoint.architecture import hidden_width, largest_number, text_config
from reapkit.planning.estimates import (
    COMPUTE_BYTES,
    HOST_BASE_BYTES,
    SAFE_SHARE,
    Footprint,
    Machine,
    activation_bytes,
    layer_weights,
)
from reapkit.planning.plan import Plan
from reapkit.quantization.sizes import matrices_by_layer

ATTENTION_BYTES = (
    8  # per score of the plain attention that llm-compressor calibrates with: bf16, its float32 softmax, bf16 again
)
FLOAT32 = 4
LAYERS_WHILE_READ = 2  # one as transformers holds it, one taken apart


@dataclass(frozen=True)
class QuantizeMemory:
    """`in_memory`: with all weights on the host; `on_disk`: with the decoder layers on disk until their turn (None:
    never, as with rtn, which holds a shard at most). `offloads`: which of the two it will be. `disk`: bytes that the
    layers take on disk meanwhile.

    Without an accelerator a footprint's two numbers are both the host's, and add up.
    """

    method: str
    in_memory: Footprint
    on_disk: Footprint | None
    offloads: bool
    disk: int

    @property
    def chosen(self) -> Footprint:
        return self.on_disk if self.offloads and self.on_disk is not None else self.in_memory


def quantize_memory(plan: Plan, machine: Machine | None = None) -> QuantizeMemory | None:
    """The figures for the largest candidate, or None where the recipe quantizes nothing.

    Device: one layer, what its calibration collects (for gptq a float32 Hessian [inputs, inputs] of every quantized
    matrix in it), one batch. Host: weights, the calibration's hidden states, one shard of the result.
    """
    spec = plan.recipe.quantize
    if spec.scheme is None and spec.recipe is None:
        return None
    candidate = max(plan.candidates, key=lambda each: plan.pruned(each).nbytes)
    kept = plan.kept(candidate)
    written = min(plan.recipe.output.max_shard_bytes, plan.quantized_nbytes(candidate) or plan.pruned(candidate).nbytes)
    found = matrices_by_layer(plan.checkpoint, spec, kept)
    stacked = any(len(matrix.tensor.shape) == 3 for each in found.values() for matrix, _ in each)
    if spec.method == "rtn" and spec.recipe is None and not stacked:
        grown = -(-plan.checkpoint.plain.nbytes // plan.checkpoint.nbytes)  # quantized weights are multiplied out
        shard = min(plan.recipe.output.max_shard_bytes, plan.pruned(candidate).nbytes) * grown
        return QuantizeMemory("rtn", Footprint(shard, HOST_BASE_BYTES + written), None, False, 0)
    weights: dict[int | None, int] = dict(layer_weights(plan.checkpoint, plan.layout, kept))
    rest = weights.pop(None)
    layers, largest = sum(weights.values()), max(weights.values())
    device, hidden = _calibrating(plan, found)
    machine = machine or plan.machine
    base = HOST_BASE_BYTES + rest
    reading = max(LAYERS_WHILE_READ * largest, hidden, written)
    in_memory = Footprint(largest * (machine.device is not None) + device, base + layers + max(hidden, written))
    on_disk = Footprint(largest + device, base + reading)
    needed = in_memory.host if machine.device is not None else in_memory.host + in_memory.device
    placement = plan.recipe.runtime.placement
    offloads = placement == "streaming" or (placement == "auto" and needed > SAFE_SHARE * machine.host)
    return QuantizeMemory(
        "raw recipe" if spec.recipe is not None else spec.method, in_memory, on_disk, offloads, layers
    )


def _calibrating(plan: Plan, found: Mapping[int, list[Any]]) -> tuple[int, int]:
    """(bytes on the device beside the layer, bytes of hidden states that wait on the host); none of either for rtn."""
    recipe = plan.recipe
    if recipe.quantize.method == "rtn" and recipe.quantize.recipe is None:
        return 0, 0
    text, batch = text_config(plan.checkpoint.config), recipe.runtime.batch_tokens
    tokens = recipe.calibration.tokens or (recipe.calibration.samples or 0) * recipe.calibration.max_length
    heads = largest_number(text, "num_attention_heads") or 1
    scores = batch * min(recipe.calibration.max_length, batch) * heads * ATTENTION_BYTES
    logits = batch * (largest_number(text, "vocab_size") or 0) * COMPUTE_BYTES
    hessians: dict[int, int] = defaultdict(int)
    work = 0
    for layer, matrices in found.items():
        for matrix, count in matrices:
            hessians[layer] += count * matrix.columns**2 * FLOAT32
            work = max(work, FLOAT32 * (3 * matrix.columns**2 + 4 * matrix.rows * matrix.columns))
    collected = (
        max(hessians.values(), default=0) + work
        if recipe.quantize.method == "gptq" or recipe.quantize.recipe is not None
        else 0
    )
    return collected + max(activation_bytes(text, batch) + scores, logits), tokens * hidden_width(text) * COMPUTE_BYTES
