"""Loads a model for inference, and splits it into the part that gives final hidden states and the head that gives
logits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from reapkit.checkpoint.architecture import QUANTIZATION_KEY
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.readable import require_readable
from reapkit.checkpoint.shard_reader import ShardReader
from reapkit.core.errors import UnusableError
from reapkit.model.causal_lm import decoder
from reapkit.model.fitting_class import missing_weights
from reapkit.model.ragged_modeling import ragged
from reapkit.model.stored_tensors import CheckpointTensors
from reapkit.model.used_tensors import Conversions, on_meta, require_all_used

RAGGED_KEY = "num_routed_experts_per_layer"

M = TypeVar("M", bound=nn.Module)


def load_model(
    path: str | Path, *, device: str = "cpu", dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The checkpoint's own class in evaluation mode, without gradients, on `device` ("auto": spread over the
    accelerators).

    `dtype`: "auto" (the checkpoint's), "float32", "bfloat16", "float16" or a torch dtype. Quantized weights are
    dequantized one matrix at a time, and activations are not rounded. The experts run by the implementation that is
    fastest there. Raises UnusableError where the weights do not fit the class, or cannot all be read.
    """
    path = Path(path)
    checkpoint = Checkpoint.open(path)
    model = skeleton(checkpoint, dtype, trust_remote_code=trust_remote_code)
    implementation = {} if device != "cpu" else {"experts_implementation": "eager"}
    common = dict(output_loading_info=True, device_map=device, **implementation)
    with _bars_on_terminals():
        if checkpoint.quantization:
            model, info = _dequantized(checkpoint, model, common)
        else:
            config = load_config(path, trust_remote_code=trust_remote_code)
            model, info = model_class(config, trust_remote_code).from_pretrained(
                path, config=config, dtype=dtype, trust_remote_code=trust_remote_code, **common
            )
    if missing := info["missing_keys"]:
        raise missing_weights(path, model, missing)
    return narrow_norms(widened(model.eval().requires_grad_(False), model.dtype))


def skeleton(
    checkpoint: Checkpoint, dtype: str | torch.dtype = "auto", *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The checkpoint's own class on the meta device, as if its weights were not quantized; no weight is read.

    Raises UnusableError where the class has no place for a tensor, or a tensor cannot be read.
    """
    require_readable(checkpoint)
    config = plain_config(load_config(checkpoint.path, trust_remote_code=trust_remote_code))
    kind, wanted = model_class(config, trust_remote_code), resolved_dtype(dtype, config)
    model = narrow_norms(on_meta(kind, config, wanted, trust_remote_code))
    conversions = Conversions(model)
    targets = {name: conversions.target(name) for name in checkpoint.plain.tensors}
    require_all_used(model, checkpoint, targets, conversions.expected)
    return model


def _dequantized(
    checkpoint: Checkpoint, empty: PreTrainedModel, common: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with its weights dequantized while transformers takes them, and what transformers says of it."""
    tensors = CheckpointTensors(checkpoint)
    with ShardReader(checkpoint.path) as reader:
        kind = cast(Any, type(empty))  # with loading info it gives two things, which its annotation leaves out
        model, info = kind.from_pretrained(
            None,
            config=empty.config,
            dtype=empty.dtype,
            state_dict={name: tensors.stored(name, reader) for name in tensors},
            **common,
        )
    model.config.name_or_path = str(checkpoint.path)
    if model.can_generate():
        with suppress(OSError):
            model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.path)
    return model, info


def resolved_dtype(dtype: str | torch.dtype, config: transformers.PretrainedConfig) -> torch.dtype:
    """The torch dtype that `load_model`'s argument means for a checkpoint of this config."""
    wanted = dtype
    if wanted == "auto":
        wanted = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
    return getattr(torch, wanted) if isinstance(wanted, str) else wanted


def plain_config(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """The config, told wherever it says otherwise that its weights are not quantized."""
    for section in (config, config.get_text_config()):
        if hasattr(section, QUANTIZATION_KEY):
            delattr(section, QUANTIZATION_KEY)
    return config


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Inside the block transformers draws no progress bars into files and pipes."""
    bars = transformers.utils.logging
    if (sys.stderr is not None and sys.stderr.isatty()) or not bars.is_progress_bar_enabled():
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()


def widened(module: M, dtype: torch.dtype) -> M:
    """`module` without floats narrower than `dtype`: MXFP4 weights always unpack to bfloat16, whatever the rest of the
    model is in.
    """
    for parameter in module.parameters():
        if (
            parameter.is_floating_point()
            and parameter.dtype.itemsize < dtype.itemsize
            and parameter.device.type != "meta"
        ):
            parameter.data = parameter.data.to(dtype)
    return module


def narrow_norms(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with norms that put out its dtype, where the class keeps their weights in float32 (deepseek_v4): the
    linear layers behind them take no other, and those that would cast are dequantized here."""
    dtype = model.dtype
    if dtype != torch.float32 and any("norm" in name for name in model._keep_in_fp32_modules_strict or ()):
        for module in model.modules():
            if type(module).__name__.endswith("Norm") and getattr(module, "weight", None) is not None:
                module.register_forward_hook(lambda module, args, output: output.to(dtype))
    return model


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> transformers.PretrainedConfig:
    """Raises UnusableError where this transformers does not know the model."""
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except ValueError as error:
        kind = json.loads((Path(path) / "config.json").read_text(encoding="utf-8")).get("model_type")
        raise UnusableError(
            f"{path}: transformers {transformers.__version__} cannot read a config of model_type '{kind}' ({error})."
            " Upgrade transformers, or check config.json."
        ) from error


def model_class(config: transformers.PretrainedConfig, trust_remote_code: bool = False) -> type[Any]:
    """The class that the checkpoint names, else the causal LM that transformers has for its config."""
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    if not named or named[0] is None or remote:
        return transformers.AutoModelForCausalLM
    return ragged(named[0]) if getattr(config.get_text_config(), RAGGED_KEY, None) else named[0]


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer."""
    return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


# ---------------------------------------------------------------------------------------------- the two halves


def final_hidden(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """The hidden states that the head reads, [batch, tokens, hidden] in the model's dtype, of `input_ids` and perhaps
    `position_ids` int64 [batch, tokens]. Right padding needs no mask: nothing looks ahead."""
    positions = {} if position_ids is None else {"position_ids": position_ids}
    return decoder(model)(input_ids=input_ids, use_cache=False, **positions)[0]


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits, float32 [positions, vocabulary], of final hidden states [positions, hidden] in the model's dtype.

    The model's own forward runs with its decoder replaced by `hidden`, so scaling and soft-capping of logits are the
    architecture's.
    """
    base = decoder(model)
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    held = base.__dict__.get("forward")
    base.forward = lambda *args, **kwargs: _Final(hidden[None])
    try:
        return model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        if held is None:
            del base.forward
        else:
            base.forward = held


class _Final:
    """A decoder's output that has final hidden states and nothing else."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None
