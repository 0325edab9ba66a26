"""Adapts compressed-tensors' schemes: presets with the recipe's group size, and packing and unpacking of single
matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)
from torch import Tensor, nn

from reapkit.checkpoint.architecture import quantization_of
from reapkit.checkpoint.projection_names import COMPRESSED_PARTS
from reapkit.core.errors import UnusableError
from reapkit.quantization.schemes import SCHEMES, scheme_of
from reapkit.recipe.schema import QuantizeSpec

Tensors = dict[str, Tensor]


def preset(spec: QuantizeSpec) -> QuantizationScheme:
    """The scheme with the recipe's group size and its on-disk format settled, for Linear modules."""
    scheme = preset_name_to_scheme(scheme_of(spec).name, ["Linear"])
    if not scheme_of(spec).fixed:
        weights_of(scheme).group_size = spec.group_size
    scheme.format = CompressionFormat(infer_module_format(nn.Linear, scheme))
    return scheme


def weights_of(scheme: QuantizationScheme) -> QuantizationArgs:
    """How the scheme stores weights. Raises UnusableError for one that is about activations alone."""
    if scheme.weights is None:
        raise UnusableError(
            "config.json: found a quantization that leaves the weights as they are, which is not a scheme of reapkit's."
            f" Known: {', '.join(SCHEMES)}."
        )
    return scheme.weights


def quantization_config(scheme: QuantizationScheme, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    import compressed_tensors

    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=ignore,
        quantization_status=QuantizationStatus.COMPRESSED,
        format=CompressionFormat(scheme.format),
    )
    return {
        "version": compressed_tensors.__version__,
        "quant_method": "compressed-tensors",
        **config.model_dump(mode="json"),
    }


def scheme_on_disk(config: Mapping[str, Any]) -> QuantizationScheme:
    """The one scheme of a config.json that this package wrote."""
    quantization = QuantizationConfig.model_validate(
        {key: value for key, value in quantization_of(config).items() if key not in ("version",)}
    )
    return cast(QuantizationScheme, next(iter(quantization.config_groups.values())))


def spec_on_disk(config: Mapping[str, Any]) -> QuantizeSpec:
    """What a quantized directory says it is, as a recipe would say it; the method is not recorded there."""
    scheme = scheme_on_disk(config)
    weights = weights_of(scheme)
    for name, known in SCHEMES.items():
        args = weights_of(preset_name_to_scheme(name, ["Linear"]))
        if (args.num_bits, args.type, args.strategy, args.symmetric, args.scale_dtype) == (
            weights.num_bits,
            weights.type,
            weights.strategy,
            weights.symmetric,
            weights.scale_dtype,
        ):
            group = {} if known.fixed else {"group_size": weights.group_size}
            ignore = tuple(quantization_of(config)["ignore"])
            return QuantizeSpec.model_validate({"scheme": name, "method": "rtn", "ignore": ignore, **group})
    raise UnusableError(
        f"config.json: found quantization {scheme.format} of {weights.num_bits} bits, which is not a scheme of"
        f" reapkit's. Known: {', '.join(SCHEMES)}."
    )


def compress(tensors: Mapping[str, Tensor], scheme: QuantizationScheme) -> Tensors:
    """The parts of one matrix as they are stored (`PARTS`), from its `weight` [rows, columns] in any float dtype and
    its quantization parameters (`weight_scale` [rows, groups] and so on). Contiguous, safe to save."""
    stored = BaseCompressor.get_value_from_registry(CompressionFormat(scheme.format).value).compress(
        dict(tensors), scheme
    )
    return {
        name: tensor.contiguous() for name, tensor in stored.items() if tensor is not None and name in COMPRESSED_PARTS
    }


def round_to_nearest(weight: Tensor, scheme: QuantizationScheme) -> Tensors:
    """The stored parts of one matrix [rows, columns], in any float dtype, as llm-compressor's data-free quantization
    makes them."""
    from llmcompressor.entrypoints.model_free.lifecycle import calibrate_weight, initialize_quantized_linear

    with torch.no_grad():
        module = initialize_quantized_linear(weight, scheme.model_copy(deep=True), weight.device)
        calibrate_weight(cast(nn.Linear, module))
        return compress({name: tensor.detach() for name, tensor in module.state_dict().items()}, scheme)
