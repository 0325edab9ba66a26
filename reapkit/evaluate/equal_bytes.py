"""The control that a sceptic asks for: the unpruned model, quantized alone to about the same bytes. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from reapkit.checkpoint import Checkpoint
from reapkit.recipe.schema import QuantizeSpec
from reapkit.schemes import SCHEMES, check_quantize, quantized_bytes

TOLERANCE = 0.1
"""Largest deviation of the control's bytes from the result's that still counts as equal."""


@dataclass(frozen=True)
class EqualBytes:
    """The scheme nearest in size to the result and the unpruned model's bytes in it; `spec` is None if none is near enough."""

    scheme: str | None
    nbytes: int | None
    target_bytes: int
    spec: QuantizeSpec | None

    def __str__(self) -> str:
        if self.scheme is None:
            return "no scheme fits the unpruned model, so there is no equal-bytes control"
        share = f"{self.nbytes / self.target_bytes:.0%} of the result's bytes"
        if self.spec is None:
            return f"no equal-bytes control: the nearest scheme, {self.scheme}, takes {share}"
        return f"the unpruned model in {self.scheme} takes {share}"


def equal_bytes(checkpoint: Checkpoint, quantize: QuantizeSpec, target_bytes: int, tolerance: float = TOLERANCE) -> EqualBytes:
    """How the unpruned `checkpoint` would come nearest to `target_bytes`, with the recipe's method, group size and ignores.

    Only integer weight-only schemes that fit the checkpoint are considered; a raw llm-compressor recipe falls back to rounding.
    """
    method = "rtn" if quantize.recipe is not None else quantize.method
    specs = [quantize.model_copy(update={"scheme": name, "recipe": None, "method": method}) for name, scheme in SCHEMES.items()
             if scheme.kind == "int"]
    sizes = [(quantized_bytes(checkpoint, spec), spec) for spec in specs if not check_quantize(checkpoint, spec)]
    if not sizes:
        return EqualBytes(None, None, target_bytes, None)
    nbytes, spec = min(sizes, key=lambda each: abs(each[0] - target_bytes))
    near = abs(nbytes - target_bytes) <= tolerance * target_bytes
    return EqualBytes(spec.scheme, nbytes, target_bytes, spec if near else None)
