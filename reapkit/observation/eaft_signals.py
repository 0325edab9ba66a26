"""Computes the two signals of EAFT at each position: the probability of the reference token, and the normalised
entropy."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reapkit.model.causal_lm import output_weight
from reapkit.model.loading import head_logits

CHUNK_BYTES = 256 << 20  # of float32 logits held at once


def signals(logits: Tensor, reference: Tensor, entropy_top_k: int) -> tuple[Tensor, Tensor]:
    """p and H, float32 [positions], of float32 logits [positions, vocabulary] and reference tokens int64 [positions].

    p = softmax(logits)[reference] over the whole vocabulary; H = entropy of the softmax over the k largest logits / ln
    k, in [0, 1] (fewer than k logits: all of them).
    """
    at_reference = logits.gather(1, reference[:, None])[:, 0]
    p = (at_reference - torch.logsumexp(logits, dim=1)).exp()
    k = min(entropy_top_k, logits.shape[1])
    q = torch.topk(logits, k, dim=1).values.log_softmax(dim=1)
    return p, (-(q.exp() * q).sum(dim=1) / log(k)).clamp_(0, 1)


def signals_of_hidden(
    model: PreTrainedModel, hidden: Tensor, reference: Tensor, entropy_top_k: int
) -> tuple[Tensor, Tensor]:
    """`signals`, float32 [positions] each, of final hidden states [positions, hidden] in the model's dtype and
    reference tokens int64 [positions], the head applied in chunks of at most CHUNK_BYTES of logits."""
    vocabulary = output_weight(model).shape[0]
    chunk = max(1, CHUNK_BYTES // (4 * vocabulary))
    parts = [
        signals(head_logits(model, hidden[start : start + chunk]), reference[start : start + chunk], entropy_top_k)
        for start in range(0, len(hidden), chunk)
    ]
    p, h = zip(*parts, strict=True) if parts else ((hidden.new_empty(0, dtype=torch.float32),),) * 2
    return torch.cat(p), torch.cat(h)
