"""Prunes a model in memory: the routed experts, the router's rows, and every field that counts experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reapkit.checkpoint.architecture import EXPERT_COUNT_KEYS
from reapkit.core.errors import UnusableError
from reapkit.model.masking import slice_routing
from reapkit.model.routed_experts import RoutedExperts, find_experts
from reapkit.selection.selection import Selection


@torch.no_grad()
def prune_loaded(model: PreTrainedModel, selection: Selection) -> None:
    """Removes the experts that `selection` drops from `model`, in place; the config says the new number.

    Experts may be stacked tensors [experts, ...], as transformers builds them, of which the first axis is cut, or one
    MLP each, as llm-compressor linearises them; kept ones are renumbered in ascending order. Router tensors lose the
    rows of the dropped experts. Every tensor keeps its dtype and device. Nothing is changed where an error is raised:
    UnusableError where the selection is of another model, leaves layers with different numbers, or changes the top-k,
    which a loaded model's config cannot say for all its layers.
    """
    sites = {site.layer: site for site in find_experts(model)}
    count = _refuse_unfitting(sites, selection)
    undo: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for layer, site in sites.items():
            slice_routing(site, torch.tensor(selection.layers[layer].keep), undo)
    except UnusableError:
        for store, key, value in reversed(undo):
            store[key] = value
        raise
    for layer, site in sites.items():
        _slice_experts(site, torch.tensor(selection.layers[layer].keep))
    total = next(iter(sites.values())).num_experts
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        _set_counts(config, total, count)


def _refuse_unfitting(sites: Mapping[int, RoutedExperts], selection: Selection) -> int:
    """The number of experts that every layer keeps."""
    for layer in sorted(set(sites) | set(selection.layers)):
        if layer not in sites or layer not in selection.layers:
            here, there = ("the selection", "the model") if layer not in sites else ("the model", "the selection")
            raise UnusableError(
                f"layer {layer} has routed experts in {here} and none in {there}: the selection is of another model. "
                "Give one that was made for this model."
            )
        chosen = selection.layers[layer]
        if len(chosen.keep) + len(chosen.drop) != sites[layer].num_experts:
            raise UnusableError(
                f"layer {layer} has {sites[layer].num_experts} experts, the selection decides about "
                f"{len(chosen.keep) + len(chosen.drop)}: it is of another model. Give one that was made for this model."
            )
    counts = {len(chosen.keep) for chosen in selection.layers.values()}
    if len(counts) > 1:
        raise UnusableError(
            f"the selection keeps {min(counts)} to {max(counts)} experts, but a model in memory has one number for all"
            " layers. Select with layout: uniform, or prune with `reapkit prune`."
        )
    if selection.experts_per_token is not None:
        raise UnusableError(
            f"the selection sets experts_per_token: {selection.experts_per_token}, which is not changed in memory."
            " Leave it out, or prune with `reapkit prune`."
        )
    return counts.pop()


def _slice_experts(site: RoutedExperts, kept: Tensor) -> None:
    module, total = site.module, site.num_experts
    if site.linearised:
        experts = [module[index] for index in kept.tolist()]
        others = {name: child for name, child in module._modules.items() if not (name.isdigit() and int(name) < total)}
        module._modules = {**{str(number): expert for number, expert in enumerate(experts)}, **others}
    else:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.shape and parameter.shape[0] == total:
                part = parameter.detach().index_select(0, kept.to(parameter.device))
                module._parameters[name] = nn.Parameter(part, requires_grad=False)
    for name, value in list(vars(module).items()):
        if name in ("num_experts", *EXPERT_COUNT_KEYS) and value == total:
            setattr(module, name, len(kept))


def _set_counts(config: Any, before: int, after: int) -> None:
    for key in EXPERT_COUNT_KEYS:
        value = getattr(config, key, None)
        if isinstance(value, list):
            setattr(config, key, [after if item == before else item for item in value])
        elif value == before and not isinstance(value, bool):
            setattr(config, key, after)
