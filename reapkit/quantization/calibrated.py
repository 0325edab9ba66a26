"""Runs GPTQ, AWQ and AutoRound on a loaded model and writes the result with the source's names (see `oneshot.py` for
the calibration)."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import yaml
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme, fake_quantize
from torch import Tensor, nn
from transformers import PreTrainedModel

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import Problem, RecipeError, StageFailed, UnusableError
from reapkit.core.progress import Progress
from reapkit.model.dequantizing import decompress
from reapkit.model.loaded_names import LoadedNames
from reapkit.quantization.dense import relative_error
from reapkit.quantization.formats import compress, round_to_nearest, weights_of
from reapkit.quantization.loading import parameter_names, taken_apart
from reapkit.quantization.oneshot import (
    count_tokens,
    equal_batches,
    modifiers_of,
    run_oneshot,
    unchanged_without_rounding,
)
from reapkit.quantization.placing import place_matrices
from reapkit.quantization.quiet import quiet
from reapkit.quantization.targets import Targets
from reapkit.quantization.writing import read_tensor, write_shards
from reapkit.recipe.schema import QuantizeSpec

if TYPE_CHECKING:

    class _QuantizedLinear(nn.Linear):
        """What llm-compressor makes of a linear layer."""

        weight_scale: nn.Parameter
        quantization_scheme: QuantizationScheme


FEW_TOKENS = 128
"""Experts with fewer calibration tokens are named in the report; those with none are rounded to nearest."""
PACKING_TOLERANCE = 1e-2
"""bf16 keeps 8 bits of a weight that the quantizer computed in float32."""


@dataclass(frozen=True)
class Quantized:
    """What was written: source tensor -> prefixes, what the plan became, the one scheme of it all, facts for the
    report."""

    written: dict[str, list[str]]
    plan: Targets
    scheme: QuantizationScheme
    facts: dict[str, Any]


def quantize_loaded(
    checkpoint: Checkpoint,
    out: Path,
    plan: Targets,
    spec: QuantizeSpec,
    scheme: QuantizationScheme | None,
    calibration: CalibrationTokens | None,
    *,
    device: torch.device,
    batch_tokens: int,
    max_shard_bytes: int,
    offload: Path | None,
    trust_remote_code: bool,
    progress: Progress,
) -> Quantized:
    """Quantizes a loaded model and writes it under the source's names. `scheme` None: `spec.recipe` decides what is
    quantized, and how.

    `offload`: where the decoder layers' weights wait for their turn; None keeps them in host memory.
    """
    how = raw_modifiers(spec) if scheme is None else scheme  # what is wrong with a recipe is said before loading
    loading = taken_apart(checkpoint.path, offload, trust_remote_code=trust_remote_code)
    try:
        return _quantize(
            loading, checkpoint, out, plan, spec, how, calibration, device, batch_tokens, max_shard_bytes, progress
        )
    finally:
        _release()


def _quantize(
    loading: AbstractContextManager[tuple[PreTrainedModel, LoadedNames]],
    checkpoint: Checkpoint,
    out: Path,
    plan: Targets,
    spec: QuantizeSpec,
    how: QuantizationScheme | list[Any],
    calibration: CalibrationTokens | None,
    device: torch.device,
    batch_tokens: int,
    max_shard_bytes: int,
    progress: Progress,
) -> Quantized:
    """The whole of it; nothing that it returns keeps the model alive. `how`: a scheme, or a raw recipe's modifiers."""
    with loading as (model, names):
        places = place_matrices(model, names, checkpoint, plan)
        wanted = {id(module) for pieces in places.values() for module in pieces.values()}
        ignore = [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) not in wanted
        ]
        modifiers = how if isinstance(how, list) else modifiers_of(spec, how, ignore)
        kinds = {type(modifier).__name__ for modifier in modifiers}
        rows = (
            list(equal_batches(calibration, batch_tokens))
            if calibration is not None and kinds != {"QuantizationModifier"}
            else []
        )
        with (
            count_tokens(model) as counts,
            unchanged_without_rounding(model, rows if "AWQModifier" in kinds else []),
            quiet(),
        ):
            try:
                run_oneshot(model, modifiers, rows, spec, device, progress)
            except (ValueError, NotImplementedError) as error:
                instead = "gptq" if spec.method in ("awq", "autoround") else "rtn"
                raise UnusableError(
                    f"llm-compressor cannot run {' and '.join(sorted(kinds))} on {type(model).__name__}:"
                    f" {str(error)[:300]}. Choose method: {instead}."
                ) from error
        plan, scheme = _as_the_recipe_left_it(model, places, plan) if isinstance(how, list) else (plan, how)
        unseen = (
            set()
            if "GPTQModifier" not in kinds or spec.calibrate_all_experts
            else {
                (path, expert)
                for path, seen in counts.items()
                for expert, tokens in enumerate(seen.tolist())
                if tokens == 0
            }
        )
        _write(checkpoint, out, places, plan, names, model, scheme, unseen, max_shard_bytes, progress)
        facts = _token_facts({} if spec.calibrate_all_experts else counts, rows) if rows else {}
        return Quantized({name: list(places[name]) for name in plan.matrices}, plan, scheme, facts)


def raw_modifiers(spec: QuantizeSpec) -> list[Any]:
    """The modifiers of a raw llm-compressor recipe (a mapping, YAML text, or the path of a file), built by
    llm-compressor's own classes.

    Raises RecipeError with what they say.
    """
    with quiet():
        from llmcompressor.recipe import Recipe

        text = spec.recipe if isinstance(spec.recipe, str) else yaml.safe_dump(spec.recipe, sort_keys=False)
        try:
            modifiers = list(Recipe.create_instance(text).modifiers)
            schemes = [
                scheme
                for modifier in modifiers
                if (config := getattr(modifier, "resolved_config", None)) is not None
                for scheme in config.config_groups.values()
            ]
        except Exception as error:  # pydantic, yaml and lookups: all of them are about the recipe
            raise RecipeError(
                [Problem("quantize.recipe", f"llm-compressor refuses the recipe: {str(error)[:500]}")]
            ) from error
    if not modifiers:
        raise RecipeError(
            [
                Problem(
                    "quantize.recipe",
                    "the recipe holds no modifier. llm-compressor reads stages whose names end in `_stage` and, in"
                    " them, groups whose names end in `_modifiers`.",
                )
            ]
        )
    if any(scheme.weights is not None and not scheme.weights.symmetric for scheme in schemes):
        raise RecipeError(
            [
                Problem(
                    "quantize.recipe",
                    "the recipe stores zero points, which transformers loses when it loads experts. Set"
                    " symmetric: true.",
                )
            ]
        )
    return modifiers


def _as_the_recipe_left_it(
    model: nn.Module, places: Mapping[str, Mapping[str, nn.Linear]], plan: Targets
) -> tuple[Targets, QuantizationScheme]:
    """The matrices that a raw recipe quantized, and the scheme it gave them all."""
    schemes = {name: getattr(module, "quantization_scheme", None) for name, module in model.named_modules()}
    known = {id(module) for pieces in places.values() for module in pieces.values()}
    strange = [name for name, module in model.named_modules() if schemes[name] is not None and id(module) not in known]
    if strange:
        raise RecipeError(
            [
                Problem(
                    "quantize.recipe",
                    f"the recipe quantizes {strange[0]}, which reapkit never does ({len(strange)} such modules:"
                    " routers, heads, gates). Add them to the recipe's ignore.",
                )
            ]
        )
    chosen = {
        name: [scheme for module in pieces.values() if (scheme := getattr(module, "quantization_scheme", None))]
        for name, pieces in places.items()
    }
    found = [scheme for schemes_of in chosen.values() for scheme in schemes_of]
    if not found:
        raise RecipeError(
            [
                Problem(
                    "quantize.recipe",
                    "the recipe quantizes nothing. Give it a quantizing modifier whose targets fit, such as Linear.",
                )
            ]
        )
    if any(scheme.weights != found[0].weights for scheme in found):
        raise RecipeError(
            [
                Problem(
                    "quantize.recipe", "the recipe uses several schemes, and reapkit writes one. Use one config group."
                )
            ]
        )
    scheme = found[0].model_copy(deep=True, update={"targets": ["Linear"]})
    scheme.format = CompressionFormat(infer_module_format(nn.Linear, scheme))
    matrices = {name: matrix for name, matrix in plan.matrices.items() if chosen[name]}
    left = {matrix.module: "the recipe leaves it" for name, matrix in plan.matrices.items() if not chosen[name]}
    return Targets(matrices, {**plan.left, **left}), scheme


def _token_facts(counts: Mapping[str, Tensor], rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    def chosen(limit: int, least: int = 0) -> dict[str, dict[int, int]]:
        return {
            path: few
            for path, seen in counts.items()
            if (few := {expert: tokens for expert, tokens in enumerate(seen.tolist()) if least <= tokens < limit})
        }

    return {
        "calibration_tokens": sum(batch["input_ids"].numel() for batch in rows),
        "few_tokens": FEW_TOKENS,
        "experts_with_few_tokens": chosen(FEW_TOKENS, 1),
        "experts_rounded_to_nearest": chosen(1),
    }


def _write(
    checkpoint: Checkpoint,
    out: Path,
    places: Mapping[str, Mapping[str, nn.Linear]],
    plan: Targets,
    names: LoadedNames,
    model: PreTrainedModel,
    scheme: QuantizationScheme,
    unseen: set[tuple[str, int]],
    max_shard_bytes: int,
    progress: Progress,
) -> None:
    """Packs each quantized linear under its source's name; everything else as the model now holds it, or as the source
    does."""
    from llmcompressor.modeling.moe.linearize import get_linearized_moes

    parameters, experts = parameter_names(model), dict(get_linearized_moes(model))
    forgotten = {id(linear) for path, expert in unseen for linear in experts[path][expert].modules()}

    def pack(prefix: str, linear: nn.Linear, source: Tensor | None) -> dict[str, Tensor]:
        if id(linear) in forgotten and source is not None:
            parts = round_to_nearest(source.to(linear.weight.dtype), scheme)
        else:
            kept = {name: tensor.detach() for name, tensor in linear.named_parameters() if name.startswith("weight")}
            parts = compress(kept, scheme)
            _check_packed(prefix, parts, linear, scheme)
        return {f"{prefix}.{part}": tensor.cpu().contiguous() for part, tensor in parts.items()}

    def replacement(name: str) -> dict[str, Tensor] | None:
        if name in plan.matrices:
            stacked = len(checkpoint.tensors[name].shape) == 3
            return {
                key: tensor
                for prefix, linear in places[name].items()
                for key, tensor in pack(prefix, linear, None if stacked else read_tensor(checkpoint, name)).items()
            }
        left = list(places.get(name, {}).values())
        loaded = names.rename(name)
        if len(left) != 1 and loaded not in parameters:
            return None
        parameter = left[0].weight if len(left) == 1 else model.get_parameter(loaded)
        source = read_tensor(checkpoint, name)
        if parameter.shape != source.shape:
            return None
        changed = parameter.detach().cpu()
        return None if torch.equal(changed, source.to(changed.dtype)) else {name: changed.to(source.dtype).contiguous()}

    with torch.no_grad():
        write_shards(checkpoint, out, replacement, progress, max_shard_bytes)


def _check_packed(prefix: str, parts: dict[str, Tensor], linear: nn.Linear, scheme: QuantizationScheme) -> None:
    """Raises StageFailed where a packed matrix, dequantized, is not what the quantizer decided (to the rounding of its
    dtype)."""
    quantized = cast("_QuantizedLinear", linear)
    decided = fake_quantize(
        quantized.weight,
        quantized.weight_scale,
        cast(Tensor, getattr(quantized, "weight_zero_point", None)),  # None is taken too
        weights_of(quantized.quantization_scheme),
        global_scale=getattr(quantized, "weight_global_scale", None),
    )
    gap = relative_error(decompress(parts, scheme), decided)
    if not gap <= PACKING_TOLERANCE:
        raise StageFailed(
            f"quantize: {prefix} dequantizes to another matrix than the quantizer's (relative difference {gap:.2g})."
            " This is a defect of ours or of compressed-tensors; please report the model and the scheme."
        )


def _release() -> None:
    from llmcompressor.core import reset_session

    with quiet():
        reset_session()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
