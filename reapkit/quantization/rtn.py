"""Quantizes by rounding to nearest, shard by shard: no model is built, and at most one shard is in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from compressed_tensors.entrypoints.convert import Converter
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from safetensors.torch import save_file

from reapkit.checkpoint.architecture import without_quantization
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.atomic_files import replacing, write_text
from reapkit.core.dtypes import torch_dtypes
from reapkit.core.progress import Progress
from reapkit.model.dequantizing import dequantized
from reapkit.model.stored_tensors import PlainTensors
from reapkit.quantization.quiet import quiet
from reapkit.quantization.targets import Targets
from reapkit.quantization.writing import ShardWriter, copy_companions, write_index


def quantize_shards(
    checkpoint: Checkpoint,
    out: Path,
    plan: Targets,
    scheme: QuantizationScheme,
    *,
    device: torch.device,
    max_shard_bytes: int,
    progress: Progress,
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Quantizes every matrix of the plan through llm-compressor's `model_free_ptq`; returns (matrix -> written
    prefixes, facts)."""
    chosen = {name.removesuffix(".weight") for name in plan.matrices}
    weights = {name.removesuffix(".weight") for name in checkpoint.plain.tensors if name.endswith(".weight")}
    others = sorted(weights - chosen)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=others, quantization_status=QuantizationStatus.INITIALIZED
    )
    writer = ShardWriter(checkpoint, out, max_shard_bytes)

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        with writer.shard(path.name) as add:
            add(tensors)

    with progress.task("quantize (rtn)", total=len(checkpoint.shards), unit="shards") as task, quiet():
        from llmcompressor.entrypoints import model_free

        with patch.object(model_free, "save_file", save):
            model_free.model_free_ptq(
                checkpoint.path, out, config=config, device=device, max_workers=1, converter=_Shards(checkpoint, task)
            )
    writer.finish()
    return {name: [name.removesuffix(".weight")] for name in plan.matrices}, {}


def dequantized_copy(checkpoint: Checkpoint, directory: Path, *, progress: Progress) -> Checkpoint:
    """The quantized checkpoint in plain numbers below `directory`, shard by shard, its config saying so."""
    directory.mkdir(parents=True, exist_ok=True)
    copy_companions(checkpoint, directory)
    names: dict[str, list[str]] = {}
    for name, tensor in checkpoint.plain.tensors.items():
        names.setdefault(tensor.shard, []).append(name)
    with (
        PlainTensors(checkpoint) as read,
        progress.task("dequantize the source", total=len(names), unit="shards") as task,
    ):
        for shard, own in names.items():
            with replacing(directory / shard) as partial:
                save_file({name: read(name) for name in own}, partial, metadata={"format": "pt"})
            task.advance()
    write_index(directory)
    plain = without_quantization(checkpoint.config)
    write_text(directory / "config.json", json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
    return Checkpoint.open(directory)


class Dequantizing(Converter):
    """Turns the quantized matrices of a checkpoint into plain ones, where weights keep their names; other tensors pass
    as they are."""

    def __init__(self, checkpoint: Checkpoint):
        self._matrices, self._plain = checkpoint.matrices, checkpoint.plain.tensors
        self._stored = checkpoint.tensors.keys()

    def get_dependencies(self, weight_name: str) -> set[str]:
        matrix = self._matrices.get(weight_name)
        return {part.name for part in matrix.parts.values()} - {weight_name} if matrix is not None else set()

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`tensors` of any shape with their matrices multiplied out, in the dtype that plain ones would have, on the
        meta device their shape alone; scales of activations are left out with those of weights."""
        plain: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            matrix = self._matrices.get(name)
            if matrix is None:
                if name in self._plain or name not in self._stored:
                    plain[name] = tensor
                continue
            dtype = torch_dtypes()[matrix.dense.dtype]
            if tensor.device.type == "meta":
                plain[name] = torch.empty(matrix.dense.shape, dtype=dtype, device="meta")
            else:
                parts = {suffix: tensors[part.name] for suffix, part in matrix.parts.items()}
                plain[name] = dequantized(matrix, parts).to(dtype)
        return plain

    validate = process

    def update_config(self, config: QuantizationConfig | None) -> QuantizationConfig | None:
        return None


class _Shards(Dequantizing):
    """Counts shards as they pass, and dequantizes quantized sources on the way."""

    def __init__(self, checkpoint: Checkpoint, task: Any):
        super().__init__(checkpoint)
        self.task = task

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.task.advance()
        return super().process(tensors)

    def validate(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return super().process(tensors)
