"""GPTQ, AWQ and AutoRound through llm-compressor's `oneshot`, on our tokens, with causal attention, without padding.

llm-compressor's sequential pipeline rebuilds the model's config while it traces and loses the attention implementation with it; the
mask function then returns nothing and eager attention looks at the future. `_causal` keeps it, and every run proves on its first
batch that the first attention layer returns what a plain forward returns.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme, disable_quantization, enable_quantization, fake_quantize
from torch import Tensor, nn
from torch.utils.data import DataLoader

from reapkit.calibration.tokens import CalibrationTokens, batches
from reapkit.checkpoint import Checkpoint
from reapkit.errors import Problem, RecipeError, StageFailed, UnusableError
from reapkit.models import load_model
from reapkit.progress import Progress
from reapkit.quantize.dense import relative_error
from reapkit.quantize.formats import compress, decompress, round_to_nearest
from reapkit.quantize.names import LoadedNames
from reapkit.quantize.quiet import quiet
from reapkit.quantize.writing import read_tensor, write_shards
from reapkit.recipe.schema import QuantizeSpec
from reapkit.schemes import Matrix, Targets, expert_prefixes

FEW_TOKENS = 128
"""Experts with fewer calibration tokens are named in the report; those with none are rounded to nearest."""
EXPERT = re.compile(r"\.experts\.(\d+)\.")
ATTENTION_TOLERANCE = 1e-3
AWQ_TOLERANCE = 0.1
PACKING_TOLERANCE = 1e-2
"""bf16 keeps 8 bits of a weight that the quantizer computed in float32."""


@dataclass(frozen=True)
class Quantized:
    """What was written: source tensor -> prefixes, what the plan became, the one scheme of it all, facts for the report."""

    written: dict[str, list[str]]
    plan: Targets
    scheme: QuantizationScheme
    facts: dict[str, Any]


def quantize_loaded(checkpoint: Checkpoint, out: Path, plan: Targets, spec: QuantizeSpec, scheme: QuantizationScheme | None,
                    calibration: CalibrationTokens | None, *, device: torch.device, batch_tokens: int, trust_remote_code: bool,
                    progress: Progress) -> Quantized:
    """Quantizes a loaded model and writes it under the source's names. `scheme` None: `spec.recipe` decides what is quantized, and how."""
    with quiet():
        from llmcompressor.modeling.moe.linearize import linearize_moe

        model = load_model(checkpoint.path, trust_remote_code=trust_remote_code)
        names = LoadedNames.of_model(model)
        linearize_moe(model)
    places = place_matrices(model, names, checkpoint, plan)
    wanted = {id(module) for pieces in places.values() for module in pieces.values()}
    ignore = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) not in wanted]
    modifiers = raw_modifiers(spec) if scheme is None else _modifiers(spec, scheme, ignore)
    kinds = {type(modifier).__name__ for modifier in modifiers}
    rows = list(equal_batches(calibration, batch_tokens)) if calibration is not None and kinds != {"QuantizationModifier"} else []
    with count_tokens(model) as counts, _unchanged_without_rounding(model, rows if "AWQModifier" in kinds else []), quiet():
        try:
            _oneshot(model, modifiers, rows, spec, device, progress)
        except (ValueError, NotImplementedError) as error:
            instead = "gptq" if spec.method in ("awq", "autoround") else "rtn"
            raise UnusableError(f"llm-compressor cannot run {' and '.join(sorted(kinds))} on {type(model).__name__}: {str(error)[:300]}. "
                                f"Choose method: {instead}.") from error
    if scheme is None:
        plan, scheme = _as_the_recipe_left_it(model, places, plan)
    unseen = set() if "GPTQModifier" not in kinds or spec.calibrate_all_experts else {
        (path, expert) for path, seen in counts.items() for expert, tokens in enumerate(seen.tolist()) if tokens == 0}
    _write(checkpoint, out, places, plan, names, model, scheme, unseen, progress)
    facts = _token_facts(counts, rows) if rows else {}
    del model
    _release()
    return Quantized({name: list(places[name]) for name in plan.matrices}, plan, scheme, facts)


def raw_modifiers(spec: QuantizeSpec) -> list[Any]:
    """The modifiers of a raw llm-compressor recipe (a mapping, YAML text, or the path of a file), built by llm-compressor's own classes.

    Raises RecipeError with what they say.
    """
    with quiet():
        from llmcompressor.recipe import Recipe

        text = spec.recipe if isinstance(spec.recipe, str) else yaml.safe_dump(spec.recipe, sort_keys=False)
        try:
            modifiers = list(Recipe.create_instance(text).modifiers)
        except Exception as error:  # pydantic, yaml and lookups: all of them are about the recipe
            raise RecipeError([Problem("quantize.recipe", f"llm-compressor refuses it: {str(error)[:500]}")]) from error
    if not modifiers:
        raise RecipeError([Problem("quantize.recipe", "holds no modifier. llm-compressor reads stages whose names end in `_stage` and, in them, "
                                                      "groups whose names end in `_modifiers`.")])
    return modifiers


def _as_the_recipe_left_it(model: nn.Module, places: Mapping[str, Mapping[str, nn.Linear]], plan: Targets) -> tuple[Targets, QuantizationScheme]:
    """The matrices that a raw recipe quantized, and the scheme it gave them all."""
    schemes = {name: getattr(module, "quantization_scheme", None) for name, module in model.named_modules()}
    known = {id(module) for pieces in places.values() for module in pieces.values()}
    strange = [name for name, module in model.named_modules() if schemes[name] is not None and id(module) not in known]
    if strange:
        raise RecipeError([Problem("quantize.recipe", f"quantizes {strange[0]}, which reapkit never does ({len(strange)} such modules: routers, "
                                                      "heads, gates). Add them to the recipe's ignore.")])
    chosen = {name: [module.quantization_scheme for module in pieces.values() if getattr(module, "quantization_scheme", None)]
              for name, pieces in places.items()}
    found = [scheme for schemes_of in chosen.values() for scheme in schemes_of]
    if not found:
        raise RecipeError([Problem("quantize.recipe", "quantizes nothing. Give it a quantizing modifier whose targets fit, such as Linear.")])
    if any(scheme.weights != found[0].weights for scheme in found):
        raise RecipeError([Problem("quantize.recipe", "uses several schemes, and reapkit writes one. Use one config group.")])
    scheme = found[0].model_copy(deep=True, update={"targets": ["Linear"]})
    scheme.format = CompressionFormat(infer_module_format(nn.Linear, scheme))
    matrices = {name: matrix for name, matrix in plan.matrices.items() if chosen[name]}
    left = {matrix.module: "the recipe leaves it" for name, matrix in plan.matrices.items() if not chosen[name]}
    return Targets(matrices, {**plan.left, **left}), scheme


# ---------------------------------------------------------------------------------------------- which module is which tensor


def place_matrices(model: nn.Module, names: LoadedNames, checkpoint: Checkpoint, plan: Targets) -> dict[str, dict[str, nn.Linear]]:
    """Source tensor -> {prefix to write: the linear that holds it}; a stack of experts becomes one prefix per expert and projection.

    Which of an expert's linears is which tensor is decided by value, so no naming habit is trusted. Raises UnusableError where a
    matrix has no counterpart.
    """
    modules = dict(model.named_modules())
    places: dict[str, dict[str, nn.Linear]] = {}
    for name, matrix in plan.matrices.items():
        parameter = names.rename(name)
        if len(matrix.tensor.shape) == 3:
            places[name] = _stack(matrix, modules, parameter)
            continue
        module = modules.get(parameter.removesuffix(".weight"))
        if not isinstance(module, nn.Linear):
            found = EXPERT.search(name)
            expert = modules.get(f"{parameter.rpartition('.')[0]}.{found[1]}") if found else None
            if expert is None:
                raise UnusableError(f"{checkpoint.path}: {name} becomes {parameter} in {type(model).__name__}, which is no linear layer. "
                                    f"Add {matrix.module} to quantize.ignore.")
            module = _by_value(expert, read_tensor(checkpoint, name), name, checkpoint)
        places[name] = {matrix.module: module}
    return places


def _by_value(expert: nn.Module, weight: Tensor, name: str, checkpoint: Checkpoint) -> nn.Linear:
    equal = [module for module in expert.modules() if isinstance(module, nn.Linear) and module.weight.shape == weight.shape
             and torch.equal(module.weight.cpu(), weight.to(module.weight.dtype))]
    if not equal:
        raise UnusableError(f"{checkpoint.path}: no linear layer of the loaded expert holds {name}. transformers converts this "
                            "architecture's experts on loading; quantize it with method: rtn.")
    return equal[0] if len(equal) == 1 else _by_name(expert, equal, name)


def _by_name(expert: nn.Module, equal: list[nn.Linear], name: str) -> nn.Linear:
    """Two projections of one expert with equal values (a fresh or zeroed model): the one that is spelled alike."""
    alike = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    leaf = name.split(".")[-2]
    named = getattr(expert, alike.get(leaf, leaf), None)
    return named if any(module is named for module in equal) else equal[0]


def _stack(matrix: Matrix, modules: Mapping[str, nn.Module], parameter: str) -> dict[str, nn.Linear]:
    """The linears of a stacked expert tensor under the names they are written by."""
    spelled = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    experts = modules[parameter.rpartition(".")[0]]
    pieces: dict[str, nn.Linear] = {}
    for prefix in expert_prefixes(matrix):
        index, projection = prefix.split(".")[-2:]
        pieces[prefix] = getattr(experts[int(index)], spelled.get(projection, projection))
    return pieces


# ---------------------------------------------------------------------------------------------- calibration


def equal_batches(tokens: CalibrationTokens, batch_tokens: int) -> Iterator[dict[str, Tensor]]:
    """Every row once, batched with rows of its own length, so nothing is padded and nothing truncated; long rows first."""
    lengths = tokens.row_lengths
    for length in sorted({int(n) for n in lengths if n > 0}, reverse=True):
        rows = [row for row, n in enumerate(lengths) if n == length]
        for batch in batches(tokens, rows, batch_tokens):
            yield {"input_ids": batch.input_ids} | ({} if batch.position_ids is None else {"position_ids": batch.position_ids})


@contextmanager
def count_tokens(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Calibration tokens per expert of every linearised experts module, int64 [experts], by module path."""
    from llmcompressor.modeling.moe.linearize import get_linearized_moes
    from llmcompressor.modifiers.utils.hooks import HooksMixin

    counts: dict[str, Tensor] = {}
    handles = []
    for path, experts in get_linearized_moes(model):
        counts[path] = torch.zeros(experts.num_experts, dtype=torch.int64)

        def hook(module: nn.Module, args: tuple, kwargs: dict, seen: Tensor = counts[path]) -> None:
            if not HooksMixin._HOOKS_DISABLED:  # the second pass only carries quantized activations onwards
                index = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
                seen += torch.bincount(index.reshape(-1).cpu(), minlength=len(seen))[:len(seen)]

        handles.append(experts.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _modifiers(spec: QuantizeSpec, scheme: QuantizationScheme, ignore: list[str]) -> list[Any]:
    groups = {"group_0": scheme.model_copy(deep=True)}
    if spec.method == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(config_groups=groups, ignore=ignore)]
    from llmcompressor.modifiers.quantization import QuantizationModifier

    if spec.method == "awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier

        return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=ignore)]
    if spec.method == "autoround":
        from llmcompressor.modifiers.autoround import AutoRoundModifier

        return [AutoRoundModifier(config_groups=groups, ignore=ignore, enable_torch_compile=torch.cuda.is_available())]
    return [QuantizationModifier(config_groups=groups, ignore=ignore)]


def _oneshot(model: nn.Module, modifiers: list[Any], rows: list[dict[str, Tensor]], spec: QuantizeSpec, device: torch.device,
             progress: Progress) -> None:
    from llmcompressor import oneshot

    layers = decoder_layers(model)
    passes = 1 if spec.method == "autoround" else 2
    with progress.task(f"quantize ({spec.method})", total=len(layers) * max(len(rows), 1) * passes, unit="layer batches") as task, \
            _advancing(layers, task), _causal(device), _proven(model, layers, rows):
        oneshot(model=model, processor=_NoProcessor(), recipe=modifiers, dataset=DataLoader(rows, batch_size=None) if rows else None,
                num_calibration_samples=max(len(rows), 1), moe_calibrate_all_experts=spec.calibrate_all_experts,
                pipeline="sequential" if rows else "datafree")


class _NoProcessor:
    """oneshot wants a processor to save; nothing is saved by it."""

    def save_pretrained(self, directory: str) -> None:
        pass


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers."""
    count = model.config.get_text_config().num_hidden_layers
    return next(module for name, module in model.named_modules()
                if isinstance(module, nn.ModuleList) and len(module) == count and name.endswith("layers"))


@contextmanager
def _advancing(layers: nn.ModuleList, task: Any) -> Iterator[None]:
    def hook(index: int) -> Any:
        return lambda module, args, output: (task.advance(), task.note(f"layer {index}"), None)[2]

    handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _causal(device: torch.device) -> Iterator[None]:
    """Inside the block traced configs keep their attention implementation, layers run on `device`, and nothing needs an accelerator."""
    from compressed_tensors.utils import patch_attr
    from llmcompressor.pipelines.cache import IntermediatesCache
    from llmcompressor.pipelines.sequential import helpers, pipeline
    from transformers import PretrainedConfig

    original = helpers.SequentialTracer.create_arg

    def create_arg(self: Any, value: Any) -> Any:
        if isinstance(value, PretrainedConfig):
            settings = {key: self.create_arg(entry) for key, entry in value.to_dict().items()}
            settings["attn_implementation"] = value._attn_implementation
            return self.create_node("call_function", type(value), (), settings)
        return original(self, value)

    with ExitStack() as stack:
        stack.enter_context(patch_attr(helpers.SequentialTracer, "create_arg", create_arg))
        stack.enter_context(patch_attr(pipeline, "get_main_device", lambda: device))
        if not torch.accelerator.is_available():  # awq pins memory for transfers that do not happen here
            stack.enter_context(patch_attr(IntermediatesCache, "pin_memory", lambda self, *args: None))
        yield


class _Seen(Exception):
    """The first attention layer's output was taken."""


@contextmanager
def _proven(model: nn.Module, layers: nn.ModuleList, rows: list[dict[str, Tensor]]) -> Iterator[None]:
    """Raises StageFailed where the first calibration batch meets another attention than a plain forward's.

    Compared is the first attention module's output on the first batch, before anything is quantized.
    """
    attention = next((module for layer in layers for name, module in layer.named_children()
                      if "attn" in name or "attention" in name), None)
    if not rows or attention is None:
        yield
        return
    taken: list[Tensor] = []

    def take(module: nn.Module, args: Any, output: Any) -> None:
        if not taken:
            taken.append((output[0] if isinstance(output, tuple) else output).detach().float().cpu())

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        take(module, args, output)
        raise _Seen

    handle = attention.register_forward_hook(stop)
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model(**{name: tensor.to(device) for name, tensor in rows[0].items()}, use_cache=False)
    except _Seen:
        pass
    finally:
        handle.remove()
    expected = taken.pop()
    handle = attention.register_forward_hook(take)
    try:
        yield
    finally:
        handle.remove()
    gap = ((taken[0] - expected).norm() / expected.norm()).item()
    coarse = {torch.bfloat16: 2e-2, torch.float16: 5e-3}.get(next(model.parameters()).dtype, ATTENTION_TOLERANCE)
    if not gap <= coarse:
        raise StageFailed(f"quantize: calibration met another attention than the model's own (relative difference {gap:.2g} in the first "
                          "attention layer), so its statistics would be wrong. Use method: rtn for this architecture, and please report it.")


@contextmanager
def _unchanged_without_rounding(model: nn.Module, rows: list[dict[str, Tensor]]) -> Iterator[None]:
    """Raises StageFailed where the rescaling that awq did changes the model even before anything is rounded.

    It does where a layer reads a rescaled norm and is not told, such as a router or a shared expert that awq's mappings do not know.
    """
    def logits() -> Tensor:
        with torch.no_grad():
            return model(**{name: tensor.to(model.device) for name, tensor in rows[0].items()}, use_cache=False).logits.float()

    before = logits() if rows else None
    yield
    if before is None:
        return
    model.apply(disable_quantization)
    gap = relative_error(logits(), before)
    model.apply(enable_quantization)
    if not gap <= AWQ_TOLERANCE:
        raise StageFailed(f"quantize: awq's rescaling alone moves the logits by {gap:.2g} of their size: it does not know every layer that "
                          f"reads a rescaled norm in {type(model).__name__}. Choose method: gptq.")


def _token_facts(counts: Mapping[str, Tensor], rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    def chosen(limit: int, least: int = 0) -> dict[str, dict[int, int]]:
        return {path: few for path, seen in counts.items()
                if (few := {expert: tokens for expert, tokens in enumerate(seen.tolist()) if least <= tokens < limit})}

    return {"calibration_tokens": sum(batch["input_ids"].numel() for batch in rows), "few_tokens": FEW_TOKENS,
            "experts_with_few_tokens": chosen(FEW_TOKENS, 1), "experts_rounded_to_nearest": chosen(1)}


# ---------------------------------------------------------------------------------------------- writing


def _write(checkpoint: Checkpoint, out: Path, places: Mapping[str, Mapping[str, nn.Linear]], plan: Targets, names: LoadedNames,
           model: nn.Module, scheme: QuantizationScheme, unseen: set[tuple[str, int]], progress: Progress) -> None:
    """Packs each quantized linear under its source's name; everything else as the model now holds it, or as the source does."""
    parameters = dict(model.named_parameters())
    forgotten = {id(linear) for path, expert in unseen for linear in model.get_submodule(path)[expert].modules()}

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
            return {key: tensor for prefix, linear in places[name].items()
                    for key, tensor in pack(prefix, linear, None if stacked else read_tensor(checkpoint, name)).items()}
        left = list(places.get(name, {}).values())
        parameter = left[0].weight if len(left) == 1 else parameters.get(names.rename(name))
        if parameter is None:
            return None
        source = read_tensor(checkpoint, name)
        if parameter.shape != source.shape:
            return None
        changed = parameter.detach().cpu()
        return None if torch.equal(changed, source.to(changed.dtype)) else {name: changed.to(source.dtype).contiguous()}

    with torch.no_grad():
        write_shards(checkpoint, out, replacement, progress)


def _check_packed(prefix: str, parts: dict[str, Tensor], linear: nn.Linear, scheme: QuantizationScheme) -> None:
    """Raises StageFailed where a packed matrix, dequantized, is not what the quantizer decided (to the rounding of its dtype)."""
    decided = fake_quantize(linear.weight, linear.weight_scale, getattr(linear, "weight_zero_point", None),
                            linear.quantization_scheme.weights, global_scale=getattr(linear, "weight_global_scale", None))
    gap = relative_error(decompress(parts, scheme), decided)
    if not gap <= PACKING_TOLERANCE:
        raise StageFailed(f"quantize: {prefix} dequantizes to another matrix than the quantizer's (relative difference {gap:.2g}). This is "
                          "a defect of ours or of compressed-tensors; please report the model and the scheme.")


def _release() -> None:
    from llmcompressor.core import reset_session

    with quiet():
        reset_session()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
