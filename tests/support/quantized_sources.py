"""Tiny checkpoints as quantization methods write them, and what their matrices are, counted out by hand.

`write(name, path)` saves a two-layer model quantized so. compressed-tensors' formats are made by llm-compressor's own
data-free quantization and compressed-tensors' own compressors; FP8, MXFP4, ModelOpt, AWQ, GPTQ, bitsandbytes and
torchao by the small writers below after the layouts that they publish, since their tools need a GPU or are not
installed beside this torch. `naive(path)` reads the file without any of these libraries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from reapkit.quantization.formats import round_to_nearest
from tests.support import tiny

FILE = "model.safetensors"
QUANTIZED = re.compile(r"(?:self_attn|experts\..*|mlp)\.(?:[qkvo]|gate|up|down)_proj\.weight$")
LEFT = ["lm_head", "re:.*mlp.gate$"]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
LEVELS = torch.tensor([*E2M1, *(-value for value in E2M1)])
Parts = dict[str, Tensor]


def write(name: str, path: Path, model_type: str = "qwen3_moe", **overrides: Any) -> Path:
    """A tiny model of `model_type`, two layers of eight experts, with its matrices stored as `name` says."""
    if name == "mxfp4":
        model = tiny.build("gpt_oss", torch.bfloat16, num_hidden_layers=2, intermediate_size=64, num_local_experts=8)
        return tiny.as_mxfp4(tiny.save_hub_layout(model, path))
    sizes = dict(num_hidden_layers=2, moe_intermediate_size=64, num_experts=8) if model_type == "qwen3_moe" else {}
    tiny.save_hub_layout(tiny.build(model_type, torch.bfloat16, **sizes, **overrides), path)
    return rewrite(path, *WRITERS[name])


def rewrite(path: Path, parts: Callable[[Tensor], Parts], quantization: dict[str, Any]) -> Path:
    """Stores every matrix of the decoder's layers as `parts` gives it, by suffix, and says so in config.json."""
    tensors = load_file(path / FILE)
    for name in [name for name in tensors if QUANTIZED.search(name)]:
        stem = name.removesuffix(".weight")
        tensors |= {stem + suffix: part.contiguous().clone() for suffix, part in parts(tensors.pop(name)).items()}
    save_file(tensors, path / FILE, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}, indent=2))
    return path


# ---------------------------------------------------------------------------------------------- compressed-tensors


def compressed(preset: str | QuantizationArgs) -> tuple[Callable[[Tensor], Parts], dict[str, Any]]:
    """A preset's name, or how weights are quantized, as compressed-tensors stores them."""
    if isinstance(preset, str):
        scheme = preset_name_to_scheme(preset, ["Linear"])
        if scheme.weights is not None and scheme.weights.group_size == 128:
            scheme.weights.group_size = 32
    else:
        scheme = QuantizationScheme(targets=["Linear"], weights=preset)
    scheme.format = CompressionFormat(infer_module_format(torch.nn.Linear, scheme))
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=LEFT,
        format=scheme.format,
        quantization_status=QuantizationStatus.COMPRESSED,
    )

    def parts(weight: Tensor) -> Parts:
        found = {f".{part}": tensor for part, tensor in round_to_nearest(weight, scheme).items()}
        activations = scheme.input_activations
        if activations is not None and not activations.dynamic:
            found[".input_scale"] = torch.ones(1, dtype=weight.dtype)
        return found

    return parts, {"quant_method": "compressed-tensors", **config.model_dump(mode="json")}


ASYMMETRIC = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=32)
STATIC_ORDER = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, actorder="weight")
CHANNEL = QuantizationArgs(num_bits=8, type="int", strategy="channel")


# ---------------------------------------------------------------------------------------------- after the layouts


def fp8(height: int | None, width: int | None = None) -> tuple[Callable[[Tensor], Parts], dict[str, Any]]:
    """FP8 with a scale per block, row (height 1, no width) or matrix (neither), as DeepSeek publishes it; blocks may
    overhang."""

    def parts(weight: Tensor) -> Parts:
        rows, columns = weight.shape
        tall, wide = height or rows, width or columns
        scale = torch.stack(
            [
                torch.stack([block.abs().amax().float() / 448 for block in strip.split(wide, 1)])
                for strip in weight.split(tall, 0)
            ]
        )
        spread = scale.repeat_interleave(tall, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        stored = scale.reshape(()) if scale.numel() == 1 and height is None else scale
        return {".weight": (weight.float() / spread).to(torch.float8_e4m3fn), ".weight_scale_inv": stored}

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None}
    return parts, config | ({"weight_block_size": [height, width]} if width else {})


def _powers(weight: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """(values [rows, columns] at most `largest`, exponents uint8 [rows, columns / 32] of the powers of two they were
    divided by)."""
    groups = weight.float().unflatten(1, (-1, 32))
    exponent = (groups.abs().amax(2) / largest).clamp(min=2.0**-100).log2().ceil()
    return (groups / exponent.exp2()[..., None]).flatten(1), (exponent + 127).to(torch.uint8)


def mxfp8(weight: Tensor) -> Parts:
    values, exponent = _powers(weight, 448)
    return {".weight": values.to(torch.float8_e4m3fn), ".weight_scale_inv": exponent}


def four_bit_fp8(weight: Tensor) -> Parts:
    """DeepSeek-V4's experts: two 4-bit floats in a byte, scales of exponents alone."""
    values, exponent = _powers(weight, 6)
    codes = (values[..., None] - LEVELS).abs().argmin(-1).to(torch.uint8)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return {".weight": packed.view(torch.int8), ".scale": exponent.view(torch.float8_e8m0fnu)}


def modelopt_fp8(weight: Tensor) -> Parts:
    scale = weight.abs().amax().float() / 448
    stored = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {".weight": stored, ".weight_scale": scale, ".input_scale": torch.ones(())}


def modelopt_nvfp4(weight: Tensor) -> Parts:
    """The numbers of compressed-tensors' NVFP4, whose global scale is the inverse of ModelOpt's."""
    parts = compressed("NVFP4A16")[0](weight)
    return {
        ".weight": parts[".weight_packed"],
        ".weight_scale": parts[".weight_scale"],
        ".weight_scale_2": 1 / parts[".weight_global_scale"],
        ".input_scale": torch.ones(()),
    }


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's gemm kernel wants output k of eight at this place of the word, from the lowest bits."""


def _in_words(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """4-bit integers [rows, columns] as int32 words along the columns."""
    words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for place, taken in enumerate(order):
        words |= values[:, taken::8].long() << (4 * place)
    return words.to(torch.uint32).view(torch.int32)


def _levels(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(levels 0..15 [in, out], scales, zeros [in / group, out]) of asymmetric rounding."""
    groups = weight.float().T.reshape(-1, group, weight.shape[0])
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-6).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    level = (groups / scale.float()[:, None] + zero[:, None]).round().clamp(0, 15)
    return level.reshape(weight.shape[1], -1).int(), scale, zero.int()


def awq(weight: Tensor) -> Parts:
    level, scale, zero = _levels(weight, 32)
    return {".qweight": _in_words(level, AWQ_ORDER), ".qzeros": _in_words(zero, AWQ_ORDER), ".scales": scale}


def gptq(weight: Tensor) -> Parts:
    level, scale, zero = _levels(weight, 32)
    inputs = weight.shape[1]
    return {
        ".qweight": _in_words(level.T, tuple(range(8))).T,
        ".qzeros": _in_words(zero - 1, tuple(range(8))),
        ".scales": scale,
        ".g_idx": (torch.arange(inputs) // 32).int(),
    }


def bitsandbytes(weight: Tensor) -> Parts:
    return {
        ".weight": torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8),
        ".weight.absmax": torch.ones(weight.numel() // 64),
        ".weight.quant_map": torch.linspace(-1, 1, 16),
        ".weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    }


def torchao(weight: Tensor) -> Parts:
    return {"._weight_qdata": weight.to(torch.int8), "._weight_scale": weight.abs().amax(1)}


_GROUPS = {"bits": 4, "group_size": 32}
WRITERS: dict[str, tuple[Callable[[Tensor], Parts], dict[str, Any]]] = {
    **{
        f"compressed-tensors {preset}": compressed(preset)
        for preset in (
            *("W4A16", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"),
            *("NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP8A16"),
        )
    },
    "compressed-tensors W3A16": compressed("W3A16"),
    "compressed-tensors W4A16 asymmetric": compressed(ASYMMETRIC),
    "compressed-tensors W4A16 ordered": compressed(STATIC_ORDER),
    "compressed-tensors W8A16 by row": compressed(CHANNEL),
    "fp8 by block": fp8(32, 32),
    "fp8 by block that overhangs": fp8(48, 48),
    "fp8 by row": fp8(1),
    "fp8 by matrix": fp8(None),
    "fp8 with 4-bit weights": (four_bit_fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "mxfp8": (mxfp8, {"quant_method": "mxfp8", "weight_block_size": [1, 32]}),
    "modelopt FP8": (modelopt_fp8, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "modelopt NVFP4": (modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "awq": (awq, {"quant_method": "awq", "version": "gemm", "zero_point": True, **_GROUPS}),
    "gptq": (gptq, {"quant_method": "gptq", "desc_act": False, "sym": False, **_GROUPS}),
    "auto-round": (gptq, {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", **_GROUPS}),
    "bitsandbytes": (bitsandbytes, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "torchao": (torchao, {"quant_method": "torchao", "quant_type": {"default": {}}}),
}
NAMES = (*WRITERS, "mxfp4")


# ---------------------------------------------------------------------------------------------- counted out by hand


def naive(path: Path) -> dict[str, Tensor]:
    """Every matrix by its plain name, float32, from the bytes alone."""
    tensors = load_file(path / FILE)
    settings = json.loads((path / "config.json").read_text())["quantization_config"]
    found: dict[str, Tensor] = {}
    for name in tensors:
        stem = re.sub(r"\.(?:weight_packed|qweight|weight)$", "", name)
        if stem != name:
            parts = {key[len(stem) :]: part for key, part in tensors.items() if key.startswith(f"{stem}.")}
            found[f"{stem}.weight"] = _naive(parts, settings)
        elif name.endswith("_blocks"):
            found[name.removesuffix("_blocks")] = _four_bit_stack(
                tensors[name], tensors[name.replace("blocks", "scales")]
            )
    return found


def _naive(parts: Parts, settings: dict[str, Any]) -> Tensor:
    group = next(iter(settings.get("config_groups", {}).values()), {})
    weights = group.get("weights") or {}
    if ".qweight" in parts:
        return _awq(parts)
    if ".weight_packed" in parts and parts[".weight_packed"].dtype == torch.int32:
        return _integers(parts, weights["num_bits"])
    if ".weight_packed" in parts or ".weight_scale_2" in parts or ".scale" in parts:
        return _four_bits(parts)
    scale = parts.get(".weight_scale", parts.get(".weight_scale_inv"))
    weight = parts[".weight"].float()
    if scale is None:
        return weight
    factor = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    block = weights.get("block_structure") or settings.get("weight_block_size")
    if factor.numel() == 1:
        return weight * factor.reshape(())
    height, width = block or (1, weight.shape[1] // factor.shape[1])
    rows, columns = torch.arange(weight.shape[0]) // height, torch.arange(weight.shape[1]) // width
    return weight * factor[rows][:, columns]


def _integers(parts: Parts, bits: int) -> Tensor:
    rows, columns = parts[".weight_shape"].tolist()
    low = 2 ** (bits - 1)
    levels = _unpacked(parts[".weight_packed"], bits, columns) - low
    scale = parts[".weight_scale"].float()
    if (zero := parts.get(".weight_zero_point")) is not None:
        levels = levels - (_unpacked(zero.T, bits, rows).T - low).repeat_interleave(columns // scale.shape[1], 1)
    return levels * scale.repeat_interleave(columns // scale.shape[1], 1)


def _unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """`count` numbers per row, bit after bit from the lowest of the first word."""
    stream = ((words.long()[..., None] >> torch.arange(32)) & 1).flatten(1)[:, : bits * count]
    return (stream.reshape(len(words), count, bits) << torch.arange(bits)).sum(2).float()


def _four_bits(parts: Parts) -> Tensor:
    packed = parts[".weight_packed" if ".weight_packed" in parts else ".weight"]
    packed = packed.view(torch.uint8)
    scale = parts[".weight_scale"] if ".weight_scale" in parts else parts[".scale"].view(torch.uint8)
    values = torch.stack([LEVELS[(packed & 15).long()], LEVELS[(packed >> 4).long()]], -1).flatten(1)
    factor = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    if ".weight_global_scale" in parts:
        factor = factor / parts[".weight_global_scale"]
    if ".weight_scale_2" in parts:
        factor = factor * parts[".weight_scale_2"]
    return values * factor.repeat_interleave(values.shape[1] // factor.shape[1], 1)


def _awq(parts: Parts) -> Tensor:
    def levels(words: Tensor) -> Tensor:
        values = torch.zeros(words.shape[0], words.shape[1] * 8)
        for place, taken in enumerate(AWQ_ORDER):
            values[:, taken::8] = (words >> (4 * place)) & 15
        return values

    group = parts[".qweight"].shape[0] // parts[".scales"].shape[0]
    zero, scale = (each.repeat_interleave(group, 0) for each in (levels(parts[".qzeros"]), parts[".scales"].float()))
    return ((levels(parts[".qweight"]) - zero) * scale).T


def _four_bit_stack(blocks: Tensor, scales: Tensor) -> Tensor:
    values = torch.stack([LEVELS[(blocks & 15).long()], LEVELS[(blocks >> 4).long()]], -1).flatten(3)
    return (values * (scales.float() - 127).exp2()[..., None]).flatten(2).transpose(1, 2)


# ---------------------------------------------------------------------------------------------- what is expected

QUICK = (
    *(f"compressed-tensors {kind}" for kind in ("W4A16", "W4A16 asymmetric", "FP8_BLOCK", "NVFP4A16", "MXFP4")),
    *("fp8 by block that overhangs", "fp8 with 4-bit weights", "modelopt NVFP4", "awq", "gptq", "torchao", "mxfp4"),
)
"""Formats that are tried in every run of the tests, one of each way of storing; the others differ in a setting."""
UNREAD = ("gptq", "auto-round", "bitsandbytes", "torchao")


def is_read(name: str) -> bool:
    """Whether reapkit dequantizes the format, as the page of formats says."""
    return name not in UNREAD


def matrices(path: Path) -> int:
    """How many matrices `write` quantized: all of attention's, of every expert's; two stacks a layer in gpt-oss."""
    config = json.loads((path / "config.json").read_text())
    layers = config["num_hidden_layers"]
    return 2 * layers if config["model_type"] == "gpt_oss" else layers * (4 + 3 * config["num_experts"])


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Equal dtype, shape and bytes, whatever the bytes mean."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.contiguous().reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    )


def add(path: Path, name: str) -> None:
    """One more tensor in a checkpoint's file."""
    save_file(load_file(path / FILE) | {name: torch.ones(4)}, path / FILE, metadata={"format": "pt"})
