"""Reads the facts about a model's experts from `config.json`, whatever names its fields have. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reapkit.core.errors import UnusableError

EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
TEXT_CONFIG_KEYS = ("text_config", "llm_config", "language_config")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the config that describes the language model (multimodal configs nest it)."""
    return next((config[key] for key in TEXT_CONFIG_KEYS if isinstance(config.get(key), Mapping)), config)


def _first_integer(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, list):  # ernie and hunyuan publish a number per layer or per modality
            value = value[0] if value and len(set(value)) == 1 else None
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _num_hidden_layers(config: Mapping[str, Any]) -> int:
    value = config.get("num_hidden_layers", config.get("num_layers"))
    if value is None:  # nemotron_h may say it by listing the layers
        value = len(config.get("layers_block_type") or config.get("layer_types") or ())
    if not isinstance(value, int) or value < 1:
        raise UnusableError(
            "config.json: num_hidden_layers is missing or not a positive number, so the layers cannot be told apart."
        )
    return value


@dataclass(frozen=True)
class Architecture:
    """The routing of a MoE as its config declares it.

    `n_group` > 1: experts are routed in groups of `num_experts // n_group`, of which `topk_group` are eligible per
    token.
    """

    model_type: str
    num_hidden_layers: int
    num_experts: int
    num_experts_per_tok: int
    n_group: int = 1
    topk_group: int = 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Architecture:
        """Raises UnusableError where the config names no experts."""
        text = text_config(config)
        experts, top_k = _first_integer(text, EXPERT_COUNT_KEYS), _first_integer(text, TOP_K_KEYS)
        model_type = str(text.get("model_type") or config.get("model_type") or "unknown")
        if experts is None or top_k is None:
            missing = f"none of {', '.join(EXPERT_COUNT_KEYS if experts is None else TOP_K_KEYS)}"
            raise UnusableError(
                f"config.json: model_type '{model_type}' has {missing}, so it is not a Mixture-of-Experts "
                "checkpoint that reapkit knows. Choose a MoE model."
            )
        return cls(
            model_type,
            _num_hidden_layers(text),
            experts,
            top_k,
            n_group=int(text.get("n_group") or 1),
            topk_group=int(text.get("topk_group") or 1),
        )

    @property
    def least_experts(self) -> int:
        """The fewest experts per layer that still route: top-k in the eligible groups; groups scored by two experts
        need two."""
        if self.n_group == 1:
            return self.num_experts_per_tok
        per_group = max(2, -(-self.num_experts_per_tok // self.topk_group))
        return per_group * self.n_group
