"""Loads a model for `oneshot`, with one linear layer per expert and projection: in host memory, or with its decoder
layers on disk.

On disk a layer is read when its turn comes and written back as the quantizer leaves it, by compressed-tensors' own
offloading; what is computed is the same to the bit. The model is never whole in memory: it is read, taken apart and put
on disk a layer at a time.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.offload.cache import DiskCache
from compressed_tensors.offload.module import offload_module, remove_module_offload
from torch import nn
from transformers import PreTrainedModel

from reapkit.core.atomic_files import naming
from reapkit.model.loaded_names import LoadedNames
from reapkit.model.loading import load_model
from reapkit.model.streaming.layers import LayeredModel
from reapkit.quantization.quiet import quiet

if TYPE_CHECKING:
    from llmcompressor.modeling.moe.helpers import FusedExpertsProtocol


@contextmanager
def taken_apart(
    path: Path, offload: Path | None = None, *, trust_remote_code: bool = False
) -> Iterator[tuple[PreTrainedModel, LoadedNames]]:
    """The checkpoint's model with its routed experts as lists of linear layers, and the names its parameters had before
    that.

    `offload`: a directory for the decoder layers' weights, emptied first and gone after the block; None keeps all of
    them in host memory. The model has no weights after the block, whoever still holds it.
    """
    if offload is not None:
        shutil.rmtree(offload, ignore_errors=True)  # what a killed run left
        offload.mkdir(parents=True)
    model = None
    try:
        with naming(offload) if offload is not None else nullcontext():
            with quiet():
                model, names = (
                    _in_memory(path, trust_remote_code)
                    if offload is None
                    else _on_disk(path, offload, trust_remote_code)
                )
            yield model, names
    finally:
        if model is not None:
            _empty(model)
        if offload is not None:
            _forget(offload)
            shutil.rmtree(offload, ignore_errors=True)


def _in_memory(path: Path, trust_remote_code: bool) -> tuple[PreTrainedModel, LoadedNames]:
    from llmcompressor.modeling.moe.linearize import linearize_moe

    model = load_model(path, trust_remote_code=trust_remote_code)
    names = LoadedNames.of_model(model)
    return linearize_moe(model), names


def _on_disk(path: Path, offload: Path, trust_remote_code: bool) -> tuple[PreTrainedModel, LoadedNames]:
    layered = LayeredModel(path, trust_remote_code=trust_remote_code)
    names = LoadedNames.of_model(layered.model)
    layered.load_rest()
    for index, layer in enumerate(layered.layers):
        layered.load(index)
        with torch.no_grad():
            _take_apart(layer, layered.model)
            for module in layer.modules():
                remove_module_offload(module)  # llm-compressor gives every expert an offload of its own, to where it is
                offload_module(module, "cpu", "disk", offload_dir=str(offload))
        layered.give_back(index)
        _give_back()
    return layered.model, names


def _give_back() -> None:
    """What is free goes back to the system: glibc would keep most of every layer that was taken apart, in pieces that
    fit no other."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _take_apart(layer: nn.Module, model: PreTrainedModel) -> None:
    """One layer's part of llm-compressor's `linearize_moe`, which only knows whole models."""
    from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
    from llmcompressor.modeling.moe.linearize import get_non_linearized_moes

    for name, module in get_non_linearized_moes(layer):
        experts = cast("FusedExpertsProtocol", module)
        kind = LinearExperts2D.get_linear_experts_cls(type(experts))
        layer.set_submodule(name, kind.from_experts_module(experts, getattr(experts, "config", model.config)))


def _empty(model: nn.Module) -> None:
    """Lets go of all weights: the libraries keep the model itself after a calibration."""
    for module in model.modules():
        module._parameters, module._buffers = {}, {}


def _forget(offload: Path) -> None:
    """compressed-tensors remembers every offloaded tensor for as long as the process lives."""
    own = str(offload.resolve())
    for tensor in [
        tensor for tensor, entry in DiskCache.index.items() if str(entry["safetensors_file"]).startswith(own)
    ]:
        del DiskCache.index[tensor]


def parameter_names(model: nn.Module) -> set[str]:
    """The names of all parameters; nothing is read from disk."""
    with disable_onloading():
        return {name for name, _ in model.named_parameters()}
