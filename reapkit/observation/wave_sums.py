"""Stores the sums of a streamed pass: one file per wave and layer, added in group order over all waves."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.observation.observation import MAXIMA, SNAPSHOTS, SUMS
from reapkit.observation.partial_files import load_partial, save_by_rename
from reapkit.observation.session import Session
from reapkit.observation.waves import covering


class WaveSums:
    """One layer's statistics of a wave's row groups.

    Float64 sums depend on the order of adding, so every group keeps its own, SUMS [groups, S, E]; the rest is exact in
    any order and is kept once: MAXIMA [S, E], `coactivation` [S, E, E].
    """

    def __init__(self) -> None:
        self._groups: list[int] = []
        self._sums: dict[str, list[Tensor]] = {name: [] for name in SUMS}
        self._exact: dict[str, Tensor] = {}

    def add(self, group: int, part: dict[str, Tensor]) -> None:
        """Takes a row group's statistics of the layer, [S, E] each and `coactivation` [S, E, E], in the dtypes of
        `LayerSums.tensors`."""
        self._groups.append(group)
        for name, tensor in part.items():
            if name in SUMS:
                self._sums[name].append(tensor)
            else:
                self._exact[name] = _joined(name, self._exact[name], tensor) if name in self._exact else tensor

    def save(self, file: Path) -> None:
        tensors = {name: torch.stack(parts) for name, parts in self._sums.items()} | self._exact
        save_by_rename(tensors | {"groups": torch.tensor(self._groups)}, file)


def assemble(session: Session) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The layers' totals stacked to [L, S, ...] in their dtypes, the snapshots to float64 [stages, L, S, E]."""
    layers = [_layer(session, site.layer) for site in session.sites]
    total = {name: torch.stack([totals[name] for totals, _ in layers]) for name in layers[0][0]}
    snapshots = {name: torch.stack([taken[name] for _, taken in layers], dim=1) for name in SNAPSHOTS}
    in_cells = {} if session.table is None else session.table.added()
    return total | in_cells | _token_counts(session.tokens), snapshots


def _layer(session: Session, layer: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Totals of one layer, and its snapshots [stages, S, E]."""
    parts = [
        load_partial(file)
        for file in covering(session.directory, f"layer-{layer:04d}.safetensors", len(session.tokens.groups))
    ]
    place = {int(group): (part, row) for part in parts for row, group in enumerate(part["groups"])}
    total: dict[str, Tensor] = {}
    for part in parts:
        for name in (*MAXIMA, "coactivation"):
            total[name] = _joined(name, total[name], part[name]) if name in total else part[name]
    taken = {0: {name: torch.zeros_like(parts[0][name][0]) for name in SNAPSHOTS}}
    for group in sorted(place):
        part, row = place[group]
        for name in SUMS:
            total[name] = total[name] + part[name][row] if name in total else part[name][row]
        if group + 1 in session.tokens.snapshots:
            taken[group + 1] = {name: total[name] for name in SNAPSHOTS}
    return total, {name: torch.stack([taken[done][name] for done in session.tokens.snapshots]) for name in SNAPSHOTS}


def _joined(name: str, a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a, b) if name in MAXIMA else a + b


def _token_counts(tokens: CalibrationTokens) -> dict[str, Tensor]:
    counts = {name: torch.zeros(len(tokens.sources), dtype=torch.int64) for name in ("tokens", "scored_tokens")}
    for number in (number for group in tokens.groups for number in group):
        row, source = tokens.row(number), int(tokens.row_source[number])
        counts["tokens"][source] += len(row.input_ids)
        counts["scored_tokens"][source] += row.scored.sum()
    return counts
