"""Intercepts the calls of routed experts, with the model's own routing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from reapkit.model.expert_pairs import observed_forward
from reapkit.model.routed_experts import Experts, RoutedExperts

if TYPE_CHECKING:
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

IMPLEMENTATION = "reapkit"


class Handler(Protocol):
    """What a call of watched experts goes to; `inner` is what would have run otherwise."""

    def __call__(
        self, site: RoutedExperts, hidden: Tensor, index: Tensor, gates: Tensor, /, inner: Experts
    ) -> Tensor: ...


@contextmanager
def intercepted(sites: Sequence[RoutedExperts], handler: Handler) -> Iterator[None]:
    """Inside the block every call of these experts goes to `handler(site, hidden, index, gates, inner)`.

    `inner(hidden, index, gates)` is what would have run otherwise; interceptions nest, the innermost block is called
    first.
    """
    undo: list[Callable[[], None]] = []
    inners = [
        site.module.__dict__.get("_routed_call") or _plain(site) for site in sites
    ]  # before a shared config changes
    try:
        for site, inner in zip(sites, inners, strict=True):
            undo.append(_redirect(site, functools.partial(handler, site, inner=inner)))
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _redirect(site: RoutedExperts, call: Experts) -> Callable[[], None]:
    module = site.module
    outer = module.__dict__.get("_routed_call")
    module.__dict__["_routed_call"] = call
    if outer is not None:
        return functools.partial(module.__dict__.__setitem__, "_routed_call", outer)
    if site.gate_on_input:
        block = cast("Llama4TextMoe", site.block)
        undo = give_forward(block, functools.partial(_gate_on_input_block, block))
    elif site.linearised or site.own_loop:
        undo = give_forward(module, functools.partial(_dispatch_own, module))
    else:
        config, previous = module.config, module.config._experts_implementation
        config._experts_implementation = IMPLEMENTATION
        undo = functools.partial(setattr, config, "_experts_implementation", previous)

    def restore() -> None:
        del module.__dict__["_routed_call"]
        undo()

    return restore


def give_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Gives this one module another forward; what is returned takes it away again."""
    before = module.__dict__.get("forward")
    module.forward = forward

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return undo


def _dispatch(module: nn.Module, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    call = module.__dict__.get("_routed_call")
    if call is None:  # a module that shares the config but is not watched, such as a vision tower's experts
        return _original(module)(hidden, index, gates)
    return call(hidden, index, gates)


def _dispatch_own(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return module.__dict__["_routed_call"](hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _dispatch)


def _original(module: nn.Module) -> Experts:
    """The fastest implementation transformers has for the module where it is: its own loop on a CPU, grouped kernels on
    a GPU.
    """
    if next(module.parameters()).device.type == "cpu":
        return functools.partial(type(module).forward.__wrapped__, module)
    return functools.partial(grouped_mm_experts_forward, module)


def _plain(site: RoutedExperts) -> Experts:
    if site.gate_on_input:
        return functools.partial(_sum_over_pairs, site)
    if site.linearised or site.own_loop:
        return functools.partial(type(site.module).forward, site.module)
    name = site.module.config._experts_implementation
    if name in (None, "eager", IMPLEMENTATION):
        return _original(site.module)
    return functools.partial(ALL_EXPERTS_FUNCTIONS[name], site.module)


def _gate_on_input_block(block: Llama4TextMoe, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """llama4's block with its own router, spelled as a call of (hidden, index, gates)."""
    hidden = hidden.reshape(-1, block.hidden_dim)
    scores, logits = block.router(hidden)
    index = torch.topk(logits, block.router.top_k, dim=1)[1]
    routed = block.experts.__dict__["_routed_call"](hidden, index, scores.gather(1, index))
    return block.shared_expert(hidden).add_(routed), logits


def _sum_over_pairs(site: RoutedExperts, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    return observed_forward(site, hidden, index, gates)[0]
