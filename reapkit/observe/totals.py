"""A streamed pass's sums: one file per layer, added in group order, stacked to the whole at the end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.observation import MAXIMA, SNAPSHOTS
from reapkit.observe.session import Session


class RunningTotal:
    """A layer's statistics over the row groups so far, added in group order; snapshots where they fall."""

    def __init__(self, tensors: dict[str, Tensor], snapshots: Sequence[int]):
        self.tensors, self.snapshots = tensors, snapshots

    @classmethod
    def after(cls, file: Path, snapshots: Sequence[int]) -> RunningTotal:
        """Going on from an earlier wave's file, if there is one."""
        return cls(load_file(file) if file.exists() else {}, snapshots)

    def add(self, group: int, part: dict[str, Tensor]) -> None:
        for name, tensor in part.items():
            if name in self.tensors:
                tensor = torch.maximum(self.tensors[name], tensor) if name in MAXIMA else self.tensors[name] + tensor
            self.tensors[name] = tensor
        for stage, done in enumerate(self.snapshots):
            if done == group + 1:
                self.tensors |= {f"snapshot.{stage}.{name}": self.tensors[name].clone() for name in SNAPSHOTS}

    def save(self, file: Path) -> None:
        save_by_rename(self.tensors, file)


def save_by_rename(tensors: Mapping[str, Tensor], file: Path) -> None:
    """A file that exists is complete."""
    temporary = file.with_suffix(".writing")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    os.replace(temporary, file)


def assemble(session: Session, last_wave: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The layers' totals stacked to [L, S, ...], the snapshots to [stages, L, S, E]."""
    layers = [
        load_file(session.directory / f"wave-{last_wave:03d}-layer-{site.layer:04d}.safetensors") for site in session.sites
    ]
    stages = range(len(session.tokens.snapshots))
    snapshots = {
        name: torch.stack(
            [
                torch.stack([layer.get(f"snapshot.{stage}.{name}", torch.zeros_like(layer[name])) for layer in layers])
                for stage in stages
            ]
        )
        for name in SNAPSHOTS
    }
    total = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0] if not name.startswith("snapshot.")}
    in_cells = {} if session.table is None else load_file(session.directory / f"wave-{last_wave:03d}-table.safetensors")
    return total | in_cells | _token_counts(session.tokens), snapshots


def _token_counts(tokens: CalibrationTokens) -> dict[str, Tensor]:
    counts = {name: torch.zeros(len(tokens.sources), dtype=torch.int64) for name in ("tokens", "scored_tokens")}
    for number in (number for group in tokens.groups for number in group):
        row, source = tokens.row(number), int(tokens.row_source[number])
        counts["tokens"][source] += len(row.input_ids)
        counts["scored_tokens"][source] += row.scored.sum()
    return counts
