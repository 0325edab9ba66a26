"""Computes bfloat16 matrix products in float32 with one rounding, on CPUs without bfloat16 instructions; several times
faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FEWEST_ROWS = 16
"""Below this, widening the weight costs more than the product."""
WIDENED_NUMBERS = 1 << 24
"""Numbers of a weight that are held in float32 at a time, 64 MB."""


def fast_linear(model: nn.Module) -> AbstractContextManager:
    """Inside the block `model`'s bfloat16 linear layers run in float32 where this CPU would emulate them, else nothing
    changes.

    The CPU's own kernels sum bfloat16 products in float32 and round the sum as well; only the order of the sum differs,
    which moves some elements by the last bit.
    """
    weight = next(model.parameters())
    emulated = weight.device.type in ("cpu", "meta") and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return _Widened() if emulated else nullcontext()


class _Widened(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = (
            {**dict(zip(("input", "weight", "bias"), args, strict=False)), **(kwargs or {})}
            if func is nn.functional.linear
            else {}
        )
        return widened_linear(**given) if given and _worth_it(given["input"]) else func(*args, **(kwargs or {}))


def _worth_it(rows: Tensor) -> bool:
    return rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and rows.numel() >= FEWEST_ROWS * rows.shape[-1]


def widened_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`input` `[..., k]` bfloat16 times `weight` `[m, k]` transposed, plus `bias`, summed in float32: `[..., m]`
    bfloat16."""
    wide, step = input.float(), max(1, WIDENED_NUMBERS // weight.shape[1])
    parts = [
        nn.functional.linear(
            wide, weight[at : at + step].float(), None if bias is None else bias[at : at + step].float()
        ).to(input.dtype)
        for at in range(0, weight.shape[0], step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
