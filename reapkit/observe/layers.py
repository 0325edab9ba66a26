"""A checkpoint of which only the embeddings, the head and one or two decoder layers are ever in memory."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import get_hf_quantizer

from reapkit.checkpoint import Checkpoint
from reapkit.errors import UnusableError
from reapkit.models import DTYPES, dequantized, load_config, model_class, widened
from reapkit.observe.experts import find_experts


class LayeredModel:
    """The checkpoint's own class with its weights on the meta device, filled and emptied layer by layer.

    `model`: the whole skeleton. `layers`: its decoder layers. After `load_rest()` everything but the layers is on `device`.
    Names and formats are converted by transformers' own mapping, FP8 and MXFP4 weights are dequantized.
    """

    def __init__(
        self, path: str | Path, *, device: str = "cpu", dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
    ):
        self.path, self.device = Path(path), torch.device(device)
        self._checkpoint = Checkpoint.open(path)
        config = load_config(path, trust_remote_code=trust_remote_code)
        settings = dequantized(config).get("quantization_config")
        self._quantizer, config, _ = get_hf_quantizer(config, settings, {"": device}, True, {})
        self.dtype = _resolve(dtype, config)
        self.model = _skeleton(config, self.dtype, trust_remote_code)
        if self._quantizer is not None:
            self._quantizer.preprocess_model(
                model=self.model,
                dtype=self.dtype,
                device_map={"": device},
                use_kernels=False,
                checkpoint_files=[str(self.path / shard) for shard in self._checkpoint.shards],
            )
        self._conversions = get_model_conversion_mapping(self.model, None, self._quantizer)
        first = find_experts(self.model)[0]
        self.prefix = first.name[: re.search(rf"\.{first.layer}\.", first.name).start()]
        self.layers: nn.ModuleList = self.model.get_submodule(self.prefix)
        self._renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        self._expected = self.model.state_dict()  # on meta: names and shapes
        self._keys = self._keys_by_layer()
        _rebuild_buffers(self.model, self.device)

    def load_rest(self) -> None:
        """Everything outside the decoder layers: embeddings, norms, head, other towers."""
        self._load(self._keys[None])
        self.model.tie_weights()
        self._refuse_missing((name, p) for name, p in self.model.named_parameters() if not name.startswith(self.prefix + "."))

    def load(self, layer: int) -> None:
        """Reads decoder layer `layer`; may run in another thread than the forward. Raises UnusableError where a tensor is
        missing.
        """
        self._load(self._keys.get(layer, []))
        widened(self.layers[layer], self.dtype)
        self._refuse_missing((f"{self.prefix}.{layer}.{name}", p) for name, p in self.layers[layer].named_parameters())

    def drop(self, layer: int) -> None:
        """Frees what `load` read."""
        for module in self.layers[layer].modules():
            for name, tensor in list(module._parameters.items()):
                if tensor is not None:
                    module._parameters[name] = nn.Parameter(tensor.detach().to("meta"), requires_grad=False)
            for name, tensor in list(module._buffers.items()):
                if tensor is not None and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = tensor.to("meta")

    def nbytes(self, layer: int | None) -> int:
        """Bytes on disk of a decoder layer, or (None) of everything else."""
        return sum(self._checkpoint.tensors[key].nbytes for key in self._keys.get(layer, []))

    @property
    def is_quantized(self) -> bool:
        """Whether the checkpoint's weights are dequantized while they are read."""
        return self._quantizer is not None

    def sources_of(self, parameter: str) -> tuple[str | None, dict[int, str]]:
        """The checkpoint tensors that stacked experts' `parameter` is made of: one name for all experts, or one name by expert."""
        names = [key for key in self._checkpoint.tensors if self._target(key)[0] == parameter]
        if len(names) == 1:
            return names[0], {}
        return None, {int(match.group(1)): name for name in names if (match := re.search(r"\.experts\.(\d+)\.", name))}

    def read(self, name: str, entry: int | None = None) -> torch.Tensor:
        """A checkpoint tensor, or one entry of its first axis, as it is stored."""
        with safe_open(self.path / self._checkpoint.tensors[name].shard, "pt") as shard:
            return shard.get_tensor(name) if entry is None else shard.get_slice(name)[entry]

    def _keys_by_layer(self) -> dict[int | None, list[str]]:
        """Checkpoint tensors by the decoder layer they become part of; those the model has no place for (MTP blocks) are left
        out.
        """
        inside = re.compile(rf"{re.escape(self.prefix)}\.(\d+)\.")
        keys: dict[int | None, list[str]] = {None: []}
        for key in self._checkpoint.tensors:
            target, _ = self._target(key)
            match = inside.match(target if target in self._expected else key)
            layer = int(match.group(1)) if match else None
            if layer is None or layer < len(self.layers):
                keys.setdefault(layer, []).append(key)
        return keys

    def _target(self, key: str) -> tuple[str, str | None]:
        """The parameter that a checkpoint tensor becomes (part of), and the pattern of the conversion that makes it so."""
        return rename_source_key(key, self._renamings, self._converters, self.model.base_model_prefix, self._expected)

    def _load(self, keys: Iterable[str]) -> None:
        by_shard: dict[str, list[str]] = {}
        for key in keys:
            by_shard.setdefault(self._checkpoint.tensors[key].shard, []).append(key)
        settings = LoadStateDictConfig(
            weight_mapping=copy.deepcopy(self._conversions),
            dtype=self.dtype,
            hf_quantizer=self._quantizer,
            device_map={"": self.device},
            dtype_plan=self.model._get_dtype_plan(self.dtype),
        )
        with (
            ExitStack() as open_shards,
            torch.no_grad(),
            _no_progress_bars(),
        ):  # closed again, so that mapped pages do not pile up
            files = {shard: open_shards.enter_context(safe_open(self.path / shard, "pt")) for shard in by_shard}
            tensors = {key: files[shard].get_slice(key) for shard, names in by_shard.items() for key in names}
            if self._quantizer is None:
                self._fill_stacks(tensors)
            if tensors:
                convert_and_load_state_dict_in_model(model=self.model, state_dict=tensors, load_config=settings)

    def _fill_stacks(self, tensors: dict[str, Any]) -> None:
        """Takes the per-expert tensors that are merely stacked (gate beside up) out of `tensors` and copies each to its place.

        transformers' own conversion gives the same values by stacking and concatenating, at up to three times the memory.
        """
        patterns = {
            pattern: converter
            for converter in self._converters
            if is_stacking(converter)
            for pattern in converter.source_patterns
        }
        stacks: dict[str, dict[str, list[str]]] = {}
        for key in sorted(tensors, key=dot_natural_key):
            target, pattern = self._target(key)
            if pattern in patterns and target in self._expected:
                stacks.setdefault(target, {}).setdefault(pattern, []).append(key)
        for target, parts in stacks.items():
            order = [pattern for pattern in patterns[next(iter(parts))].source_patterns if pattern in parts]
            whole = torch.empty_like(self._expected[target], device=self.device)
            columns = [int(tensors[parts[pattern][0]].get_shape()[0]) for pattern in order]
            if sum(columns) != whole.shape[1] or any(len(parts[pattern]) != whole.shape[0] for pattern in order):
                continue  # an unexpected layout is left to transformers
            for pattern, place in zip(order, whole.split(columns, dim=1), strict=True):
                for expert, key in enumerate(parts[pattern]):
                    place[expert].copy_(tensors.pop(key)[:])
            module, name = target.rsplit(".", 1)
            self.model.get_submodule(module)._parameters[name] = nn.Parameter(whole, requires_grad=False)

    def _refuse_missing(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        missing = [name for name, parameter in parameters if parameter.device.type == "meta"]
        if missing:
            raise UnusableError(
                f"{self.path}: {len(missing)} tensors that {type(self.model).__name__} needs are missing, such as "
                f"{missing[0]}. Download the checkpoint again."
            )


def is_stacking(converter: WeightConverter) -> bool:
    """Does it stack per-expert matrices along a new first axis, with nothing but a concatenation of their rows besides?"""
    kinds = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
    return len(converter.target_patterns) == 1 and kinds in (
        [("MergeModulelist", 0)],
        [("MergeModulelist", 0), ("Concatenate", 1)],
    )


def _resolve(dtype: str | torch.dtype, config: transformers.PretrainedConfig) -> torch.dtype:
    wanted = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if wanted == "auto":
        wanted = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
    return getattr(torch, wanted) if isinstance(wanted, str) else wanted


def _skeleton(config: transformers.PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    cls = model_class(config, trust_remote_code)
    with torch.device("meta"):
        if hasattr(cls, "from_config"):
            model = cls.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        else:
            model = cls._from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def _rebuild_buffers(model: nn.Module, device: torch.device) -> None:
    """Rotary tables and scales are in no checkpoint: the model's own initialisation computes them, its weights being on
    meta.
    """
    for module in model.modules():
        computed = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        for name in computed:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if computed:
            with torch.no_grad():
                model._init_weights(module)


@contextmanager
def _no_progress_bars():
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()
