"""Reads what transformers gives every causal language model beyond what `PreTrainedModel` declares."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from reapkit.core.errors import UnusableError


def input_weight(model: PreTrainedModel) -> Tensor:
    """The input embeddings' matrix [vocabulary, hidden], in the model's dtype; token ids go to its device."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight


def output_weight(model: PreTrainedModel) -> Tensor:
    """The output head's matrix [vocabulary, hidden], in the model's dtype."""
    return cast(nn.Linear, model.get_output_embeddings()).weight


def decoder(model: PreTrainedModel) -> nn.Module:
    """The module that computes the final hidden states which the model's own forward gives to its head.

    Found by what it is: beside the head, the one that holds the input embeddings. A wrapper of towers may have it one
    level deeper than a text model (llama4), or name a prefix that it does not have. Raises UnusableError where the
    model has no such head.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    owner = next((module for module in model.modules() if any(child is head for child in module.children())), None)
    found = [
        child
        for child in (owner.children() if owner is not None else ())
        if child is not head and any(module is embeddings for module in child.modules())
    ]
    if not found:
        raise UnusableError(
            f"{type(model).__name__}: found no output head beside a decoder, so it is no causal language model that"
            " reapkit can observe. Name the class of its language model in config.json's architectures."
        )
    return found[0]


def text_model(model: nn.Module) -> nn.Module:
    """The module that holds the input embeddings beside the decoder layers, without towers for images and sound; the
    model itself where it has no such embeddings."""
    try:
        embeddings = cast(PreTrainedModel, model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return model
    return next(
        (module for module in model.modules() if any(child is embeddings for child in module.children())), model
    )


def generate(model: PreTrainedModel, input_ids: Tensor, attended: Tensor, **settings: Any) -> Any:
    """What the model's own `generate` gives for `input_ids` int64 [rows, tokens], padded where `attended` (alike) is
    0: the rows with their continuations, int64 [rows, tokens + new], or what `settings` ask for."""
    return cast(Any, model).generate(input_ids, attention_mask=attended, **settings)
