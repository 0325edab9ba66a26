"""Masks dropped experts in the router of a loaded model for the length of a `with` block; no weight changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reapkit.checkpoint.projection_names import LOADED, ROUTER_MODULES, Role
from reapkit.core.errors import UnusableError
from reapkit.model.expert_calls import intercepted
from reapkit.model.routed_experts import Experts, RoutedExperts, find_experts

TOP_K_NAMES = (
    "top_k",
    "topk",
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
)
GROUP_NAMES = ("num_group", "n_group", "num_expert_group")


@contextmanager
def masked(model: nn.Module, keep: Mapping[int, Sequence[int]], experts_per_token: int | None = None) -> Iterator[None]:
    """Inside the block the model routes as its pruned self: only to `keep[layer]` (decoder index -> expert indices) of
    each layer.

    Router rows, biases and per-expert scales are sliced in memory, in ascending expert order, and the indices the
    router returns are mapped back to the original experts, so softmax, group scoring and renormalisation run over the
    kept ones alone. Layers that `keep` does not name stay whole. `experts_per_token` overrides top-k everywhere.

    Raises UnusableError where a layer has no routed experts, keeps too few, keeps unequal numbers per routing group, or
    would lose experts that a fixed table routes to.
    """
    with masked_sites(find_experts(model), keep, experts_per_token):
        yield


@contextmanager
def masked_sites(
    found: Sequence[RoutedExperts], keep: Mapping[int, Sequence[int]], experts_per_token: int | None = None
) -> Iterator[None]:
    """As `masked`, of these experts, which may be those of multi-token-prediction blocks."""
    sites = {site.layer: site for site in found}
    keep = {layer: kept for layer, kept in keep.items() if layer not in sites or not _stays_whole(sites[layer], kept)}
    if unknown := sorted(set(keep) - set(sites)):
        raise UnusableError(f"layers {unknown} have no routed experts to mask; the MoE layers are {sorted(sites)}.")
    kept = {layer: torch.tensor(sorted(keep[layer])) for layer in keep}
    with ExitStack() as stack:
        for layer, site in sites.items():
            if layer in kept:
                stack.enter_context(sliced_routing(site, kept[layer]))
            if experts_per_token is not None:
                stack.enter_context(_routing_to(site, experts_per_token))
        stack.enter_context(intercepted(found, _back_to_original(kept, experts_per_token)))
        yield


def _stays_whole(site: RoutedExperts, kept: Sequence[int]) -> bool:
    """Whether a layer that a fixed table routes keeps all its experts, as it must: nothing of it is masked."""
    return has_table(site) and sorted(kept) == list(range(site.num_experts))


def has_table(site: RoutedExperts) -> bool:
    """Whether the router reads the experts of a token from a table of numbers, instead of choosing them."""
    return any(
        not tensor.is_floating_point() and tensor.numel() > 1
        for name, module in routing_modules(site)
        if name
        for tensor in module.buffers(recurse=False)
    )


def _back_to_original(kept: Mapping[int, Tensor], experts_per_token: int | None) -> Callable[..., Tensor]:
    on_device: dict[tuple[int, torch.device], Tensor] = {}

    def handler(site: RoutedExperts, hidden: Tensor, index: Tensor, gates: Tensor, inner: Experts) -> Tensor:
        if experts_per_token is not None and index.shape[1] != experts_per_token:
            raise UnusableError(
                f"prune.experts_per_token: {experts_per_token}, but the router of layer {site.layer} still returns "
                f"{index.shape[1]} experts per token; this architecture's top-k cannot be overridden."
            )
        if site.layer in kept:
            where = (site.layer, index.device)
            if where not in on_device:
                on_device[where] = kept[site.layer].to(index.device)
            index = on_device[where][index]
        return inner(hidden, index, gates)

    return handler


def routing_modules(site: RoutedExperts) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose tensors may have an expert axis, beside the experts and the shared experts; the block itself
    comes first.
    """
    yield "", site.block
    for child, module in site.block.named_children():
        if ROUTER_MODULES.fullmatch(child) and "shared" not in child and module is not site.module:
            yield from module.named_modules(prefix=child)


@contextmanager
def sliced_routing(site: RoutedExperts, kept: Tensor) -> Iterator[None]:
    """Inside the block the router's tensors hold only the rows of `kept` (int64 [kept experts], ascending), and the
    counts beside them say so."""
    undo: list[tuple[dict[str, Any], str, Any]] = []
    try:
        slice_routing(site, kept, undo)
        yield
    finally:
        for store, key, value in reversed(undo):
            store[key] = value


@contextmanager
def without_expert(site: RoutedExperts, expert: int) -> Iterator[Tensor | None]:
    """Inside the block the router never chooses `expert`, and gates are what the others then get; yields what maps the
    router's numbers back to the original experts, int64 [kept experts], or None where they are the original ones.

    The expert's row is sliced away. A router that scores equal groups cannot lose a single row: there the bias that is
    added to the scores it chooses by is minus infinity for the expert. Raises UnusableError for one with neither way.
    """
    if not _is_grouped(site):
        kept = torch.tensor([other for other in range(site.num_experts) if other != expert])
        with sliced_routing(site, kept):
            yield kept
        return
    undo: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for _, module in routing_modules(site):
            for store in (module._parameters, module._buffers):
                for key, tensor in list(store.items()):
                    if tensor is not None and LOADED.router_role(key) is Role.CORRECTION:
                        lowered = tensor.detach().clone()
                        lowered.view(-1)[expert] = -torch.inf
                        as_held = nn.Parameter(lowered, requires_grad=False) if store is module._parameters else lowered
                        _set(undo, store, key, as_held)
        if not undo:
            raise UnusableError(
                f"layer {site.layer}: the router scores groups of experts and adds no bias to the scores that it"
                " chooses by, so one expert alone cannot be taken out. Choose another criterion."
            )
        yield None
    finally:
        for store, key, value in reversed(undo):
            store[key] = value


def _is_grouped(site: RoutedExperts) -> bool:
    """Whether the router limits its choice to the best of several groups of experts."""
    return any(_groups(module) > 1 for _, module in routing_modules(site))


def _groups(module: nn.Module) -> int:
    return next((vars(module)[key] for key in GROUP_NAMES if isinstance(vars(module).get(key), int)), 1)


def slice_routing(site: RoutedExperts, kept: Tensor, undo: list[tuple[dict[str, Any], str, Any]]) -> None:
    """Slices the router to the rows of `kept` (int64 [kept experts], ascending); what each (store, key) held before is
    appended to `undo`.

    Raises UnusableError where the router cannot route to `kept`, or has no rows to slice.
    """
    total = site.num_experts
    _refuse_bad_keep(site, kept)
    rows = 0
    for _, module in routing_modules(site):
        for store in (module._parameters, module._buffers):
            for key, tensor in list(store.items()):
                if tensor is None or total not in tensor.shape:
                    continue
                part = tensor.detach().index_select(tensor.shape.index(total), kept.to(tensor.device))
                _set(undo, store, key, nn.Parameter(part, requires_grad=False) if store is module._parameters else part)
                rows += 1
        for key, value in list(vars(module).items()):
            if _is_count(key, value, total):
                _set(undo, vars(module), key, len(kept))
    if not rows:
        raise UnusableError(
            f"layer {site.layer}: found no tensor with {total} rows beside {site.name}, so the router cannot be masked."
        )


def _is_count(name: str, value: Any, total: int) -> bool:
    """Does this attribute say how many routed experts there are?"""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer and value == total and (("expert" in name and name not in TOP_K_NAMES) or name == "out_features")


def _set(undo: list[tuple[dict[str, Any], str, Any]], store: dict[str, Any], key: str, value: Any) -> None:
    undo.append((store, key, store[key]))
    store[key] = value


def _refuse_bad_keep(site: RoutedExperts, kept: Tensor) -> None:
    where = f"layer {site.layer}"
    if len(kept) == 0 or len(kept.unique()) < len(kept) or kept[0] < 0 or kept[-1] >= site.num_experts:
        raise UnusableError(
            f"{where}: kept experts {kept.tolist()} are not distinct numbers from 0 to {site.num_experts - 1}."
        )
    if has_table(site):
        raise UnusableError(
            f"{where}: the router reads expert numbers from a fixed table, so its experts cannot be dropped."
            " Keep all of them."
        )
    for _, module in routing_modules(site):
        groups = _groups(module)
        if groups > 1:
            per_group = torch.bincount(kept // (site.num_experts // groups), minlength=groups).tolist()
            if len(set(per_group)) > 1:
                raise UnusableError(
                    f"{where}: the router has {groups} groups, and the groups keep {per_group} experts; group-limited"
                    " routing needs equal numbers. Keep the same number of experts in every group."
                )


@contextmanager
def _routing_to(site: RoutedExperts, experts_per_token: int) -> Iterator[None]:
    """The router's top-k says `experts_per_token`; a config that routers read while they run is replaced by a copy."""
    undo: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for _, module in routing_modules(site):
            own = vars(module)
            for key in TOP_K_NAMES:
                if isinstance(own.get(key), int):
                    _set(undo, own, key, experts_per_token)
            config = own.get("config")
            names = [key for key in TOP_K_NAMES if isinstance(getattr(config, "__dict__", {}).get(key), int)]
            if names and module is not site.block:
                changed = copy.copy(config)
                for key in names:
                    changed.__dict__[key] = experts_per_token
                _set(undo, own, "config", changed)
        yield
    finally:
        for store, key, value in reversed(undo):
            store[key] = value
