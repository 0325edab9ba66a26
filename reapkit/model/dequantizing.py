"""Dequantizes one stored matrix at a time, with the libraries of the methods where they have a function for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from torch import Tensor, nn

from reapkit.checkpoint.quantization_methods import (
    AWQ_GEMM,
    BLOCK_FP8,
    FOUR_BIT_FP8,
    MODELOPT_FP8,
    MODELOPT_NVFP4,
    MXFP4_PACKED,
    MXFP4_STACKS,
    NVFP4_PACKED,
    PACK_QUANTIZED,
    STORED,
)
from reapkit.checkpoint.stored_matrices import Packing, StoredMatrix

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the 4-bit floats without sign, in the order of their codes (OCP microscaling formats, section 5.3.3)."""
E8M0_BIAS = 127


def dequantized(matrix: StoredMatrix, parts: Mapping[str, Tensor]) -> Tensor:
    """The matrix that `parts` stand for, by suffix in their stored shapes and dtypes: [rows, columns], or a stack of
    experts' [experts, ...], in the float dtype that it is computed in (float32 where scales are multiplied here), not
    yet rounded to a model's."""
    return _DEQUANTIZERS[matrix.packing](dict(parts), matrix.settings)


def decompress(stored: Mapping[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    """The matrix that compressed-tensors' parts (`weight_packed`, `weight_scale`, …) stand for, [rows, columns] in the
    dtype of its scales (bf16 where those are not floats)."""
    compressor = BaseCompressor.get_value_from_registry(CompressionFormat(scheme.format).value)
    return cast(Tensor, compressor.decompress(dict(stored), scheme)["weight"])


def unblocked(weight: Tensor, scale: Tensor, block: tuple[int, int] | None = None) -> Tensor:
    """Weights [..., rows, columns] multiplied by the scale of their block, float32.

    `scale`: [..., ceil(rows / height), ceil(columns / width)] in any float dtype, uint8 for exponents of E8M0
    (2^(code − 127)); or one number, or one per row. `block`: (height, width); without it the grid of
    the scales divides the matrix evenly, rounded up.
    """
    rows, columns = weight.shape[-2:]
    factor = torch.exp2(scale.float() - E8M0_BIAS) if scale.dtype == torch.uint8 else scale.float()
    if factor.numel() == 1:
        return weight.float() * factor.reshape(())
    if factor.shape == weight.shape[:-2]:  # one per matrix of a stack
        factor = factor[..., None, None]
    elif factor.shape == weight.shape[:-1]:  # one per row
        factor = factor[..., None]
    down, across = factor.shape[-2:]
    height, width = block or (-(-rows // down), -(-columns // across))
    if (down, across) == (rows, 1):  # a scale per row, whatever block a config names
        height, width = 1, columns
    whole = factor.repeat_interleave(height, -2)[..., :rows, :].repeat_interleave(width, -1)[..., :columns]
    return weight.float() * whole


def four_bits(packed: Tensor) -> Tensor:
    """Two 4-bit floats of each byte [..., columns / 2], the low half first, as float32 [..., columns]."""
    codes = packed.contiguous().view(torch.uint8)
    halves = torch.stack([codes & 0xF, codes >> 4], -1).flatten(-2).long()
    values = torch.tensor((*E2M1, *(-value for value in E2M1)), device=packed.device)
    return values[halves]


def scheme_of_group(group: Mapping[str, Any]) -> QuantizationScheme:
    """A config group of compressed-tensors as a scheme, its format settled."""
    scheme = QuantizationScheme.model_validate({**group, "targets": list(group.get("targets") or ["Linear"])})
    if scheme.format in (None, CompressionFormat.mixed_precision, CompressionFormat.dense):
        scheme.format = CompressionFormat(infer_module_format(nn.Linear, scheme))
    return scheme


def _compressed(parts: dict[str, Tensor], group: Mapping[str, Any]) -> Tensor:
    return decompress({suffix.removeprefix("."): part for suffix, part in parts.items()}, scheme_of_group(group))


def _fp8(parts: dict[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    block = settings.get("weight_block_size")
    return unblocked(parts[""], parts["_scale_inv"], tuple(block) if block else None)


def _fp8_or_fp4(parts: dict[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    weight, scale = parts[".weight"], parts[".scale"]
    if weight.dtype in (torch.int8, torch.uint8):
        return unblocked(four_bits(weight), scale)
    block = settings.get("weight_block_size")
    return unblocked(weight, scale, tuple(block) if block else None)


def _modelopt_fp8(parts: dict[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    return unblocked(parts[".weight"], parts[".weight_scale"])


def _modelopt_nvfp4(parts: dict[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """As compressed-tensors converts it: its own global scale is the inverse of ModelOpt's."""
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    scheme.format = CompressionFormat.nvfp4_pack_quantized
    stored = {
        "weight_packed": parts[".weight"],
        "weight_scale": parts[".weight_scale"],
        "weight_global_scale": 1 / parts[".weight_scale_2"],
    }
    return decompress(stored, scheme)


def _mxfp4(parts: dict[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(parts["_blocks"], parts["_scales"])


def _awq(parts: dict[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    converter = AutoAWQConverter(
        bits=int(settings.get("bits") or 4),
        group_size=int(settings.get("group_size") or 128),
        zero_point=".qzeros" in parts,
        ignore=(),
    )
    converted = converter.process({f"matrix{suffix}": part for suffix, part in parts.items()})
    scheme = cast(QuantizationScheme, next(iter(converter._build_quant_config().config_groups.values())))
    return decompress({name.removeprefix("matrix."): part for name, part in converted.items()}, scheme)


_DEQUANTIZERS: Mapping[Packing, Callable[[dict[str, Tensor], Mapping[str, Any]], Tensor]] = {
    **dict.fromkeys((PACK_QUANTIZED, NVFP4_PACKED, MXFP4_PACKED, STORED), _compressed),
    BLOCK_FP8: _fp8,
    FOUR_BIT_FP8: _fp8_or_fp4,
    MODELOPT_FP8: _modelopt_fp8,
    MODELOPT_NVFP4: _modelopt_nvfp4,
    MXFP4_STACKS: _mxfp4,
    AWQ_GEMM: _awq,
}
