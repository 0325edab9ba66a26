"""Lists the methods that published checkpoints are quantized with, one record each: how they are named, and what
reapkit can do with them. Torch-free.

What a record can be read with, the library of the method dequantizes one matrix at a time (`model/dequantizing.py`);
the page docs/formats.md is made of these records, and a test proves every word of it on tiny checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reapkit.checkpoint.stored_matrices import (
    Packing,
    as_stored,
    awq_words,
    mxfp4_stack,
    packed_integers,
    two_in_a_byte,
)
from reapkit.core.safetensors_header import TensorInfo

Settings = Mapping[str, Any]
Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class QuantizationMethod:
    """One value of `quant_method`, or of the file that stands for it.

    `packings`: how its matrices are stored, in the order in which they are looked for; none where nothing here reads
    them, and then `unread` says why. `settings`: (the checkpoint's settings, a module) -> what holds for the module's
    matrix. `refuses`: why a checkpoint of the method cannot be read all the same, half a sentence. `cut`: whether the
    tensors of an expert can be told from their names alone, so that pruning keeps the format. `meaning` and `tool`: for
    the page.
    """

    name: str
    meaning: str
    tool: str
    packings: tuple[Packing, ...] = ()
    unread: str | None = None
    settings: Callable[[Settings, str], Settings] = lambda quantization, module: quantization
    refuses: Callable[[Settings, Tensors], str | None] = lambda quantization, tensors: None
    cut: bool = True

    @property
    def observed(self) -> bool:
        """Whether a model of this method can be observed, evaluated and quantized again: all three take its dequantized
        weights."""
        return bool(self.packings)


# ---------------------------------------------------------------------------------------------- compressed-tensors

PACK_QUANTIZED = Packing(
    "pack-quantized",
    ".weight_packed",
    ".weight_packed",
    ".weight",
    packed_integers,
    (".weight_scale",),
    (".weight_shape", ".weight_zero_point"),
    fits=lambda parts: parts[".weight_packed"].dtype == "I32",
    scale=".weight_scale",
)
NVFP4_PACKED = Packing(
    "nvfp4-pack-quantized",
    ".weight_packed",
    ".weight_packed",
    ".weight",
    two_in_a_byte(".weight_packed"),
    (".weight_scale", ".weight_global_scale"),
)
MXFP4_PACKED = Packing(
    "mxfp4-pack-quantized",
    ".weight_packed",
    ".weight_packed",
    ".weight",
    two_in_a_byte(".weight_packed"),
    (".weight_scale",),
    fits=lambda parts: parts[".weight_packed"].dtype == "U8",
)
STORED = Packing(
    "int-, float-, naive- or mxfp8-quantized",
    ".weight_scale",
    ".weight",
    ".weight",
    as_stored,
    optional=(".weight_zero_point",),
    scale=".weight_scale",
)
FORMATS = {
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
    "dense",
}
"""Formats of compressed-tensors that its 0.19 decompresses."""


def _group(quantization: Settings, module: str) -> Settings:
    """The config group of a module, with its format: the first that names it, else the first that names a class of
    modules."""
    groups = [group for group in (quantization.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    named = [group for group in groups if any(_names(target, module) for target in group.get("targets") or ())]
    classes = [group for group in groups if any("." not in str(target) for target in group.get("targets") or ())]
    group = next(iter((*named, *classes, *groups)), {})
    return {**group, "format": group.get("format") or quantization.get("format")}


def _names(target: Any, module: str) -> bool:
    text = str(target)
    return bool(re.match(text[3:], module)) if text.startswith("re:") else text == module


def _refused_compressed(quantization: Settings, tensors: Tensors) -> str | None:
    formats = {quantization.get("format")} | {_group(quantization, name)["format"] for name in _targets(quantization)}
    if strange := sorted(str(one) for one in formats - FORMATS if one is not None):
        return f"its format is {strange[0]}, which compressed-tensors 0.19 does not decompress"
    if reordered := next((name for name in tensors if name.endswith(".weight_g_idx")), None):
        return f"its columns are reordered ({reordered}), which compressed-tensors 0.19 does not undo"
    return None


def _targets(quantization: Settings) -> Iterator[str]:
    for group in (quantization.get("config_groups") or {}).values():
        if isinstance(group, Mapping):
            yield from (str(target) for target in group.get("targets") or ())


# ---------------------------------------------------------------------------------------------- scales beside weights

BLOCK_FP8 = Packing("scales beside 8-bit weights", "_scale_inv", "", "", as_stored)
FOUR_BIT_FP8 = Packing(
    "scales beside 4-bit weights in bytes",
    ".scale",
    ".weight",
    ".weight",
    lambda parts, settings: (
        two_in_a_byte(".weight")(parts, settings) if _is_bytes(parts[".weight"]) else as_stored(parts, settings)
    ),
)
MXFP4_STACKS = Packing("blocks and scales of stacked experts", "_blocks", "_blocks", "", mxfp4_stack, ("_scales",))
MODELOPT_NVFP4 = Packing(
    "NVFP4",
    ".weight_scale_2",
    ".weight",
    ".weight",
    two_in_a_byte(".weight"),
    (".weight_scale",),
    fits=lambda parts: parts[".weight"].dtype == "U8",
)
MODELOPT_FP8 = Packing(
    "FP8", ".weight_scale", ".weight", ".weight", as_stored, fits=lambda parts: parts[".weight"].dtype == "F8_E4M3"
)
AWQ_GEMM = Packing("gemm", ".qweight", ".qweight", ".weight", awq_words, (".scales",), (".qzeros",), scale=".scales")


def _is_bytes(tensor: TensorInfo) -> bool:
    return tensor.dtype in ("I8", "U8")


def _refused_awq(quantization: Settings, tensors: Tensors) -> str | None:
    version, bits = quantization.get("version", "gemm"), quantization.get("bits", 4)
    if str(version).lower() != "gemm" or bits != 4:
        return f"it is packed as {version} with {bits} bits, of which compressed-tensors 0.19 converts gemm with 4 only"
    return None


# ---------------------------------------------------------------------------------------------- the table

_NO_LIBRARY = "no library here dequantizes it for a model whose experts are stacked"
METHODS: Mapping[str, QuantizationMethod] = {
    method.name: method
    for method in (
        QuantizationMethod(
            "compressed-tensors",
            "integers, FP8, NVFP4, MXFP4 or MXFP8 in groups, rows, blocks or whole",
            "llm-compressor",
            (PACK_QUANTIZED, NVFP4_PACKED, MXFP4_PACKED, STORED),
            settings=_group,
            refuses=_refused_compressed,
        ),
        QuantizationMethod(
            "fp8", "8-bit floats, scales by block, row or matrix", "DeepSeek, Qwen, MiniMax", (BLOCK_FP8, FOUR_BIT_FP8)
        ),
        QuantizationMethod("mxfp8", "8-bit floats, a power of two per 32 columns", "transformers", (BLOCK_FP8,)),
        QuantizationMethod("mxfp4", "4-bit floats of stacked experts", "gpt-oss", (MXFP4_STACKS,)),
        QuantizationMethod("modelopt", "FP8 or NVFP4", "NVIDIA ModelOpt", (MODELOPT_NVFP4, MODELOPT_FP8)),
        QuantizationMethod("awq", "4-bit integers with zero points", "AutoAWQ", (AWQ_GEMM,), refuses=_refused_awq),
        QuantizationMethod(
            "gptq", "integers in groups, columns perhaps reordered", "GPTQModel, AutoGPTQ", unread=_NO_LIBRARY
        ),
        QuantizationMethod("auto-round", "integers as GPTQ or AWQ pack them", "AutoRound", unread=_NO_LIBRARY),
        QuantizationMethod("bitsandbytes", "8-bit integers, NF4 or FP4", "bitsandbytes", unread=_NO_LIBRARY),
        QuantizationMethod("torchao", "tensor subclasses taken apart", "torchao", unread=_NO_LIBRARY, cut=False),
    )
}
"""Every method that reapkit knows, by the value of `quant_method`."""
