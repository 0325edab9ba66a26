"""Lets vLLM serve checkpoints whose layers have different numbers of experts, through the entry point
`vllm.general_plugins`.

While decoder layer N is built, the shared config says layer N's number of experts, exactly as `ragged_modeling` does
for transformers. Checkpoints without `num_routed_experts_per_layer` are not touched.
"""

# vLLM is installed where this runs, not where it is checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def expert_counts(config: Any) -> dict[int, int]:
    """Experts by decoder index; multi-token-prediction blocks continue the decoder's numbers."""
    return dict(enumerate(getattr(config, "num_routed_experts_per_layer", None) or ()))


@contextlib.contextmanager
def expert_count(config: Any, count: int | None) -> Iterator[None]:
    """Inside the block the shared config says `count` experts."""
    fields = config.__dict__
    before = {key: fields[key] for key in COUNT_KEYS if count and isinstance(fields.get(key), int)}
    fields.update(dict.fromkeys(before, count))
    try:
        yield
    finally:
        fields.update(before)


def refuse_unservable(vllm_config: Any) -> None:
    """Raises ValueError for features of vLLM that assume one number of experts for all layers."""
    parallel = vllm_config.parallel_config
    for field in ("enable_eplb", "enable_ep_weight_filter"):
        if getattr(parallel, field, False):
            raise ValueError(
                f"{field} needs the same number of experts in all layers, but this checkpoint has different numbers."
                " Switch it off."
            )
    if getattr(vllm_config.model_config, "quantization", None) in ("mxfp4", "gpt_oss_mxfp4"):
        raise ValueError(
            "vLLM's mxfp4 kernels need the same number of experts in all layers, but this checkpoint has different"
            " numbers. Use a bf16 checkpoint."
        )


def register() -> None:
    """Called by vLLM in each of its processes; a second call changes nothing."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader import base_loader
    from vllm.model_executor.models import utils

    if not hasattr(utils.make_layers, "ragged"):
        original = utils.make_layers
        replacement = _make_layers(original, get_current_vllm_config)
        for module in list(sys.modules.values()):  # modelling files imported the function by name
            if getattr(module, "__name__", "").startswith("vllm.") and vars(module).get("make_layers") is original:
                vars(module)["make_layers"] = replacement
        base_loader.BaseModelLoader.load_model = _load_model(base_loader.BaseModelLoader.load_model)


def _make_layers(original: Callable[..., Any], current: Callable[[], Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make_layers(
        num_hidden_layers: int, layer_fn: Callable[..., Any], prefix: str, *args: Any, **kwargs: Any
    ) -> Any:
        vllm_config = current()
        config = vllm_config.model_config.hf_text_config
        counts = expert_counts(config)
        if not counts:
            return original(num_hidden_layers, layer_fn, prefix, *args, **kwargs)
        refuse_unservable(vllm_config)

        def build(prefix: str, **options: Any) -> Any:
            with expert_count(config, counts.get(int(prefix.rsplit(".", 1)[1]))):
                return layer_fn(prefix=prefix, **options)

        return original(num_hidden_layers, build, prefix, *args, **kwargs)

    vars(make_layers)["ragged"] = True
    return make_layers


def _load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """A draft model of multi-token prediction is built from the target's config, in one call."""

    @functools.wraps(original)
    def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        config = vllm_config.model_config.hf_text_config
        draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
        is_draft = draft is not None and model_config is draft
        count = expert_counts(config).get(getattr(config, "num_hidden_layers", -1)) if is_draft else None
        with expert_count(config, count):
            return original(self, vllm_config, model_config, *args, **kwargs)

    return load_model
