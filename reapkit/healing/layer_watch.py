"""Watches forwards go through one decoder layer: what its experts are called with, what lies behind it, and how much of
their output is in there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reapkit.calibration.tokens import Batch
from reapkit.core.errors import UnusableError
from reapkit.model.expert_calls import intercepted
from reapkit.model.routed_experts import Experts, RoutedExperts
from reapkit.model.streaming.layers import LayeredModel

NOT_ADDED = 0.05
"""Relative deviation from 'the layer adds a multiple of its experts' output' that rounding in bfloat16 explains."""

ExpertsCall = tuple[Tensor, Tensor, Tensor]
"""What the experts are called with: hidden [t, hidden], experts int64 [t, k] and gates [t, k]."""


class _LastForward:
    """What the last forward through a layer left."""

    call: tuple[tuple[Any, ...], dict[str, Any]]
    output: Tensor
    experts: ExpertsCall


class LayerWatch:
    """What is asked is about the last forward that went through a layer inside of `watching`."""

    def __init__(self, layered: LayeredModel):
        self._layered, self._last = layered, _LastForward()
        self._shift: Tensor | None = None  # is added to the experts' output while it is set

    @contextmanager
    def watching(self, sites: Sequence[RoutedExperts]) -> Iterator[None]:
        """Hooks behind those that pause: a forward that waits before a layer has its hooks already, later ones would be
        missed."""

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._last.call = (args, kwargs)

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            self._last.output = output[0] if isinstance(output, tuple) else output

        handles = [
            handle
            for layer in self._layered.layers
            for handle in (
                layer.register_forward_pre_hook(before, with_kwargs=True),
                layer.register_forward_hook(after),
            )
        ]
        try:
            with intercepted(sites, self._on_experts):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_experts(self, site: RoutedExperts, hidden: Tensor, index: Tensor, gates: Tensor, inner: Experts) -> Tensor:
        self._last.experts = (hidden, index, gates)
        out = inner(hidden, index, gates)
        return out if self._shift is None else out + self._shift.to(out.dtype)

    def forget(self) -> None:
        """Holds no tensor of a layer any more."""
        self._last = _LastForward()

    def output(self, batch: Batch) -> Tensor:
        """The residual stream behind the layer at the batch's positions, padding aside: [positions, hidden] in the
        model's dtype, on the host."""
        output = self._last.output
        return output.reshape(-1, output.shape[-1])[self.valid(batch)].to("cpu", copy=True)

    def experts_call(self, batch: Batch) -> ExpertsCall:
        """What the experts were called with, at positions that are not padding."""
        hidden, index, gates = self._last.experts
        valid = self.valid(batch)
        return hidden[valid].clone(), index[valid].clone(), gates[valid].clone()

    def valid(self, batch: Batch) -> Tensor:
        """The flat positions of a batch that are not padding, int64 [positions] on the device."""
        return batch.valid.reshape(-1).nonzero()[:, 0].to(self._layered.device)

    def added_share(self, layer: int) -> float:
        """c in 'the layer's output holds c times its experts' output', found by shifting that output.

        Raises UnusableError where there is no such c: a norm or a gate stands behind the experts.
        """
        args, kwargs = self._last.call
        plain = self._last.output.float()
        generator = torch.Generator().manual_seed(layer)
        hidden = self._last.experts[0]
        shift = torch.randn(hidden.shape[0], plain.shape[-1], generator=generator).to(plain.device) * plain.std()
        self._shift = shift
        self._layered.layers[layer](*args, **kwargs)
        self._shift = None
        moved = (self._last.output.float() - plain).reshape(shift.shape)
        share = float((moved * shift).sum() / shift.square().sum())
        off = float((moved - share * shift).norm() / moved.norm().clamp_min(1e-30))
        if not share or off > NOT_ADDED:
            raise UnusableError(
                f"prune.repair: layer {layer} does not simply add its experts' output to the residual stream (a norm or"
                " a gate follows), so it cannot be re-fitted in closed form. Remove prune.repair."
            )
        return share
