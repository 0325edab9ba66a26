"""Writes the exact EAFT trace: one file per row group, joined into one file at the end."""

from __future__ import annotations

import json
import os
import struct
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from reapkit.core.atomic_files import naming, replacing, write_at
from reapkit.observation.group_sums import trace_header

COPY_BYTES = 64 << 20


class GroupTraces:
    """Writes trace positions to their group's own file, so that no two machines ever write to the same page of one.

    `starts` [groups + 1]: signal positions before each group, and of all. Writes may come in any order and as often as
    they must; all of a group must come from one rank at a time.
    """

    def __init__(self, directory: Path, layers: Sequence[int], top_k: int, starts: Sequence[int]):
        self.file = directory / "trace.safetensors"
        self.directory, self.layers, self.top_k, self.starts = directory, tuple(layers), top_k, tuple(starts)
        self._headers: dict[int, tuple[bytes, dict[str, Any]]] = {}

    def write(self, name: str, at: int, values: Tensor) -> None:
        """Puts `values`, all of one group, at positions at … at + n of tensor `name`: `p`, `h` float32 [n], `source`
        int16 [n], `expert.<layer>` int16 [n, top_k] or `gate_norm.<layer>` float32 [n, top_k]."""
        if not len(values):
            return
        group = bisect_right(self.starts, at) - 1
        count = self.starts[group + 1] - self.starts[group]
        head, header = self._header(count)
        begin, end = header[name]["data_offsets"]
        descriptor = os.open(self.part(group), os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            with naming(self.part(group)):
                if os.fstat(descriptor).st_size != (size := len(head) + _end(header)):
                    os.ftruncate(descriptor, size)
                    write_at(descriptor, head, 0)
                place = len(head) + begin + (at - self.starts[group]) * ((end - begin) // count)
                write_at(descriptor, values.cpu().contiguous().numpy().data, place)
        finally:
            os.close(descriptor)

    def part(self, group: int) -> Path:
        """The group's own safetensors file; none where it has no position."""
        return self.directory / f"trace-{group:05d}.part"

    def join(self) -> Path:
        """All groups' positions in one safetensors file; the groups' files go. Nothing to do where that was done
        before."""
        groups = range(len(self.starts) - 1)
        if not self.file.exists():
            head, header = self._header(self.starts[-1])
            with replacing(self.file) as partial, partial.open("wb") as out:
                out.write(head)
                for name in header:
                    for group in groups:
                        self._copy(group, name, out)
        for group in groups:
            self.part(group).unlink(missing_ok=True)
        return self.file

    def _copy(self, group: int, name: str, out: Any) -> None:
        count = self.starts[group + 1] - self.starts[group]
        if not count:
            return
        head, header = self._header(count)
        begin, end = header[name]["data_offsets"]
        with self.part(group).open("rb") as part:
            part.seek(len(head) + begin)
            while begin < end:
                piece = part.read(min(COPY_BYTES, end - begin))
                if not piece:
                    raise OSError(f"{self.part(group)} ends before its tensor {name}")
                begin += out.write(piece)

    def _header(self, positions: int) -> tuple[bytes, dict[str, Any]]:
        """The file's first bytes, and what they say."""
        if positions not in self._headers:
            header = trace_header(self.layers, self.top_k, positions)
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            self._headers[positions] = struct.pack("<Q", len(text)) + text, header
        return self._headers[positions]


def _end(header: dict[str, Any]) -> int:
    return max(entry["data_offsets"][1] for entry in header.values())
