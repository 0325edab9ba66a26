"""Streams a checkpoint: only the embeddings, the head and one or two decoder layers are in memory at a time."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.projection_names import expert_tensor
from reapkit.checkpoint.shard_reader import ShardReader
from reapkit.core.safetensors_header import TensorInfo
from reapkit.model.fitting_class import missing_weights
from reapkit.model.loading import resolved_dtype, skeleton, widened
from reapkit.model.routed_experts import decoder_layers
from reapkit.model.stored_tensors import CheckpointTensors, StoredTensor
from reapkit.model.streaming.device_copies import Accelerator, StagedCopies, accelerator
from reapkit.model.streaming.layer_memory import Arena, Arenas, Event, host_memory
from reapkit.model.streaming.tensor_loading import Filling, Fillings, place_all
from reapkit.model.used_tensors import Conversions


class LayeredModel:
    """The checkpoint's own class with its weights on the meta device, filled and emptied layer by layer.

    `model`: the whole skeleton. `layers`: its decoder layers. After `load_rest()` everything but the layers is on
    `device`. Names and formats are converted as transformers' own mapping says, FP8 and MXFP4 weights are dequantized.
    Two layers that are in memory at once take two blocks of the largest one's size, filled again and again; beside them
    only buffers of a few MB, and for an accelerator two pinned ones of the largest layer's size on the host. (Weights
    that must be permuted or interleaved go through transformers' conversion, which holds up to two more copies of
    theirs meanwhile.) `reading`, where set, is told the shards that are read next.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
    ):
        self.path, self.device = Path(path), torch.device(device)
        _keep_few_kernels()
        self._checkpoint = Checkpoint.open(path)
        self.model = skeleton(self._checkpoint, dtype, trust_remote_code=trust_remote_code)
        self.dtype = resolved_dtype(dtype, self.model.config)
        if self.device.type == "cpu":
            self.model.set_experts_implementation(
                "eager"
            )  # the fastest there, and what a resident model runs: equal bits
        self._conversions = Conversions(self.model)
        self.prefix, self.layers = decoder_layers(self.model)
        self._expected = self._conversions.expected  # on meta: names and shapes
        self._dtype_plan = self.model._get_dtype_plan(self.dtype) or {}
        self._tensors = CheckpointTensors(self._checkpoint)
        self._targets = {key: self._conversions.target(key) for key in self._tensors}
        self._keys = self._keys_by_layer()
        self._plans = Fillings(
            self._tensors,
            self._targets,
            self._expected,
            self._conversions.converters,
            self._dtype_of,
            mapped=self.device.type == "cpu",
        )
        largest = max(sum(filling.nbytes for filling in self._fillings(layer)) for layer in range(len(self.layers)))
        self._accelerator = accelerator(self.device)
        if self._accelerator is None:
            self._arenas = Arenas(largest, host_memory)
        else:
            self._arenas = Arenas(largest, self._accelerator.memory, self._accelerator.mark)
            self._staged = StagedCopies(self._accelerator, largest)
        self._in_use: dict[int, Arena] = {}
        self._copied: dict[int, Event | None] = {}
        self._facts: dict[str, tuple[int, int]] = {}
        self.reading: Callable[[list[str]], None] | None = None
        _rebuild_buffers(self.model, self.device)

    def load_rest(self) -> None:
        """Everything outside the decoder layers: embeddings, norms, head, other towers."""
        self._read(None)
        self.model.tie_weights()
        self._refuse_missing(
            (name, p) for name, p in self.model.named_parameters() if not name.startswith(self.prefix + ".")
        )

    def load(self, layer: int) -> None:
        """Reads decoder layer `layer`. Raises UnusableError where a tensor is missing."""
        self.load_ahead(layer)
        self.use(layer)

    def load_ahead(self, layer: int) -> None:
        """`load` for another thread than the forward's, which must call `use` before it computes with the layer.

        Raises UnusableError where a tensor is missing, ValueError for a layer that is in memory.
        """
        if layer in self._in_use:
            raise ValueError(f"layer {layer} is in memory: drop it before it is read again")
        self._read(layer)
        if self._accelerator is None:
            widened(self.layers[layer], self.dtype)
        self._refuse_missing((f"{self.prefix}.{layer}.{name}", p) for name, p in self.layers[layer].named_parameters())

    def use(self, layer: int) -> None:
        """What this thread gives an accelerator from now on waits for the layer's copy; nothing to do on a CPU."""
        if self._accelerator is not None:
            self._await_copy(self._accelerator, layer)
            widened(self.layers[layer], self.dtype)

    def _await_copy(self, accelerator: Accelerator, layer: int) -> None:
        copied = self._copied.pop(layer, None)
        if copied is not None:
            accelerator.wait(copied)

    def drop(self, layer: int) -> None:
        """Ends the use of what `load` read: its memory is the next layer's, so nothing of it may be read afterwards."""
        _empty(self.layers[layer])
        self.give_back(layer)

    def give_back(self, layer: int) -> None:
        """The part of `drop` for who has put other tensors in the place of all that `load` read."""
        if self._accelerator is not None:  # a copy that nobody waited for must not be overtaken by the block's next one
            self._await_copy(self._accelerator, layer)
        if layer in self._in_use:
            self._arenas.give_back(self._in_use.pop(layer))

    def drop_all(self) -> None:
        """Drops the layers that are in memory, however far their reading came."""
        for layer in list(self._in_use):
            self.drop(layer)

    def as_source(self) -> PreTrainedModel:
        """`model`, told what transformers tells a model that it loads: where it came from, and how its tensors were
        converted."""
        self.model.config.name_or_path = str(self.path)
        vars(self.model)["_weight_conversions"] = self._conversions.entries
        return self.model

    def nbytes(self, layer: int | None) -> int:
        """Bytes on disk of a decoder layer, or (None) of everything else."""
        return sum(tensor.nbytes for tensor in self._on_disk(self._keys.get(layer, [])))

    def _on_disk(self, keys: Iterable[str]) -> Iterator[TensorInfo]:
        for key in keys:
            yield from self._tensors.on_disk(key)

    @property
    def is_quantized(self) -> bool:
        """Whether the checkpoint's weights are dequantized while they are read."""
        return bool(self._checkpoint.matrices)

    def sources_of(self, parameter: str) -> tuple[str | None, dict[int, str]]:
        """The checkpoint tensors that stacked experts' `parameter` is made of: one name for all experts, or one name by
        expert."""
        names = [key for key, (target, _) in self._targets.items() if target == parameter]
        if len(names) == 1:
            return names[0], {}
        return None, {found.expert: name for name in names if (found := expert_tensor(name))}

    def read(self, name: str, entry: int | None = None) -> torch.Tensor:
        """A checkpoint tensor of any shape, or one entry of its first axis, in the dtype it is stored in."""
        with ShardReader(self.path, self._facts) as reader:
            stored = self._tensors.stored(name, reader)
            return stored[...] if entry is None else stored.entries(entry, entry + 1)[0]

    def _keys_by_layer(self) -> dict[int | None, list[str]]:
        """Checkpoint tensors by the decoder layer they become part of; those the model has no place for (MTP blocks)
        are left out.
        """
        inside = re.compile(rf"{re.escape(self.prefix)}\.(\d+)\.")
        keys: dict[int | None, list[str]] = {None: []}
        for key, (target, _) in self._targets.items():
            match = inside.match(target if target in self._expected else key)
            layer = int(match.group(1)) if match else None
            if layer is None or layer < len(self.layers):
                keys.setdefault(layer, []).append(key)
        return keys

    def _read(self, layer: int | None) -> None:
        """The layer's tensors, straight to their place where that is known, the others through transformers' own
        conversion."""
        keys, fillings = self._keys.get(layer, []), self._fillings(layer)
        if self.reading is not None:
            self.reading(sorted({tensor.shard for tensor in self._on_disk(keys)}))
        with ShardReader(self.path, self._facts) as reader, torch.no_grad():
            reader.announce(self._on_disk(keys))
            placed = self._placed(layer, fillings, reader)
            for target, tensor in placed.items():
                _put(self.model, target, tensor)
            done = {key for filling in fillings for key in filling.keys}
            if left := {key: self._tensors.stored(key, reader) for key in keys if key not in done}:
                self._convert(left)

    def _fillings(self, layer: int | None) -> list[Filling]:
        return self._plans.of(self._keys.get(layer, []))

    def _placed(self, layer: int | None, fillings: list[Filling], reader: ShardReader) -> dict[str, Tensor]:
        """The tensors by target, on the device; an accelerator's may still be on their way."""
        nbytes = sum(filling.nbytes for filling in fillings)
        if layer is None:
            return self._placed_for_good(fillings, nbytes, reader)
        if self._accelerator is None:
            self._in_use[layer] = self._arenas.take()
            return place_all(fillings, self._in_use[layer], reader)
        place_all(fillings, Arena(self._staged.buffer()), reader)
        self._in_use[layer] = arena = self._arenas.take()
        self._copied[layer] = self._staged.send(nbytes, arena)
        return _cut(arena, fillings)

    def _placed_for_good(self, fillings: list[Filling], nbytes: int, reader: ShardReader) -> dict[str, Tensor]:
        """In memory of their own."""
        on_host = host_memory(max(1, nbytes))()
        placed = place_all(fillings, Arena(on_host), reader)
        if self._accelerator is None:
            return placed
        block = self._accelerator.memory(nbytes)()
        block.copy_(on_host[:nbytes])
        return _cut(Arena(block), fillings)

    def _dtype_of(self, target: str) -> torch.dtype:
        """As transformers loads it: the skeleton's, except what the class keeps in another."""
        for pattern, dtype in self._dtype_plan.items():
            if re.search(pattern.replace("*", ".*"), target):
                return dtype
        return self._expected[target].dtype

    def _convert(self, tensors: dict[str, StoredTensor]) -> None:
        settings = LoadStateDictConfig(
            weight_mapping=copy.deepcopy(self._conversions.entries),
            dtype=self.dtype,
            device_map={"": self.device},
            dtype_plan=self._dtype_plan,
        )
        with no_progress_bars():
            convert_and_load_state_dict_in_model(model=self.model, state_dict=tensors, load_config=settings)

    def _refuse_missing(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        missing = [name for name, parameter in parameters if parameter.device.type == "meta"]
        if missing:
            raise missing_weights(self.path, self.model, missing)


def _keep_few_kernels() -> None:
    """Up to 32 compiled matrix products stay in memory instead of 1,024 in each of two caches, unless the user set them
    otherwise.

    In bf16 on a CPU every number of tokens that an expert gets is a shape with a kernel of about 0.5 MB, seldom met
    again: together as much as a layer or two. Both are read at a process's first such product; compiling again costs
    less than it takes to measure.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # torch's and oneDNN's own
        os.environ.setdefault(name, "32")


def _put(model: nn.Module, target: str, tensor: Tensor) -> None:
    module, _, name = target.rpartition(".")
    owner = model.get_submodule(module)
    if name in owner._buffers:
        owner._buffers[name] = tensor
    else:
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)


def _empty(layer: nn.Module) -> None:
    """Puts all that is read from disk on the meta device."""
    for module in layer.modules():
        for name, tensor in list(module._parameters.items()):
            if tensor is not None:
                module._parameters[name] = nn.Parameter(tensor.detach().to("meta"), requires_grad=False)
        for name, tensor in list(module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = tensor.to("meta")


def _cut(arena: Arena, fillings: Iterable[Filling]) -> dict[str, Tensor]:
    """The tensors by target, where `place_all` would put them."""
    return {filling.target: arena.tensor(filling.shape, filling.dtype, filling.phase) for filling in fillings}


def _rebuild_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Rotary tables and scales are in no checkpoint: the model's own initialisation computes them, its weights being on
    meta.
    """
    for module in model.modules():
        computed = {
            name: buffer
            for name in module._non_persistent_buffers_set
            if (buffer := module._buffers.get(name)) is not None
        }
        for name, buffer in computed.items():
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if computed:
            with torch.no_grad():
                model._init_weights(module)


@contextmanager
def no_progress_bars():
    """transformers draws none inside the block."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()
