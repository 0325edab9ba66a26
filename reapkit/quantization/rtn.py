"""Quantizes by rounding to nearest, shard by shard: no model is built, and at most one shard is in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from compressed_tensors.entrypoints.convert import Converter
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from safetensors import safe_open
from safetensors.torch import save_file

from reapkit.checkpoint.architecture import quantization_of, without_quantization
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.projection_names import BLOCK_SCALE
from reapkit.core.atomic_files import replacing, write_text
from reapkit.core.progress import Progress
from reapkit.quantization.dense import unblocked
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
    others = sorted({name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight")} - chosen)
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
    """The block-FP8 checkpoint in bf16 below `directory`, shard by shard, its `quantization_config` removed."""
    directory.mkdir(parents=True, exist_ok=True)
    copy_companions(checkpoint, directory)
    converter = BlockFp8(checkpoint)
    with progress.task("dequantize the source", total=len(checkpoint.shards), unit="shards") as task:
        for shard in checkpoint.shards:
            with safe_open(checkpoint.path / shard, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            for name in [name for name in tensors if name.endswith(".weight")]:
                for needed in converter.get_dependencies(name) - set(tensors):
                    with safe_open(checkpoint.path / checkpoint.tensors[needed].shard, "pt") as file:
                        tensors[needed] = file.get_tensor(needed)
            own = {
                name: tensor
                for name, tensor in converter.process(tensors).items()
                if not name.endswith(BLOCK_SCALE) and checkpoint.tensors[name].shard == shard
            }
            with replacing(directory / shard) as partial:
                save_file(own, partial, metadata={"format": "pt"})
            task.advance()
    config = without_quantization(checkpoint.config)
    write_index(directory)
    write_text(directory / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return Checkpoint.open(directory)


class BlockFp8(Converter):
    """Turns block-scaled FP8 weights of a checkpoint into bf16; tensors without a scale pass as they are."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.block = tuple(quantization_of(checkpoint.config).get("weight_block_size") or (128, 128))

    def get_dependencies(self, weight_name: str) -> set[str]:
        scale = f"{weight_name}{BLOCK_SCALE}"
        return {scale} if scale in self.checkpoint.tensors else set()

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`tensors` without their scales: float8 weights [out, in] multiplied out to bf16, on the meta device their
        shape alone; the others, of any shape, as they are."""
        for name in [name for name in tensors if f"{name}{BLOCK_SCALE}" in tensors]:
            scale = tensors.pop(f"{name}{BLOCK_SCALE}")
            if scale.device.type == "meta":
                tensors[name] = torch.empty(tensors[name].shape, dtype=torch.bfloat16, device="meta")
                continue
            tensors[name] = unblocked(tensors[name], scale, self.block)
        return tensors

    validate = process

    def update_config(self, config: QuantizationConfig | None) -> QuantizationConfig | None:
        return None


class _Shards(BlockFp8):
    """Counts shards as they pass, and dequantizes block-FP8 sources on the way."""

    def __init__(self, checkpoint: Checkpoint, task: Any):
        super().__init__(checkpoint)
        self.task = task

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.task.advance()
        return super().process(tensors)

    def validate(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return super().process(tensors)
