"""Keeps blocks of bytes in a file without a name, which is gone with the process, however that ends. Torch-free."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from reapkit.core.atomic_files import naming, write_at


@dataclass(frozen=True)
class Stretch:
    """Where bytes lie in the file."""

    begin: int
    nbytes: int


class UnnamedFile:
    """Bytes that wait on the disk of `directory`; blocks that were taken back make room for others of their size."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 (open as long as we live)
        self._free: dict[int, list[int]] = {}
        self._end, self._used = 0, 0

    @property
    def held(self) -> int:
        """Bytes that wait."""
        return self._used

    def put(self, content: memoryview) -> Stretch:
        """Raises OSError naming the directory where its disk refuses."""
        nbytes = content.nbytes
        free = self._free.get(nbytes)
        begin = free.pop() if free else self._end
        with naming(self.directory):
            write_at(self._file.fileno(), content, begin)
        self._end, self._used = max(self._end, begin + nbytes), self._used + nbytes
        return Stretch(begin, nbytes)

    def take(self, block: Stretch, place: memoryview) -> None:
        """Fills `place`, writable and as long as the block, whose room is free afterwards."""
        done = 0
        while done < block.nbytes:
            count = os.preadv(self._file.fileno(), [place[done:]], block.begin + done)
            if not count:
                raise OSError(f"{self.directory}: bytes that were put there are gone")
            done += count
        self.forget(block)

    def forget(self, block: Stretch) -> None:
        """The block's room is free; all of the file's once no block is left."""
        self._used -= block.nbytes
        if self._used:
            self._free.setdefault(block.nbytes, []).append(block.begin)
        else:
            self._free, self._end = {}, 0
            os.ftruncate(self._file.fileno(), 0)
