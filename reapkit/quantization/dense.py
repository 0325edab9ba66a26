"""Dequantizes a quantized directory into plain weights with the source's names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from safetensors import safe_open
from torch import Tensor

from reapkit.checkpoint.architecture import without_quantization
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.projection_names import COMPRESSED_PARTS
from reapkit.core.atomic_files import write_text
from reapkit.core.progress import SILENT, Progress
from reapkit.model.dequantizing import decompress
from reapkit.model.stored_tensors import PlainTensors
from reapkit.quantization.formats import scheme_on_disk
from reapkit.quantization.targets import Matrix, Targets, expert_prefixes, targets
from reapkit.quantization.writing import copy_companions, write_index, write_shards
from reapkit.recipe.schema import QuantizeSpec


class PackedDirectory:
    """Reads a quantized directory against the source it was made from, one matrix at a time."""

    def __init__(self, source: Checkpoint, directory: Checkpoint, plan: Targets):
        self.source, self.directory, self.plan = source, directory, plan
        self.scheme: QuantizationScheme = scheme_on_disk(directory.config)
        self._files = ExitStack()
        self._source = self._files.enter_context(PlainTensors(source))
        self._open: dict[tuple[str, str], Any] = {}

    def __enter__(self) -> PackedDirectory:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """One tensor of any shape, in the shape and dtype in which it is stored."""
        shard = (str(checkpoint.path), checkpoint.tensors[name].shard)
        if shard not in self._open:
            self._open[shard] = self._files.enter_context(safe_open(checkpoint.path / shard[1], "pt"))
        return self._open[shard].get_tensor(name)

    def parts(self, prefix: str) -> dict[str, Tensor]:
        """The stored parts of one matrix [out, in] by name (`formats.PARTS`), in their stored shapes and dtypes; empty
        where there are none."""
        names = {part: f"{prefix}.{part}" for part in COMPRESSED_PARTS if f"{prefix}.{part}" in self.directory.tensors}
        return {part: self.read(self.directory, name) for part, name in names.items()}

    def expected(self, name: str) -> list[str]:
        """The names that stand for a source tensor's matrices."""
        matrix = self.plan.matrices[name]
        return [matrix.module] if len(matrix.tensor.shape) == 2 else expert_prefixes(matrix)

    def dense(self, name: str) -> Tensor:
        """The source tensor `name` as its packed form says, in the source's dtype and shape: a matrix [out, in], or
        experts stacked [experts, ...]."""
        source = self.source_dense(name)
        pieces = [decompress(self.parts(prefix), self.scheme).to(source.dtype) for prefix in self.expected(name)]
        return pieces[0] if len(source.shape) == 2 else _restacked(pieces, self.plan.matrices[name], source)

    def source_dense(self, name: str) -> Tensor:
        """The source tensor itself, of any shape, in its dtype; of a quantized source as its plain form has it."""
        return self._source(name)

    def state_dict(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the source's plain form, of any shape, in its shape: the quantized ones dequantized to the
        source's dtype, the others as the directory holds them."""
        for name in self.source.plain.tensors:
            if name in self.plan.matrices:
                yield name, self.dense(name)
            elif name in self.directory.tensors:
                yield name, self.read(self.directory, name)
            else:
                yield name, self.source_dense(name)


def write_dense(source: Path, directory: Path, spec: QuantizeSpec, out: Path, progress: Progress = SILENT) -> None:
    """Writes to `out` the source with the weights that the packed directory stands for: a plain checkpoint that any
    loader reads.

    For looking at a result whose format this transformers cannot read, or whose model does not fit into memory; shard
    by shard.
    """
    old, new = Checkpoint.open(source), Checkpoint.open(directory)
    plan = targets(old, spec)
    out.mkdir(parents=True, exist_ok=True)
    with PackedDirectory(old, new, plan) as packed:

        def value(name: str) -> dict[str, Tensor]:
            if name in plan.matrices:
                return {name: packed.dense(name)}
            return {name: packed.read(new, name) if name in new.tensors else packed.source_dense(name)}

        write_shards(old, out, value, progress)
    copy_companions(old, out)
    write_index(out)
    plain = without_quantization(old.config)
    write_text(out / "config.json", json.dumps(plain, indent=2))


def relative_error(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖ of two tensors of one shape (any shape and dtype), in float32; 0 for two
    zeros."""
    difference, size = (value.float() - reference.float()).norm().item(), reference.float().norm().item()
    return difference / size if size else float(difference > 0)


def _restacked(pieces: list[Tensor], matrix: Matrix, source: Tensor) -> Tensor:
    """Experts' projections as the source stacks them. Which way round it does (outputs first, gate and up interleaved)
    shows in the values: the arrangement nearest to the source is the one."""
    experts = source.shape[0]
    per_expert = len(pieces) // experts
    candidates = []
    if per_expert == 1:
        plain = torch.stack(pieces)
        candidates = [plain, plain.transpose(1, 2)]
    else:
        gate, up = torch.stack(pieces[0::2]), torch.stack(pieces[1::2])
        halves, interleaved = torch.cat([gate, up], 1), torch.stack([gate, up], 2).flatten(1, 2)
        candidates = [halves, interleaved, halves.transpose(1, 2), interleaved.transpose(1, 2)]
    fitting = [candidate for candidate in candidates if candidate.shape == source.shape]
    return min(fitting, key=lambda candidate: relative_error(candidate, source)).contiguous()
