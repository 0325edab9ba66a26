"""Refuses a checkpoint whose quantized weights nothing here can read, before anything of it is run. Torch-free."""

from __future__ import annotations

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.quantization_methods import METHODS
from reapkit.checkpoint.stored_matrices import orphans
from reapkit.core.errors import UnusableError


def require_readable(checkpoint: Checkpoint) -> None:
    """Raises UnusableError, with the way out, where the weights cannot be dequantized, or where a scale or a packed
    weight belongs to no matrix that would be."""
    if (why := why_unreadable(checkpoint)) is not None:
        raise UnusableError(f"{checkpoint.path}: {why}. {way_out()}")


def why_unreadable(checkpoint: Checkpoint) -> str | None:
    """Why a model of these weights cannot be run, half a sentence; None where it can, as far as names and shapes
    say."""
    if not checkpoint.quantization:
        return None
    name, method = checkpoint.method_name, checkpoint.method
    quantized = f"the weights are quantized ({name})"
    if method is None:
        return f"{quantized}, and reapkit knows no such method"
    if method.unread is not None:
        return f"{quantized}, and {method.unread}"
    if refused := method.refuses(checkpoint.quantization, checkpoint.tensors):
        return f"{quantized}, and {refused}"
    if left := orphans(checkpoint.plain.tensors):
        shown = ", ".join(left[:3]) + (", …" if len(left) > 3 else "")
        return (
            f"{quantized}, but {len(left)} tensors belong to no matrix that could be dequantized: {shown}. Left out,"
            " they would change what the model computes"
        )
    return None


def way_out() -> str:
    """What to do with a checkpoint that cannot be read."""
    read = ", ".join(name for name, method in METHODS.items() if method.observed)
    return (
        f"Give model.source the model's unquantized release and quantize the result (quantize.scheme), or a release in"
        f" one of the methods that are read: {read}."
    )
