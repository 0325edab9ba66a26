"""Reads from a model directory what who serves it must know: how it is spoken to, and the memory of its cache.
Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from reapkit.checkpoint.architecture import text_config, whole_number

PromptKind = Literal["chat", "text", "tokens"]
"""What a model is given: turns that its chat template renders, plain text, or token ids where it has no tokenizer."""
BYTES_OF = {"float32": 4, "float": 4}
FULL_ATTENTION = {"full_attention", "attention"}


def prompt_kind(directory: Path) -> PromptKind:
    """How the directory's tokenizer takes a prompt."""
    if (directory / "chat_template.jinja").is_file() or (directory / "chat_template.json").is_file():
        return "chat"
    settings = directory / "tokenizer_config.json"
    if not settings.is_file():
        return "text" if (directory / "tokenizer.json").is_file() else "tokens"
    try:
        found = json.loads(settings.read_text(encoding="utf-8"))
    except ValueError:
        return "text"
    return "chat" if isinstance(found, dict) and found.get("chat_template") else "text"


def cache_bytes_per_token(config: Mapping[str, Any]) -> int | None:
    """Bytes of keys and values that a served token occupies in the config's own dtype (16 bits unless it says float32);
    None where layers keep something else than every token's keys and values, or the config does not say how much.

    Per layer 2 * num_key_value_heads * head_dim numbers; under latent attention (DeepSeek-V2, arXiv 2405.04434, section
    2.1) kv_lora_rank + qk_rope_head_dim.
    """
    found = text_config(config)
    layers, kinds = whole_number(found, "num_hidden_layers"), found.get("layer_types")
    if layers is None or (isinstance(kinds, list) and not set(map(str, kinds)) <= FULL_ATTENTION):
        return None
    if kinds is None and (found.get("sliding_window") or "linear_num_value_heads" in found):
        return None
    numbers = _cached_numbers(found)
    size = BYTES_OF.get(str(found.get("dtype") or found.get("torch_dtype") or config.get("dtype")), 2)
    return None if numbers is None else layers * numbers * size


def _cached_numbers(found: Mapping[str, Any]) -> int | None:
    """Numbers that one layer keeps of a token."""
    if found.get("kv_lora_rank") is not None:
        latent, rotary = whole_number(found, "kv_lora_rank"), whole_number(found, "qk_rope_head_dim")
        return None if latent is None or rotary is None else latent + rotary
    heads, width = whole_number(found, "num_attention_heads"), whole_number(found, "hidden_size")
    kept, each = whole_number(found, "num_key_value_heads") or heads, whole_number(found, "head_dim")
    if each is None and heads and width is not None:
        each = width // heads
    return None if kept is None or each is None else 2 * kept * each
