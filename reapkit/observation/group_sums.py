"""Stores the partial sums of row groups on disk and adds them in group order, so that a resumed run gives the same
bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reapkit.core.dtypes import BITS
from reapkit.observation.observation import MAXIMA, SNAPSHOTS
from reapkit.observation.partial_files import load_partial, save_by_rename


class Partials:
    """The finished row groups of one observation under `directory`."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def has(self, group: int) -> bool:
        return self._file(group).exists()

    def write(self, group: int, tensors: Mapping[str, Tensor]) -> None:
        """A group's statistics, as `GroupSums.tensors` gives them (SUMS float64 [L, S, E] and so on), are complete on
        disk or not there."""
        save_by_rename(tensors, self._file(group))

    def total(self, groups: Iterable[int], snapshots: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All statistics of the groups in the shapes and dtypes they were written in, added in the given order; and the
        SNAPSHOTS float64 [stages, L, S, E] after `snapshots[stage]` groups.
        """
        total: dict[str, Tensor] = {}
        taken: dict[int, dict[str, Tensor]] = {}
        for done, group in enumerate(groups, start=1):
            part = load_partial(self._file(group))
            for name, tensor in part.items():
                if name in total:
                    total[name] = torch.maximum(total[name], tensor) if name in MAXIMA else total[name] + tensor
                else:
                    total[name] = tensor
            if done in snapshots:
                taken[done] = {name: total[name] for name in SNAPSHOTS}
        nothing = {name: torch.zeros_like(total[name]) for name in SNAPSHOTS}
        return total, {name: torch.stack([taken.get(done, nothing)[name] for done in snapshots]) for name in SNAPSHOTS}

    def _file(self, group: int) -> Path:
        return self.directory / f"group-{group:05d}.safetensors"


def trace_header(layers: Sequence[int], top_k: int, positions: int) -> dict[str, Any]:
    """The safetensors header of a trace; float32 tensors first, so that all are aligned."""
    shapes = {"p": ("F32", [positions]), "h": ("F32", [positions])}
    shapes |= {f"gate_norm.{layer}": ("F32", [positions, top_k]) for layer in layers}
    shapes |= {"source": ("I16", [positions])} | {f"expert.{layer}": ("I16", [positions, top_k]) for layer in layers}
    header, offset = {}, 0
    for name, (dtype, shape) in shapes.items():
        end = offset + prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return header


def trace_nbytes(num_layers: int, top_k: int, positions: int) -> int:
    """Bytes of an exact trace."""
    return positions * (4 + 4 + 2 + num_layers * top_k * (4 + 2))
