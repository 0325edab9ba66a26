"""Reuses memory blocks for the tensors of one layer after another: no more than the largest layers in use at once
need."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

ALIGNMENT = 64  # bytes; a cache line, and what vector instructions want

Memory = Callable[[], Tensor]
"""A block's bytes, uint8 [nbytes]; each call gives the same bytes under a torch storage of its own."""


class Event(Protocol):
    """A point in an accelerator's work, such as `torch.cuda.Event`."""

    def synchronize(self) -> None:
        """Waits on the host until the work before the event is done."""
        ...


class Arena:
    """One block, cut into tensors from its start.

    `after`: what an accelerator must have done before the block may be written; None where nothing is pending.
    """

    def __init__(self, block: Tensor, memory: Memory | None = None, after: Event | None = None):
        self.block, self.used = block, 0
        self.memory, self.after = memory, after

    def tensor(self, shape: torch.Size, dtype: torch.dtype, phase: int = 0) -> Tensor:
        """An uninitialised tensor of any shape and dtype, `phase` bytes behind a multiple of `ALIGNMENT`. Raises
        ValueError where the block is full."""
        begin = self.used + phase
        end = begin + shape.numel() * dtype.itemsize
        if end > len(self.block):
            raise ValueError(f"{end} bytes for a block of {len(self.block)}")
        self.used = aligned(end)
        return self.block[begin:end].view(dtype).view(shape)


@dataclass(frozen=True, eq=False)
class _Returned:
    """A block that its owner gave back; `tensors`: the storage that its owner's tensors lived in."""

    memory: Memory
    after: Event | None
    tensors: StorageWeakRef


class Arenas:
    """Blocks of one size, each with one owner at a time: `take` hands one out, `give_back` ends its use.

    A block is never handed out before it was given back. Should a tensor of it outlive that, the block is left to the
    tensor for as long as it lives, and the next layer gets another one: nobody sees the bytes of two layers.
    """

    def __init__(self, nbytes: int, new: Callable[[int], Memory], mark: Callable[[], Event | None] = lambda: None):
        """`new(nbytes)`: another block. `mark()`: an event behind all work that the device has been given so far."""
        self.nbytes, self._new, self._mark = max(nbytes, mmap.PAGESIZE), new, mark
        self._returned: list[_Returned] = []
        self.blocks = 0
        """How many were made."""

    def take(self) -> Arena:
        """An empty block."""
        for place, returned in enumerate(self._returned):
            if returned.tensors.expired():
                del self._returned[place]
                return Arena(returned.memory(), returned.memory, returned.after)
        memory = self._new(self.nbytes)
        self.blocks += 1
        return Arena(memory(), memory, self._mark())

    def give_back(self, arena: Arena) -> None:
        """Ends the use of a block that `take` handed out; no tensor of it may be read afterwards. Raises ValueError
        where it was given back before."""
        if arena.memory is None:
            raise ValueError("a block was given back twice, or was not taken from here")
        self._returned.append(_Returned(arena.memory, self._mark(), StorageWeakRef(arena.block.untyped_storage())))
        arena.block, arena.memory = torch.empty(0, dtype=torch.uint8), None


def host_memory(nbytes: int) -> Memory:
    """An anonymous mapping, which lives as long as its tensors: malloc would keep and split what is freed."""
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # fewer page faults and TLB misses, where the kernel agrees
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return lambda: torch.frombuffer(mapping, dtype=torch.uint8)


def aligned(nbytes: int) -> int:
    """`nbytes`, up to where the next tensor may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
