"""Writes a checkpoint with the weights that rounding to nearest in a scheme gives, as plain numbers that any loader
reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from reapkit.checkpoint.architecture import without_quantization
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.atomic_files import write_text
from reapkit.core.progress import SILENT, Progress
from reapkit.model.dequantizing import decompress
from reapkit.quantization.formats import preset, round_to_nearest
from reapkit.quantization.targets import targets
from reapkit.quantization.writing import copy_companions, read_tensor, write_index, write_shards
from reapkit.recipe.schema import QuantizeSpec


def write_rounded(
    source: Checkpoint, spec: QuantizeSpec, out: Path, *, device: str = "cpu", progress: Progress = SILENT
) -> None:
    """Writes `source` to `out` in its own names and shapes, every matrix that `spec` quantizes rounded, packed and
    unpacked again.

    As large as the source in plain numbers; tensors are read one at a time, a shard is held. Equal to quantizing
    with method rtn and dequantizing the result.
    """
    plan, scheme = targets(source, spec), preset(spec)
    stacks = [matrix for matrix in plan.matrices.values() if len(matrix.tensor.shape) == 3]
    inputs_first = any(
        matrix.tensor.shape[2] != matrix.columns for matrix in stacks
    )  # square stacks are as the others of their model
    out.mkdir(parents=True, exist_ok=True)

    def value(name: str) -> dict[str, Tensor] | None:
        if name not in plan.matrices:
            return None
        return {name: rounded(read_tensor(source, name).to(device), scheme, inputs_first).cpu()}

    write_shards(source, out, value, progress)
    copy_companions(source, out)
    plain = without_quantization(source.config)
    write_index(out)
    write_text(out / "config.json", json.dumps(plain, indent=2))


def rounded(tensor: Tensor, scheme: QuantizationScheme, inputs_first: bool = False) -> Tensor:
    """A matrix [rows, columns], or a stack of experts' [experts, rows, columns], as its packed form says, in its own
    shape and dtype.

    `inputs_first`: the stack is [experts, columns, rows]. Rows are rounded by themselves, so the projections that a
    stack holds side by side need not be told apart.
    """
    if tensor.dim() == 2:
        return _there_and_back(tensor, scheme)
    experts = [_there_and_back(each.T.contiguous() if inputs_first else each, scheme) for each in tensor]
    return torch.stack([each.T if inputs_first else each for each in experts]).contiguous()


def _there_and_back(weight: Tensor, scheme: QuantizationScheme) -> Tensor:
    return decompress(round_to_nearest(weight, scheme), scheme).to(weight.dtype)
