"""Reads what transformers gives every causal language model beyond what `PreTrainedModel` declares."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel


def input_weight(model: PreTrainedModel) -> Tensor:
    """The input embeddings' matrix [vocabulary, hidden], in the model's dtype; token ids go to its device."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight


def output_weight(model: PreTrainedModel) -> Tensor:
    """The output head's matrix [vocabulary, hidden], in the model's dtype."""
    return cast(nn.Linear, model.get_output_embeddings()).weight


def generate(model: PreTrainedModel, input_ids: Tensor, attended: Tensor, **settings: Any) -> Any:
    """What the model's own `generate` gives for `input_ids` int64 [rows, tokens], padded where `attended` (alike) is
    0: the rows with their continuations, int64 [rows, tokens + new], or what `settings` ask for."""
    return cast(Any, model).generate(input_ids, attention_mask=attended, **settings)
