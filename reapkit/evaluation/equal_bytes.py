"""Plans the control at equal bytes: the unpruned model, quantized to about the size of the result. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.quantization.checks import check_quantize
from reapkit.quantization.schemes import SCHEMES, Scheme
from reapkit.quantization.sizes import quantized_bytes
from reapkit.recipe.schema import QuantizeSpec

FARTHEST = 1.5
"""A scheme whose bytes are further from the result's than by this factor is no control for it."""
GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class EqualBytes:
    """The scheme nearest in size to the result and the unpruned model's bytes in it; `spec` is None if none is near
    enough."""

    scheme: str | None
    nbytes: int | None
    target_bytes: int
    spec: QuantizeSpec | None

    def __str__(self) -> str:
        if self.scheme is None or self.nbytes is None:
            return "No scheme fits the unpruned model, so there is no equal-bytes control."
        share = f"{self.nbytes / self.target_bytes:.0%} of the result's bytes"
        if self.spec is None:
            return f"No equal-bytes control: the nearest scheme for the unpruned model, {self.scheme}, takes {share}."
        return (
            f"The unpruned model in {self.scheme} (groups of {self.spec.group_size}, rounded to nearest) takes {share}."
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "scheme": self.scheme if self.spec else None,
            "method": "rtn" if self.spec else None,
            "group_size": self.spec.group_size if self.spec else None,
            "bytes": self.nbytes,
            "target_bytes": self.target_bytes,
            "note": str(self),
        }


def equal_bytes(checkpoint: Checkpoint, quantize: QuantizeSpec, target_bytes: int) -> EqualBytes:
    """How the unpruned `checkpoint`, rounded to nearest, would come nearest to `target_bytes`, with the recipe's group
    size and ignores.

    Only integer weight-only schemes that fit the checkpoint are considered. A group size that the recipe does not name
    is the largest of 128, 64 and 32 that fits.
    """
    sizes = [
        (quantized_bytes(checkpoint, spec), spec)
        for spec in _fitting(checkpoint, quantize, lambda scheme: scheme.kind == "int")
    ]
    if not sizes:
        return EqualBytes(None, None, target_bytes, None)
    nbytes, spec = min(sizes, key=lambda each: abs(each[0] - target_bytes))
    near = max(nbytes, target_bytes) <= FARTHEST * min(nbytes, target_bytes)
    return EqualBytes(spec.scheme, nbytes, target_bytes, spec if near else None)


def next_scheme(checkpoint: Checkpoint, quantize: QuantizeSpec, nbytes: int) -> tuple[str, float] | None:
    """The smallest of the suggested schemes in which `checkpoint` takes more than `nbytes`, and by what
    factor, or None."""
    sizes = [
        (quantized_bytes(checkpoint, spec), str(spec.scheme))
        for spec in _fitting(checkpoint, quantize, lambda scheme: scheme.suggested)
    ]
    larger = [each for each in sizes if each[0] > nbytes]
    return (min(larger)[1], min(larger)[0] / nbytes) if larger else None


def _fitting(
    checkpoint: Checkpoint, quantize: QuantizeSpec, wanted: Callable[[Scheme], bool]
) -> Iterator[QuantizeSpec]:
    """The wanted schemes, rounded to nearest, each with the first group size that divides every quantized width."""
    groups = (
        (quantize.group_size,) if "group_size" in quantize.model_fields_set else (quantize.group_size, *GROUP_SIZES)
    )
    for name in (name for name, scheme in SCHEMES.items() if wanted(scheme)):
        specs = (
            quantize.model_copy(update={"scheme": name, "recipe": None, "method": "rtn", "group_size": group})
            for group in groups
        )
        if (fitting := next((spec for spec in specs if not check_quantize(checkpoint, spec)), None)) is not None:
            yield fitting
