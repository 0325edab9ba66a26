"""Memory for the tensors of one layer after another: as much as the largest layers that are in use at once, and no
more."""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; a cache line, and what vector instructions want
UNUSED = 3  # references of a mapping nobody's tensor lives in: the list, the loop's name, getrefcount's argument


class Arenas:
    """Hands out one block per layer, each as large as the largest layer, and takes it again once no tensor lives in it.

    On the host a block is an anonymous mapping: outside malloc, which would keep and split what is freed; every tensor
    made of it holds a reference, so a block is never given twice while somebody still looks at a layer that was
    dropped. On an accelerator torch's caching allocator does the same for blocks of one size.
    """

    def __init__(self, nbytes: int, device: torch.device):
        self.nbytes, self._device = max(nbytes, mmap.PAGESIZE), device
        self._blocks: list[mmap.mmap] = []

    def take(self) -> Arena:
        """An empty block."""
        if self._device.type != "cpu":
            block = torch.empty(self.nbytes, dtype=torch.uint8, device=self._device)
            return Arena(block)
        for block in self._blocks:
            if sys.getrefcount(block) == UNUSED:
                return Arena(torch.frombuffer(block, dtype=torch.uint8))
        block = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            _advise(block)
        self._blocks.append(block)
        return Arena(torch.frombuffer(block, dtype=torch.uint8))


class Arena:
    """One block, cut into tensors from its start."""

    def __init__(self, block: Tensor):
        self.block, self.used = block, 0

    def tensor(self, shape: torch.Size, dtype: torch.dtype, phase: int = 0) -> Tensor:
        """An uninitialised tensor, `phase` bytes behind a multiple of `ALIGNMENT`. Raises ValueError where the block is
        full."""
        begin = self.used + phase
        end = begin + shape.numel() * dtype.itemsize
        if end > len(self.block):
            raise ValueError(f"{end} bytes for a block of {len(self.block)}")
        self.used = aligned(end)
        return self.block[begin:end].view(dtype).view(shape)


def aligned(nbytes: int) -> int:
    """`nbytes`, up to where the next tensor may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _advise(block: mmap.mmap) -> None:
    """Fewer page faults and TLB misses, where the kernel agrees."""
    with suppress(OSError):
        block.madvise(mmap.MADV_HUGEPAGE)
