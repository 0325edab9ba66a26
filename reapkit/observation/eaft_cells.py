"""Collects EAFT signals when the exact trace would be too large: keeps a few row groups at a time, then adds them up in
cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from reapkit.core.errors import UnusableError
from reapkit.observation.eaft_table import (
    COLUMNS,
    H_CELLS,
    H_EXACT,
    H_LEVELS,
    P_CELLS,
    P_EXACT,
    P_LEVELS,
    EaftTable,
    cell_edges,
    cells_of,
)
from reapkit.observation.eaft_trace import GroupTraces
from reapkit.observation.observation import Trace
from reapkit.observation.partial_files import load_partial, save_by_rename

PILOT_POSITIONS = 1 << 16
"""Signal positions whose quantiles are the edges, where a pass cannot know all before it sums: off by about 0.002 at
0.5."""
CHUNK_POSITIONS = 1 << 18  # bounds the index arrays


@dataclass(eq=False)
class TableSums:
    """Takes what a trace takes into `spool`, group by group, and adds finished groups up in cells; then `drop` frees
    theirs."""

    spool: GroupTraces
    num_experts: int
    num_sources: int

    def write(self, name: str, at: int, values: Tensor) -> None:
        """Puts `values` [n, ...] at positions at … at + n of tensor `name`, in its dtype, as `GroupTraces.write`."""
        self.spool.write(name, at, values)

    def drop(self, group: int) -> None:
        """Forgets what was spooled of a group: its sums are safe."""
        self.spool.part(group).unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------ edges

    @property
    def has_edges(self) -> bool:
        return self._edges_file.exists()

    def set_edges(self, p: ndarray, h: ndarray, source: ndarray) -> None:
        """Edges from these positions, once for all: `p`, `h` float32 [n] and `source` int16 [n] as in a Trace. Raises
        UnusableError where p or H is not finite."""
        bad = int((~(np.isfinite(p) & np.isfinite(h))).sum())
        if bad:
            raise UnusableError(
                f"observe: the EAFT signals of {bad} of {len(p)} positions are not finite: the logits overflowed. "
                "Observe in bfloat16 or float32."
            )
        edges = {
            "p_edges": cell_edges(p, source, self.num_sources, P_EXACT, P_LEVELS),
            "h_edges": cell_edges(h, source, self.num_sources, H_EXACT, H_LEVELS),
        }
        save_by_rename({name: torch.from_numpy(values) for name, values in edges.items()}, self._edges_file)

    def set_edges_of(self, groups: Iterable[int]) -> None:
        """Edges from all positions of these groups, which are spooled, where there are none yet."""
        if not self.has_edges:
            traces = [trace for group in groups if (trace := self._spooled(group)) is not None]
            self.set_edges(
                *(
                    np.concatenate([getattr(trace, name) for trace in traces] or [np.empty(0, np.float32)])
                    for name in ("p", "h", "source")
                )
            )

    def _edges(self) -> dict[str, ndarray]:
        return {name: values.numpy() for name, values in load_partial(self._edges_file).items()}

    @property
    def _edges_file(self) -> Path:
        return self.spool.directory / "edges.safetensors"

    # ------------------------------------------------------------------------------------------ sums

    def tensors(self, group: int) -> dict[str, Tensor]:
        """One group's sums by cell: `table.positions` int64 [S, P, H], `table.count` and `table.gate_norm_sum` float64
        [L, S, P, H, E]."""
        trace, edges, layers = self._spooled(group), self._edges(), self.spool.layers
        shape = (self.num_sources, P_CELLS, H_CELLS)
        if trace is None:
            sums = torch.zeros(len(layers), *shape, self.num_experts, dtype=torch.float64)
            return {
                "table.positions": torch.zeros(shape, dtype=torch.int64),
                "table.count": sums,
                "table.gate_norm_sum": sums.clone(),
            }
        cell = cells_of(trace.p, trace.h, trace.source, edges["p_edges"], edges["h_edges"])
        positions = np.bincount(cell, minlength=self.num_sources * P_CELLS * H_CELLS).reshape(shape)
        summed = [self._layer(*trace.routed(layer), cell) for layer in layers]
        count, mass = (
            np.stack(column).reshape(len(layers), *shape, self.num_experts) for column in zip(*summed, strict=True)
        )
        found = {"table.positions": positions, "table.count": count, "table.gate_norm_sum": mass}
        return {name: torch.from_numpy(values) for name, values in found.items()}

    def _layer(self, expert: ndarray, gate_norm: ndarray, cell: ndarray) -> tuple[ndarray, ndarray]:
        bins = self.num_sources * P_CELLS * H_CELLS * self.num_experts
        count, mass = np.zeros(bins + 1), np.zeros(bins + 1)  # the last of expert -1
        for begin in range(0, len(cell), CHUNK_POSITIONS):
            part = slice(begin, begin + CHUNK_POSITIONS)
            key = np.where(expert[part] < 0, bins, cell[part, None] * self.num_experts + expert[part]).ravel()
            count += np.bincount(key, minlength=bins + 1)
            mass += np.bincount(key, weights=gate_norm[part].ravel(), minlength=bins + 1)
        return count[:-1], mass[:-1]

    def result(self, total: Mapping[str, Tensor]) -> EaftTable:
        """The table that these sums over all groups make: `total` as `tensors` gives them, `table.positions` int64
        [S, P, H] and so on, added up."""
        return EaftTable(**self._edges(), **{name: total[f"table.{name}"].numpy() for name in COLUMNS})

    def add_in_order(self, passed: Callable[[int], bool]) -> None:
        """Adds the groups that follow those added so far, up to the first that has not `passed` all layers."""
        total = self.added()
        begin = group = int(total.pop("groups", torch.tensor(0)))
        while group < len(self.spool.starts) - 1 and passed(group):
            for name, tensor in self.tensors(group).items():
                total[name] = total[name] + tensor if name in total else tensor
            group += 1
        if group > begin:
            save_by_rename({**total, "groups": torch.tensor(group)}, self._added_file)
        for done in range(group):
            self.drop(done)

    def added(self) -> dict[str, Tensor]:
        """The sums so far, in the shapes and dtypes of `tensors` ([S, P, H] and [L, S, P, H, E]), and of how many
        `groups` (int64 scalar); empty before the first."""
        return load_partial(self._added_file) if self._added_file.exists() else {}

    @property
    def _added_file(self) -> Path:
        return self.spool.directory / "table.safetensors"

    def _spooled(self, group: int) -> Trace | None:
        """None of a group without a signal."""
        if self.spool.starts[group] == self.spool.starts[group + 1]:
            return None
        return Trace.load(self.spool.part(group))
