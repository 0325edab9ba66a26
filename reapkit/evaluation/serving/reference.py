"""Generates greedily with transformers, and records the logits behind each choice."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from reapkit.calibration.builtin import generators
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import ReapkitError, UnusableError
from reapkit.evaluation.proofs.proof import LOGITS_TOLERANCE, probe_rows
from reapkit.model.causal_lm import generate
from reapkit.model.loading import load_model, load_tokenizer

PROMPT_TOKENS = 32
SOURCES = ("prose", "code")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class Greedy:
    """Greedy tokens by prompt, and the logits [new tokens, vocabulary] each was chosen from, computed in `dtype`."""

    tokens: list[list[int]]
    logits: list[Tensor]
    dtype: torch.dtype

    def gap(self, row: int, step: int, other: int) -> tuple[float, bool]:
        """(how much the chosen token's logit exceeds another's, in standard deviations; whether that is within
        rounding)."""
        scores = self.logits[row][step]
        if not 0 <= other < len(scores):
            return float("inf"), False
        gap = ((scores[self.tokens[row][step]] - scores[other]) / scores.std()).item()
        return gap, gap <= LOGITS_TOLERANCE.get(self.dtype, LOGITS_TOLERANCE[torch.bfloat16])


def prompts_for(directory: Path, count: int) -> list[list[int]]:
    """`count` prompts of at most 32 tokens: the built-in texts where there is a tokenizer, else made-up ids, the same
    every time."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        rows = [
            probe_rows(Checkpoint.open(directory), ()).flatten().roll(7 * number)[:PROMPT_TOKENS].tolist()
            for number in range(count)
        ]
        return [
            row[: PROMPT_TOKENS - number % 8] for number, row in enumerate(rows)
        ]  # of unequal lengths, as real ones are
    tokenizer = load_tokenizer(directory)
    texts = [generators.generate(name, seed=0) for name in SOURCES]
    return [tokenizer(next(texts[number % len(texts)])["text"])["input_ids"][:PROMPT_TOKENS] for number in range(count)]


def greedy(
    directory: Path,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Greedy:
    """Exactly `new_tokens` greedy tokens after each prompt, end tokens ignored; the model is gone afterwards.

    Raises UnusableError where transformers cannot load or run the directory.
    """
    try:
        model = load_model(directory, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        model.generation_config = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens, logits = [], []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=model.device)
            with torch.no_grad():
                made = generate(model, ids, torch.ones_like(ids))
            tokens.append(made.sequences[0, len(prompt) :].tolist())
            logits.append(torch.stack([step[0].float().cpu() for step in made.logits]))
        return Greedy(tokens, logits, model.dtype)
    except ReapkitError:
        raise
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise UnusableError(
            f"{directory}: transformers cannot run it: {type(error).__name__}: {str(error)[:500]}. Try reapkit verify"
            " on it."
        ) from error
    finally:
        model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
