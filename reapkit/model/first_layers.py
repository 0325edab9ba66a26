"""Runs the first layers of a model as an observation will, up to the first one with routed experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from reapkit.core.errors import UnusableError
from reapkit.model.expert_calls import intercepted
from reapkit.model.expert_pairs import observed_forward
from reapkit.model.loading import final_hidden
from reapkit.model.routed_experts import Experts, RoutedExperts, find_experts
from reapkit.model.streaming.layer_pass import LayerPass
from reapkit.model.streaming.layers import LayeredModel

T = TypeVar("T")


@dataclass(frozen=True)
class FirstLayers:
    """What was seen: the layer with routed experts that was reached, how many layers ran, bytes read from disk."""

    layer: int
    layers_run: int
    nbytes: int


def run_first_layers(
    layered: LayeredModel, input_ids: Sequence[int], look: Callable[[RoutedExperts], T]
) -> tuple[FirstLayers, T]:
    """The model on one row of token ids, layer by layer, through the first layer whose routed experts are called; then
    `look` at those experts while their weights are in memory.

    Raises UnusableError where a tensor is missing, where no layer calls its experts as they are found in the class, or
    where what the layer gives is not finite.
    """
    sites = find_experts(layered.model)
    called: list[RoutedExperts] = []

    def watched(site: RoutedExperts, hidden: Tensor, index: Tensor, gates: Tensor, inner: Experts) -> Tensor:
        called.append(site)
        return observed_forward(site, hidden, index, gates)[0]

    ended: list[Tensor] = []
    layered.load_rest()
    row = torch.tensor([list(input_ids)], device=layered.device)
    last = min(site.layer for site in sites)
    nbytes = layered.nbytes(None) + sum(layered.nbytes(layer) for layer in range(last + 1))
    seen: list[T] = []
    with LayerPass(layered) as layer_pass, intercepted(sites, watched), torch.no_grad():
        forward = layer_pass.begin(lambda: ended.append(final_hidden(layered.model, row)), park=False)
        for layer in layer_pass.through(range(last + 1)):
            layer_pass.advance(forward, park=False)
            if layer < last:
                continue
            if [site.layer for site in called] != [last]:
                raise UnusableError(
                    f"{layered.path}: layer {last} of {type(layered.model).__name__} has routed experts, but did not"
                    " call them as transformers' experts interface does, so they cannot be observed. Please report the"
                    " model, with its config.json."
                )
            if not torch.isfinite(ended[0] if forward.finished else forward.hidden).all():
                raise UnusableError(
                    f"{layered.path}: what layer {last} computes of {len(input_ids)} tokens is not finite"
                    f" ({layered.dtype}). The weights are damaged, or need another dtype than config.json says."
                )
            seen.append(look(called[0]))
        layer_pass.forget([forward])
    return FirstLayers(last, last + 1, nbytes), seen[0]
