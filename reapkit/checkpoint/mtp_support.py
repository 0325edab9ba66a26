"""Decides which multi-token-prediction blocks are observed and pruned, from config and headers alone. Torch-free."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from reapkit.checkpoint.architecture import mtp_depth
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.expert_layout import Layout
from reapkit.checkpoint.readable import why_unreadable
from reapkit.core.formatting import ranges

LOADED = ("deepseek_v3", "glm4_moe")
"""Model types whose blocks transformers loads beside the model."""


def observed_mtp(
    wish: Literal["auto", "observe", "drop"],
    checkpoint: Checkpoint,
    layout: Layout,
    *,
    trust_remote_code: bool = False,
    measured: Collection[int] | None = None,
) -> tuple[int, ...]:
    """The layers (numbers behind the decoder's, as in `Layout.mtp`) that are observed and pruned by their own saliency;
    the others go.

    `wish`: the recipe's `prune.mtp`. `measured`: the layers of an observation that was made elsewhere, which then
    decides what can be.
    """
    layers = tuple(layout.mtp)
    if wish == "drop":
        return ()
    if measured is not None:
        return layers if set(layers) <= set(measured) else ()
    return layers if why_unobserved(checkpoint, layout, trust_remote_code=trust_remote_code) is None else ()


def why_unobserved(checkpoint: Checkpoint, layout: Layout, *, trust_remote_code: bool = False) -> str | None:
    """Why transformers cannot run the blocks beside the model, half a sentence; None where it can, or where no block
    routes."""
    if not layout.mtp:
        return None
    config, architecture = checkpoint.config, checkpoint.architecture
    if config.get("model_type") not in LOADED:
        return (
            f"transformers loads the multi-token-prediction blocks of {' and '.join(LOADED)} only, not of"
            f" {config.get('model_type')}"
        )
    if trust_remote_code and "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        return (
            "the checkpoint brings modelling code of its own (model.trust_remote_code), which loads no"
            " multi-token-prediction block"
        )
    if (unread := why_unreadable(checkpoint)) is not None:
        return unread
    declared = mtp_depth(config)
    declared = 1 if declared is None else declared
    wanted = range(architecture.num_hidden_layers, architecture.num_hidden_layers + min(declared, len(layout.mtp) + 1))
    if tuple(layout.mtp) != tuple(wanted) or any(not name.startswith(layout.stack) for name in layout.mtp_tensors):
        return (
            f"config.json declares {declared} multi-token-prediction blocks behind layer"
            f" {architecture.num_hidden_layers - 1}, and the tensors hold routed experts in"
            f" {', '.join(map(str, layout.mtp))}"
        )
    counts = {layer.num_experts for layer in layout.mtp.values()}
    if counts != {architecture.num_experts}:
        return (
            f"its block has {' and '.join(map(str, sorted(counts)))} experts where config.json says"
            f" {architecture.num_experts}"
        )
    return None


def mtp_notes(
    wish: Literal["auto", "observe", "drop"], layout: Layout, observed: tuple[int, ...], why: str | None
) -> list[str]:
    """What the user should hear of the blocks' fate, where there are any; `why` they cannot be observed."""
    block = "block" if len(layout.mtp) < 2 else "blocks"
    if observed:
        return [
            f"The multi-token-prediction {block} (layer {ranges(observed)}) will be observed and pruned like the"
            " decoder's layers."
        ]
    if not layout.mtp and (not layout.mtp_tensors or wish != "drop"):  # blocks that do not route stay as they are
        return []
    return [
        f"The multi-token-prediction {block} will be"
        f" dropped{' (prune.mtp: drop)' if wish == 'drop' else f', since {why}'}. Engines lose speculative decoding"
        " with it."
    ]
