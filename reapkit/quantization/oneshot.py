"""Runs llm-compressor's `oneshot` on reapkit's tokens: equal rows, causal attention, one progress line, checked on the
first batch.

llm-compressor's sequential pipeline rebuilds the model's config while it traces and loses the attention implementation
with it; the mask function then returns nothing and eager attention looks at the future. `causal_tracing` keeps it, and
every run proves on its first batch that the first attention layer returns what a plain forward returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from compressed_tensors.quantization import QuantizationScheme, disable_quantization, enable_quantization
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from reapkit.calibration.tokens import CalibrationTokens, batches
from reapkit.core.errors import StageFailed
from reapkit.core.progress import Progress
from reapkit.model.routed_experts import decoder_layers
from reapkit.quantization.dense import relative_error
from reapkit.recipe.schema import QuantizeSpec

if TYPE_CHECKING:
    from transformers import ProcessorMixin

ATTENTION_TOLERANCE = 1e-3
AWQ_TOLERANCE = 0.1


def equal_batches(tokens: CalibrationTokens, batch_tokens: int) -> Iterator[dict[str, Tensor]]:
    """Every row once, batched with rows of its own length, so nothing is padded and nothing truncated; long rows first.

    `input_ids` [rows, tokens] int64, of at most `batch_tokens` tokens or one row; `position_ids` alike where the
    tokens have their own.
    """
    lengths = tokens.row_lengths
    for length in sorted({int(n) for n in lengths if n > 0}, reverse=True):
        rows = [row for row, n in enumerate(lengths) if n == length]
        for batch in batches(tokens, rows, batch_tokens):
            yield {"input_ids": batch.input_ids} | (
                {} if batch.position_ids is None else {"position_ids": batch.position_ids}
            )


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
                index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
                seen += torch.bincount(index.reshape(-1).cpu(), minlength=len(seen))[: len(seen)]

        handles.append(experts.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def modifiers_of(spec: QuantizeSpec, scheme: QuantizationScheme, ignore: list[str]) -> list[Any]:
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


def run_oneshot(
    model: PreTrainedModel,
    modifiers: list[Any],
    rows: list[dict[str, Tensor]],
    spec: QuantizeSpec,
    device: torch.device,
    progress: Progress,
) -> None:
    """Runs llm-compressor's calibration on `rows` with the model's own attention.

    `rows`: batches as `equal_batches` gives them, `input_ids` int64 [rows, tokens] and perhaps `position_ids` alike;
    none of them: data-free. Raises StageFailed where another attention was run.
    """
    from llmcompressor import oneshot  # pyright: ignore[reportPrivateImportUsage]

    layers = decoder_layers(model)[1]
    passes = 1 if spec.method == "autoround" else 2
    with (
        progress.task(
            f"quantize ({spec.method})", total=len(layers) * max(len(rows), 1) * passes, unit="layer batches"
        ) as task,
        _advancing(layers, task),
        causal_tracing(),
        _working_on(device),
        _proven(model, layers, rows),
    ):
        oneshot(
            model=model,
            processor=cast("ProcessorMixin", _NoProcessor()),
            recipe=modifiers,
            dataset=DataLoader(cast("Dataset[dict[str, Tensor]]", rows), batch_size=None) if rows else None,
            num_calibration_samples=max(len(rows), 1),
            moe_calibrate_all_experts=spec.calibrate_all_experts,
            pipeline="sequential" if rows else "datafree",
        )


class _NoProcessor:
    """oneshot wants a processor to save; nothing is saved by it."""

    def save_pretrained(self, directory: str) -> None:
        pass


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
def causal_tracing() -> Iterator[None]:
    """Inside the block llm-compressor's traced configs keep the model's attention implementation."""
    from compressed_tensors.utils import patch_attr
    from llmcompressor.pipelines.sequential.helpers import SequentialTracer
    from transformers import PretrainedConfig

    original = SequentialTracer.create_arg

    def create_arg(self: Any, value: Any) -> Any:
        if isinstance(value, PretrainedConfig):
            settings = {key: self.create_arg(entry) for key, entry in value.to_dict().items()}
            settings["attn_implementation"] = value._attn_implementation
            return self.create_node("call_function", type(value), (), settings)
        return original(self, value)

    with patch_attr(SequentialTracer, "create_arg", create_arg):
        yield


@contextmanager
def _working_on(device: torch.device) -> Iterator[None]:
    """Inside the block layers run on `device`, and nothing needs an accelerator."""
    from compressed_tensors.utils import patch_attr
    from llmcompressor.pipelines.cache import IntermediatesCache
    from llmcompressor.pipelines.sequential import pipeline

    with ExitStack() as stack:
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
    attention = next(
        (
            module
            for layer in layers
            for name, module in layer.named_children()
            if "attn" in name or "attention" in name
        ),
        None,
    )
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
        raise StageFailed(
            f"quantize: calibration ran another attention than the model's own (relative difference {gap:.2g} in the"
            " first attention layer), so its statistics would be wrong. Use method: rtn for this architecture, and"
            " please report it."
        )


@contextmanager
def unchanged_without_rounding(model: PreTrainedModel, rows: list[dict[str, Tensor]]) -> Iterator[None]:
    """Raises StageFailed where the rescaling that awq did changes the model even before anything is rounded, on the
    first of `rows` (`input_ids` int64 [rows, tokens], see `equal_batches`).

    It does where a layer reads a rescaled norm and is not told, such as a router or a shared expert that awq's mappings
    do not know.
    """

    def logits() -> Tensor:
        with torch.no_grad():
            return model(
                **{name: tensor.to(model.device) for name, tensor in rows[0].items()}, use_cache=False
            ).logits.float()

    before = logits() if rows else None
    yield
    if before is None:
        return
    model.apply(disable_quantization)
    gap = relative_error(logits(), before)
    model.apply(enable_quantization)
    if not gap <= AWQ_TOLERANCE:
        raise StageFailed(
            f"quantize: awq's rescaling alone moves the logits by {gap:.2g} of their size: it does not know every layer"
            f" that reads a rescaled norm in {type(model).__name__}. Choose method: gptq."
        )
