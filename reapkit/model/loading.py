"""Loads a model for inference, and splits it into the part that gives final hidden states and the head that gives
logits."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config

from reapkit.core.errors import UnusableError
from reapkit.model.causal_lm import decoder
from reapkit.model.fitting_class import missing_weights
from reapkit.model.ragged_modeling import ragged

RAGGED_KEY = "num_routed_experts_per_layer"

M = TypeVar("M", bound=nn.Module)


def load_model(
    path: str | Path, *, device: str = "cpu", dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The checkpoint's own class in evaluation mode, without gradients, on `device` ("auto": spread over the
    accelerators).

    `dtype`: "auto" (the checkpoint's), "float32", "bfloat16", "float16" or a torch dtype. Block-FP8 and MXFP4 weights
    are dequantized. The experts run by the implementation that is fastest there. Raises UnusableError where the weights
    do not fit the class.
    """
    path = Path(path)
    config = load_config(path, trust_remote_code=trust_remote_code)
    implementation = {} if device != "cpu" else {"experts_implementation": "eager"}
    with warnings.catch_warnings(), _bars_on_terminals():
        warnings.filterwarnings(
            "ignore", message="You passed `quantization_config`"
        )  # that we override how it loads is meant
        model, info = model_class(config, trust_remote_code).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            device_map=device,
            trust_remote_code=trust_remote_code,
            **implementation,
            **dequantized(config),
        )
    if missing := info["missing_keys"]:
        raise missing_weights(path, model, missing)
    return narrow_norms(widened(model.eval().requires_grad_(False), model.dtype))


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


def dequantized(config: transformers.PretrainedConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that turn FP8, MXFP4 and compressed-tensors weights into plain ones; other schemes
    load as they are.
    """
    settings = getattr(config, "quantization_config", None)
    method = _setting(settings, "quant_method")
    if method == "fp8":
        block = _setting(settings, "weight_block_size")
        return {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=block)}
    if method == "mxfp4":
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    if (
        method == "compressed-tensors"
    ):  # else weights are unpacked by a hook on the whole model's forward, which the base model's lacks
        return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    return {}


def _setting(settings: Any, name: str) -> Any:
    """One of a config's quantization settings, which are a dictionary or an object; None where it has none."""
    return settings.get(name) if isinstance(settings, dict) else getattr(settings, name, None)


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
