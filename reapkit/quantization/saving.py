"""Saves a model that llm-compressor quantized, with the tensor names and the config of its source."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from reapkit.checkpoint.architecture import Architecture
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.projection_names import LINEARISED, SPELLINGS, Role, expert_tensor
from reapkit.core.atomic_files import replacing, write_text
from reapkit.core.errors import UnusableError
from reapkit.model.routed_experts import find_experts
from reapkit.pruning.config_edits import Counts, config_edits, edit_json
from reapkit.quantization.writing import quantized_at, write_index

COMPLETE = ({Role.GATE, Role.UP, Role.DOWN}, {Role.UP, Role.DOWN})
"""What one expert's matrices do together, with and without a gate."""


def save_as_the_source(model: PreTrainedModel) -> None:
    """From now on `model.save_pretrained` writes tensors and config as the checkpoint that the model came from spells
    them.

    Call it on a model that `oneshot` has prepared. Stacked experts are stacked again unless they are quantized, for
    which no stacked format exists. Raises UnusableError where the source spells its experts in a way that is not known,
    now and not after the calibration.
    """
    source = Checkpoint.open(_source_of(model))
    spelling = _spelling(source)
    stacked = not any(map(expert_tensor, source.tensors))
    save = model.save_pretrained

    @functools.wraps(save)
    def save_pretrained(save_directory: str | Path, **settings: Any) -> None:
        if stacked and not _quantized_experts(model):
            _stack_again(model)
        save(save_directory, **settings)
        _respell(Path(save_directory), spelling)
        _config(Path(save_directory), source, model)

    vars(save_pretrained)["_overridden"] = True  # llm-compressor would wrap it once more
    vars(model)["save_pretrained"] = save_pretrained


def _source_of(model: PreTrainedModel) -> Path:
    name = model.config._name_or_path
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError) as error:
        raise UnusableError(
            f"'{name}', which the model was loaded from, is neither a directory nor in the hub's cache, so its tensor"
            " names are not known. Load the model from a directory."
        ) from error


def _spelling(source: Checkpoint) -> dict[str, str]:
    """llm-compressor's names of an expert's matrices -> the source's; empty where they are the same."""
    words = {found.matrix for name in source.tensors if (found := expert_tensor(name))}
    if not words:
        return {}
    for row in SPELLINGS.values():
        if row.expert_axis is None and {row.matrices.get(word) for word in words} in COMPLETE:
            ours = {LINEARISED.word(role): word for word, role in row.matrices.items()}
            return {} if all(word == its_own for word, its_own in ours.items()) else ours
    raise UnusableError(
        f"{source.path}: the experts' matrices are called {', '.join(sorted(words))}; which of them is"
        f" {', '.join(list(LINEARISED.matrices)[:-1])} and {list(LINEARISED.matrices)[-1]} is not known. Prune with"
        " `reapkit prune`, which keeps names as they are."
    )


def _quantized_experts(model: nn.Module) -> bool:
    return any(
        getattr(module, "quantization_scheme", None) is not None
        for site in find_experts(model)
        for module in site.module.modules()
    )


@torch.no_grad()
def _stack_again(model: PreTrainedModel) -> None:
    """llm-compressor's own `repack_moe`, and what it forgets: gpt_oss has gate and up in alternating columns, not in
    halves."""
    from llmcompressor.modeling.moe.linear_experts import ExpertMLPWithGate
    from llmcompressor.modeling.moe.linearize import get_linearized_moes, repack_moe

    halved = [
        name
        for name, experts in get_linearized_moes(model)
        if not experts.is_concatenated
        and experts.has_gate
        and experts.expert_cls_with_gate is not ExpertMLPWithGate
        and issubclass(experts.expert_cls_with_gate, ExpertMLPWithGate)
        and experts.expert_cls_with_gate.copy_to_experts_module is ExpertMLPWithGate.copy_to_experts_module
    ]
    repack_moe(model)
    for name in halved:
        experts = model.get_submodule(name)
        for word in ("gate_up_proj", *(["gate_up_proj_bias"] if experts.has_bias else [])):
            tensor = experts.get_parameter(word)
            gate, up = tensor.detach().clone().chunk(2, dim=-1)
            tensor.copy_(torch.stack([gate, up], dim=-1).flatten(-2))


def _respell(directory: Path, spelling: dict[str, str]) -> None:
    if not spelling:
        return
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors = {_spelled(name, spelling): file.get_tensor(name) for name in file.keys()}
        with replacing(shard) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
    write_index(directory)


def _spelled(name: str, spelling: dict[str, str]) -> str:
    found = expert_tensor(name)
    if found is None or found.matrix not in spelling:
        return name
    return f"{found.before}{found.expert}.{spelling[found.matrix]}.{found.part}"


def _config(directory: Path, source: Checkpoint, model: nn.Module) -> None:
    """The source's own config with the new counts, and the `quantization_config` that llm-compressor wrote."""
    architecture = Architecture.from_config(source.config)
    kept = find_experts(model)[0].num_experts
    top_k = architecture.num_experts_per_tok
    counts = Counts(
        (architecture.num_experts, kept), (top_k, top_k), architecture.n_group, drop_mtp=True
    )  # loaded models have no MTP block
    edits = config_edits(source.config, counts, lambda name: name)
    written = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in written:
        edits[quantized_at(source)] = written["quantization_config"]
    write_text(directory / "config.json", edit_json((source.path / "config.json").read_text(encoding="utf-8"), edits))
