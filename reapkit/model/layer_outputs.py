"""Hands on what decoder layers with routed experts put out: the residual stream behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from reapkit.model.routed_experts import RoutedExperts


@contextmanager
def layer_outputs(sites: Sequence[RoutedExperts], handler: Callable[[RoutedExperts, Tensor], None]) -> Iterator[None]:
    """Inside the block `handler(site, output)` is called whenever the decoder layer of a site has run; `output`: its
    hidden states, [batch, tokens, hidden] in the model's dtype, first of all that it may return.

    As hooks on layers, it must begin before a forward that waits in front of one of them.
    """
    handles = [site.decoder_layer.register_forward_hook(_handing_on(site, handler)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _handing_on(site: RoutedExperts, handler: Callable[[RoutedExperts, Tensor], None]) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        handler(site, output[0] if isinstance(output, tuple) else output)

    return hook
