"""Applies the output head to stored hidden states: checked once per model, in bounded chunks, with another model's head
where it differs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reapkit.core.errors import UnusableError
from reapkit.evaluation.linear import fast_linear
from reapkit.model.causal_lm import input_weight, output_weight
from reapkit.model.loading import final_hidden, head_logits

LOGIT_BYTES = 1 << 25
"""Largest float32 buffer of positions x vocabulary; a comparison holds about six of them."""


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Final hidden states `[b, t, hidden]`, in the model's dtype, of ids `[b, t]` int64 (`position_ids` alike),
    wherever the model's first and last layers are."""
    device = input_weight(model).device
    with fast_linear(model):
        return final_hidden(model, input_ids.to(device), None if position_ids is None else position_ids.to(device))


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits `[n, vocabulary]` float32 of final hidden states `[n, hidden]` in the model's dtype, by the model's own
    forward."""
    with fast_linear(model):
        return head_logits(model, hidden.to(output_weight(model).device))


def chunk_positions(model: PreTrainedModel) -> int:
    """Positions whose float32 logits fill `LOGIT_BYTES`, at least one."""
    return max(1, LOGIT_BYTES // (4 * output_weight(model).shape[0]))


def check_head(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Raises UnusableError unless `logits` of `hidden_states` are what the model itself says of `input_ids` `[t]` int64
    (its first 16)."""
    ids = input_ids[:16].unsqueeze(0)
    with fast_linear(model):
        expected = model(input_ids=ids.to(input_weight(model).device), use_cache=False).logits[0].float()
    require_same_logits(model, expected, logits(model, hidden_states(model, ids)[0]))


def require_same_logits(model: PreTrainedModel, expected: Tensor, found: Tensor) -> None:
    """Raises UnusableError where logits `[n, vocabulary]` float32 made of hidden states differ from the model's own by
    more than rounding: 1e-4 of the largest in float32, else 2e-2."""
    tolerance = 1e-4 if output_weight(model).dtype == torch.float32 else 2e-2
    gap = (expected - found.to(expected.device)).abs().max().item()
    if not gap <= tolerance * max(1.0, expected.abs().max().item()):
        raise UnusableError(
            f"{type(model).__name__}: its logits cannot be made from its final hidden states (they differ by"
            f" {gap:.3g}), so base and candidates cannot be compared. Report the architecture."
        )


@contextmanager
def output_embeddings(model: PreTrainedModel, weights: dict[str, Tensor]) -> Iterator[None]:
    """Inside the block the model's output embeddings are `weights`: `weight` `[vocabulary, hidden]`, optionally `bias`
    `[vocabulary]`, in the model's dtype."""
    own, device = model.get_output_embeddings(), output_weight(model).device
    head = nn.Linear(*reversed(weights["weight"].shape), bias="bias" in weights, device="meta")
    head.load_state_dict({name: tensor.to(device) for name, tensor in weights.items()}, assign=True)
    model.set_output_embeddings(head.requires_grad_(False))
    try:
        yield
    finally:
        model.set_output_embeddings(own)


def has_embeddings(model: PreTrainedModel, weights: dict[str, Tensor]) -> bool:
    """Whether the model's output embeddings are exactly `weights`, dtypes included: `weight` `[vocabulary, hidden]`
    and, where there is one, `bias` `[vocabulary]`, as `embedding_weights` gives them."""
    own = embedding_weights(model)
    return own.keys() == weights.keys() and all(
        own[name].dtype == tensor.dtype and torch.equal(own[name], tensor) for name, tensor in weights.items()
    )


def embedding_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The output embeddings on the CPU, to measure another model against this one after it is gone: `weight`
    `[vocabulary, hidden]` and, where there is one, `bias` `[vocabulary]`, in the model's dtype."""
    module = model.get_output_embeddings()
    return {
        name: tensor.detach().cpu()
        for name in ("weight", "bias")
        if (tensor := getattr(module, name, None)) is not None
    }
