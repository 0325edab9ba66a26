"""Tiny copies of published checkpoints, made from their facts: a few layers and experts, small widths, and the names,
formats and config fields that they are published with."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from tests.support.published_models import FACTS, expand
from tests.support.tiny import decisive

NAMES = tuple(sorted(path.stem for path in FACTS.glob("*.json")))
RESPELLED = {  # where transformers saves under other names than the model is published with
    "deepseek-v4-flash-bf16": {
        r"^model\.embed_tokens\.": "embed.",
        r"^model\.hc_head\.hc_": "hc_head_",
        r"^model\.": "",
    },
    "kimi-k2.5": {
        r"^language_model\.model\.blocks\.": "language_model.model.layers.",
        r"^vision_tower\.encoder\.patch_embed": "vision_tower.patch_embed",
    },
}
QUANTIZED = {
    "fp8": re.compile(r"\.(?:self_attn\.[qkvo]_proj|experts\.\d+\.w[123])\.weight$"),
    "int4": re.compile(r"\.experts\.\d+\.\w+\.weight$"),
}
"""Format -> the matrices that the published checkpoint holds in it."""
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@cache
def facts(name: str) -> dict[str, Any]:
    """Config, tensor templates and what a tiny copy has smaller, of one model."""
    return json.loads((FACTS / f"{name}.json").read_text())


def patterns(names: Any) -> set[str]:
    """Names without their numbers: two checkpoints that have the same are laid out alike."""
    return {NUMBER.sub("#", name) for name in names}


def published_patterns(name: str) -> set[str]:
    return patterns(tensor for tensor, *_ in expand(facts(name)["tensors"]))


def tiny_config(name: str) -> dict[str, Any]:
    """The published config with the copy's smaller numbers."""
    return _merged(facts(name)["config"], facts(name)["tiny"])


def tiny_copy(name: str, directory: Path) -> Path:
    """Writes the copy: random weights whose routing is decisive, in the published names and formats."""
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config(name)
    tensors = _stored(_model(config), name)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, directory / "model.safetensors", {"format": "pt"}
    )
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def _model(config: Mapping[str, Any]) -> nn.Module:
    plain = json.loads(json.dumps(config))
    for part in (plain, plain.get("text_config", {})):
        part.pop("quantization_config", None)
    settings = AutoConfig.for_model(plain.pop("model_type"), **plain)
    torch.manual_seed(0)
    model = getattr(transformers, config["architectures"][0])._from_config(settings, dtype=torch.float32)
    decisive(model, settings)
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.mul_(0.1)  # a bias of its usual size would choose the same few of eight experts for every token
    return model.to(torch.bfloat16).eval()


def _stored(model: nn.Module, name: str) -> dict[str, Tensor]:
    tied = model.all_tied_weights_keys
    tensors = revert_weight_conversion(model, {k: t for k, t in model.state_dict().items() if k not in tied})
    for pattern, published in RESPELLED.get(name, {}).items():
        tensors = {re.sub(pattern, published, key): tensor for key, tensor in tensors.items()}
    how = facts(name).get("quantized")
    if how is None:
        return tensors
    stored: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        stored |= _in_format(key, tensor, how) if QUANTIZED[how].search(key) else {key: tensor}
    return stored


def _in_format(key: str, weight: Tensor, how: str) -> dict[str, Tensor]:
    """One matrix [rows, columns] in blocks of FP8, or in groups of 32 columns of four-bit integers."""
    rows, columns = weight.shape
    if how == "fp8":
        padded = nn.functional.pad(weight.float(), (0, -columns % 128, 0, -rows % 128))
        blocks = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
        scale = blocks.abs().amax(dim=(1, 3)).clamp_min(1e-6) / 448
        small = (blocks / scale[:, None, :, None]).view_as(padded)[:rows, :columns]
        return {key: small.to(torch.float8_e4m3fn), f"{key}_scale_inv": scale}
    groups = weight.float().view(rows, columns // 32, 32)
    scale = groups.abs().amax(dim=2).clamp_min(1e-6) / 7
    integers = (groups / scale[..., None]).round().clamp(-8, 7).view(rows, columns).to(torch.int64) + 8
    shifts = 4 * torch.arange(8)
    packed = (integers.view(rows, columns // 8, 8) << shifts).sum(2)
    words = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    prefix = key.removesuffix("weight")
    return {
        f"{prefix}weight_packed": words,
        f"{prefix}weight_scale": scale.to(torch.bfloat16),
        f"{prefix}weight_shape": torch.tensor([rows, columns], dtype=torch.int32),
    }


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return dict(one) | {
        key: _merged(one[key], value) if isinstance(value, dict) and isinstance(one.get(key), dict) else value
        for key, value in other.items()
    }
