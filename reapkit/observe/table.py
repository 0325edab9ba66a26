"""EAFT material of a calibration whose exact trace would be too large: kept for a few row groups at a time, then added up in cells."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reapkit.eaft_table import COLUMNS, H_CELLS, H_EXACT, H_LEVELS, P_CELLS, P_EXACT, P_LEVELS, Table, cell_edges, cells_of
from reapkit.errors import UnusableError
from reapkit.observation import Trace
from reapkit.observe.partials import TraceFile

PILOT_POSITIONS = 1 << 16
"""Signal positions whose quantiles are the edges, where a pass cannot know all before it sums: off by about 0.002 at 0.5."""
CHUNK_POSITIONS = 1 << 18  # bounds the index arrays


@dataclass(eq=False)
class TableSums:
    """Takes what a TraceFile takes, for the row groups between `begin` and `end`; `starts`: signal positions before each group."""

    directory: Path
    layers: tuple[int, ...]
    top_k: int
    num_experts: int
    num_sources: int
    starts: Sequence[int]
    _chunk: TraceFile | None = field(default=None, init=False)
    _base: int = field(default=0, init=False)

    def begin(self, groups: range) -> None:
        """The spool of these groups, as a killed run left it where it did."""
        self._base = self.starts[groups.start]
        self._chunk = TraceFile(self.directory / f"chunk-{groups.start:05d}.safetensors", self.layers, self.top_k, self.starts[groups.stop] - self._base)

    def write(self, name: str, at: int, values: Tensor) -> None:
        """As `TraceFile.write`, at a position of the whole calibration."""
        self._chunk.write(name, at - self._base, values)

    def end(self) -> None:
        """Forgets the spool: its sums are safe."""
        self._chunk.close()
        self._chunk.file.unlink(missing_ok=True)

    def close(self) -> None:
        """There is nothing left open between two spools."""

    # ------------------------------------------------------------------------------------------ edges

    @property
    def has_edges(self) -> bool:
        return self._edges_file.exists()

    def set_edges(self, p: Tensor, h: Tensor, source: Tensor) -> None:
        """Edges from these positions, once for all. Raises UnusableError where p or H is not finite."""
        bad = int((~(p.isfinite() & h.isfinite())).sum())
        if bad:
            raise UnusableError(f"observe: the EAFT signals of {bad} of {len(p)} positions are not finite: the logits overflowed. "
                                "Observe in bfloat16 or float32.")
        edges = {"p_edges": cell_edges(p, source, self.num_sources, P_EXACT, P_LEVELS),
                 "h_edges": cell_edges(h, source, self.num_sources, H_EXACT, H_LEVELS)}
        temporary = self._edges_file.with_suffix(".writing")
        save_file(edges, temporary)
        os.replace(temporary, self._edges_file)

    def set_edges_of_spool(self) -> None:
        """Edges from all positions of the present spool, where there are none yet."""
        if not self.has_edges:
            trace = self._spooled()
            self.set_edges(trace.p, trace.h, trace.source)

    @property
    def _edges_file(self) -> Path:
        return self.directory / "edges.safetensors"

    # ------------------------------------------------------------------------------------------ sums

    def tensors(self, group: int) -> dict[str, Tensor]:
        """One group's sums by cell: `table.positions` int64 [S, P, H], `table.count` and `table.gate_norm_sum` float64 [L, S, P, H, E]."""
        trace, edges = self._spooled(), load_file(self._edges_file)
        span = slice(self.starts[group] - self._base, self.starts[group + 1] - self._base)
        cell = cells_of(trace.p[span], trace.h[span], trace.source[span].long(), edges["p_edges"], edges["h_edges"])
        shape = (self.num_sources, P_CELLS, H_CELLS)
        positions = torch.bincount(cell, minlength=self.num_sources * P_CELLS * H_CELLS).view(shape)
        summed = [self._layer(*(part[span] for part in trace.routed(layer)), cell) for layer in self.layers]
        count, mass = (torch.stack(column).view(len(self.layers), *shape, self.num_experts) for column in zip(*summed, strict=True))
        return {"table.positions": positions, "table.count": count, "table.gate_norm_sum": mass}

    def _layer(self, expert: Tensor, gate_norm: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        bins = self.num_sources * P_CELLS * H_CELLS * self.num_experts
        count, mass = torch.zeros(bins, dtype=torch.float64), torch.zeros(bins, dtype=torch.float64)
        for begin in range(0, len(cell), CHUNK_POSITIONS):
            part = slice(begin, begin + CHUNK_POSITIONS)
            key = (cell[part, None] * self.num_experts + expert[part].long()).flatten()
            count += torch.bincount(key, minlength=bins)
            mass += torch.bincount(key, weights=gate_norm[part].double().flatten(), minlength=bins)
        return count, mass

    def result(self, total: dict[str, Tensor]) -> Table:
        """The table that these sums over all groups make."""
        return Table(**load_file(self._edges_file), **{name: total[f"table.{name}"] for name in COLUMNS})

    def _spooled(self) -> Trace:
        self._chunk.flush()
        return Trace.load(self._chunk.file)


def add_in_order(earlier: dict[str, Tensor], table: TableSums, groups: range) -> dict[str, Tensor]:
    """`earlier` and the groups' sums, added in group order."""
    total = dict(earlier)
    for group in groups:
        for name, tensor in table.tensors(group).items():
            total[name] = total[name] + tensor if name in total else tensor
    return total
