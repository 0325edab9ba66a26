"""Reads the facts about a model's experts from `config.json`, whatever names its fields have. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reapkit.core.errors import UnusableError

EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
TEXT_CONFIG_KEYS = ("text_config", "llm_config", "language_config")
WHOLE_NUMBERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
)
"""Fields that sizes and costs are computed from; where layers differ, they list a number for each."""
COMPUTING = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Dtypes that models compute in -> their codes in safetensors files."""
LARGEST = 1 << 31
"""No field that counts something of a model is larger."""
HASHED = re.compile(r"(?:^|_)hash(?:ed)?(?:_|$)")
"""In the name of a layer's kind: its tokens go to experts by a table."""
MTP_COUNT = re.compile(r"(?=.*(?:^|_)(?:mtp|nextn)(?:_|$))(?=.*(?:num|layers|modules|depth))")
"""Fields that say how many multi-token-prediction blocks there are."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the config that describes the language model (multimodal configs nest it)."""
    return next((config[key] for key in TEXT_CONFIG_KEYS if isinstance(config.get(key), Mapping)), config)


def whole_number(config: Mapping[str, Any], key: str) -> int | None:
    """A field that holds one number; None where it is missing, null, or lists a number per layer.

    Raises UnusableError for anything that counts nothing.
    """
    value = config.get(key)
    for one in value if isinstance(value, list) else [value]:
        if one is not None and (type(one) is not int or not 0 <= one <= LARGEST):
            raise UnusableError(
                f"config.json: {key} is {str(one)[:40]!r}, but it must be a whole number from 0 to {LARGEST}. Download"
                " the checkpoint again or correct its config."
            )
    return None if isinstance(value, list) else value


def largest_number(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of the fields that says a number above 0; of a list, its largest. Raises UnusableError as
    `whole_number` does."""
    for key in keys:
        single, value = whole_number(config, key), config.get(key)
        found = max((one for one in value if one is not None), default=0) if isinstance(value, list) else single
        if found:
            return found
    return None


def hidden_width(config: Mapping[str, Any]) -> int:
    """The model's `hidden_size`. Raises UnusableError where it is missing."""
    found = largest_number(config, "hidden_size")
    if found is None:
        raise UnusableError(
            "config.json: hidden_size is missing, so nothing can be said of memory. Download the checkpoint again or"
            " correct its config."
        )
    return found


QUANTIZATION_KEY = "quantization_config"
"""The field that says how weights are quantized."""


def quantization_path(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the config says how its weights are quantized: at the top, else in the language model's section; empty
    where nothing does.

    Raises UnusableError where what stands there is no mapping.
    """
    sections = ((), *((key,) for key in TEXT_CONFIG_KEYS if isinstance(config.get(key), Mapping)))
    for section in sections:
        found = (config[section[0]] if section else config).get(QUANTIZATION_KEY)
        if found is not None and not isinstance(found, Mapping):
            raise UnusableError(
                f"config.json: {'.'.join((*section, QUANTIZATION_KEY))} is not a JSON object. Download the checkpoint"
                " again or correct its config."
            )
        if found:
            return (*section, QUANTIZATION_KEY)
    return ()


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the config says of how its weights are quantized, wherever it says so; empty where it does not. Raises
    UnusableError where that is no mapping."""
    found = config
    for key in (path := quantization_path(config)):
        found = found[key]
    return found if path else {}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model with plain weights, wherever it said that they are quantized."""
    return {
        key: {inner: one for inner, one in value.items() if inner != QUANTIZATION_KEY}
        if key in TEXT_CONFIG_KEYS and isinstance(value, Mapping)
        else value
        for key, value in config.items()
        if key != QUANTIZATION_KEY
    }


def computing_dtype(config: Mapping[str, Any]) -> str | None:
    """The safetensors code of the dtype in which the model computes, as the config says; None where it does not."""
    text = text_config(config)
    for section in (config, text):
        for key in ("dtype", "torch_dtype"):
            if (named := str(section.get(key)).removeprefix("torch.")) in COMPUTING:
                return COMPUTING[named]
    return None


def mtp_depth(config: Mapping[str, Any]) -> int | None:
    """Multi-token-prediction blocks that config.json declares; None where no field counts them."""
    found = [value for value in _counts_of_mtp(config) if value is not None]
    return max(found, default=None)


def _counts_of_mtp(config: Mapping[str, Any]) -> Iterator[int | None]:
    for part in (config, text_config(config)):
        yield from (whole_number(part, key) for key in part if MTP_COUNT.search(key) and type(part[key]) is int)


def _first_integer(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, list):  # ernie and hunyuan publish a number per layer or per modality
            value = value[0] if value and all(item == value[0] for item in value) else None
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _refuse_several(config: Mapping[str, Any], text: Mapping[str, Any], model_type: str) -> None:
    """Raises UnusableError where there are several language models with experts, or several kinds of experts in a
    layer, each with a router of its own."""
    for key in EXPERT_COUNT_KEYS:
        listed = text.get(key)
        depth = _num_hidden_layers(text) if isinstance(listed, list) else 0
        if isinstance(listed, list) and 1 < len(listed) != depth:
            raise UnusableError(
                f"config.json: {key} lists {len(listed)} numbers of experts for {depth} layers: those of several"
                " modalities share a layer, each with a router of its own, and reapkit prunes layers with one set of"
                " routed experts. Choose the model's version for text."
            )
    if _first_integer(text, EXPERT_COUNT_KEYS) is None and (inner := list(_with_experts(config))):
        raise UnusableError(
            f"config.json: model_type '{model_type}' keeps its experts in {' and '.join(inner)},"
            " and reapkit prunes models with one language model at the top of their config. Choose a checkpoint of one"
            " of them."
        )


def _with_experts(config: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The sections of a config that count experts."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            here = f"{path}.{key}" if path else key
            if _first_integer(value, EXPERT_COUNT_KEYS) is not None:
                yield here
            yield from _with_experts(value, here)


def _shown(number: int) -> str:
    return str(number)[:40]


def _groups(text: Mapping[str, Any], key: str) -> int:
    return whole_number(text, key) or 1


def _hashed_layers(text: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers that config.json says are routed by a table: listed by kind, or the first so many (deepseek_v4)."""
    kinds = text.get("mlp_layer_types")
    if isinstance(kinds, list):
        return tuple(layer for layer, kind in enumerate(kinds) if isinstance(kind, str) and HASHED.search(kind))
    return tuple(range(min(whole_number(text, "num_hash_layers") or 0, _num_hidden_layers(text))))


def _num_hidden_layers(config: Mapping[str, Any]) -> int:
    value = config.get("num_hidden_layers", config.get("num_layers"))
    if value is None:  # nemotron_h may say it by listing the layers
        listed = config.get("layers_block_type") or config.get("layer_types") or ()
        value = len(listed) if isinstance(listed, (list, tuple, str)) else 0
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise UnusableError(
            "config.json: num_hidden_layers is missing or not a positive number, so the layers cannot be told apart."
        )
    return value


@dataclass(frozen=True)
class Architecture:
    """The routing of a MoE as its config declares it.

    `n_group` > 1: experts are routed in groups of `num_experts // n_group`, of which `topk_group` are eligible per
    token. `tables`: the layers, by decoder index, in which a fixed table says which experts a token goes to: their
    router cannot choose others, so they keep all of theirs.
    """

    model_type: str
    num_hidden_layers: int
    num_experts: int
    num_experts_per_tok: int
    n_group: int = 1
    topk_group: int = 1
    tables: tuple[int, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Architecture:
        """Raises UnusableError where the config names no experts."""
        text = text_config(config)
        experts, top_k = _first_integer(text, EXPERT_COUNT_KEYS), _first_integer(text, TOP_K_KEYS)
        model_type = str(text.get("model_type") or config.get("model_type") or "unknown")
        _refuse_several(config, text, model_type)
        if experts is None or top_k is None:
            missing = f"none of {', '.join(EXPERT_COUNT_KEYS if experts is None else TOP_K_KEYS)}"
            raise UnusableError(
                f"config.json: model_type '{model_type}' has {missing}, so it is not a Mixture-of-Experts "
                "checkpoint that reapkit knows. Choose a MoE model."
            )
        for key in WHOLE_NUMBERS:
            whole_number(text, key)
        if not 1 <= top_k <= experts <= LARGEST:
            raise UnusableError(
                f"config.json: each token is routed to {_shown(top_k)} of {_shown(experts)} experts, which cannot be."
                " Download the checkpoint again or correct its config."
            )
        return cls(
            model_type,
            _num_hidden_layers(text),
            experts,
            top_k,
            n_group=_groups(text, "n_group"),
            topk_group=_groups(text, "topk_group"),
            tables=_hashed_layers(text),
        )

    @property
    def least_experts(self) -> int:
        """The fewest experts per layer that still route: top-k in the eligible groups; groups scored by two experts
        need two."""
        if self.n_group == 1:
            return self.num_experts_per_tok
        per_group = max(2, -(-self.num_experts_per_tok // self.topk_group))
        return per_group * self.n_group
