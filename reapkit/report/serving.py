"""Which engines load a scheme, as far as it is known; the card quotes it, and says what its run did not try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HUMMING = (
    "CUDA, vLLM ≥ 0.32 (its humming kernels). The group size must divide the hidden size and the expert width per"
    " tensor-parallel rank. There is no CPU kernel for quantized experts."
)
MARLIN = "CUDA. The group size must divide the hidden size and the expert width per tensor-parallel rank."


@dataclass(frozen=True)
class Engine:
    """What an engine needs to load a scheme, or why it cannot."""

    vllm: str
    sglang: str


INTEGER_SGLANG = "4 and 8 bits only"
ENGINES: Mapping[str, Engine] = {
    **{f"W{bits}A16": Engine(HUMMING, f"not supported: {INTEGER_SGLANG}") for bits in (2, 3, 5, 6, 7)},
    **{f"W{bits}A16": Engine(MARLIN, "supported") for bits in (4, 8)},
}
UNKNOWN = Engine(
    "check that your version reads this compressed-tensors scheme for experts.",
    "check that your version reads this scheme",
)
PLAIN = Engine("any version that serves the base model.", "any version that serves the base model")
RAGGED = Engine(
    "not from the config alone: layers hold different numbers of experts.",
    "not supported: layers hold different numbers of experts",
)


def engine_for(scheme: str | None, *, ragged: bool = False) -> Engine:
    """What serves a checkpoint quantized by `scheme` (None: not quantized)."""
    if ragged:
        return RAGGED
    return PLAIN if scheme is None else ENGINES.get(scheme, UNKNOWN)
