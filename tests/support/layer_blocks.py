"""The blocks that layers are read into, watched: each has one owner at a time, and nobody reads one that was given
back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from reapkit.model.streaming.device_copies import Accelerator
from reapkit.model.streaming.layer_memory import Arena, Arenas, Event, Memory, host_memory

POISON = 0xFF  # NaN in every float dtype


@dataclass
class Blocks:
    """`most_in_use`: blocks with an owner at once. `left_behind`: blocks that a tensor still lived in when they were
    given back."""

    in_use: set[int] = field(default_factory=set)
    most_in_use: int = 0
    left_behind: int = 0


@contextmanager
def watched_blocks() -> Iterator[Blocks]:
    """Inside the block every block of every `Arenas` is overwritten as soon as it is given back."""
    blocks, take, give_back = Blocks(), Arenas.take, Arenas.give_back

    def watched_take(self: Arenas) -> Arena:
        arena = take(self)
        assert arena.block.data_ptr() not in blocks.in_use, "a block was handed out while it was in use"
        blocks.in_use.add(arena.block.data_ptr())
        blocks.most_in_use = max(blocks.most_in_use, len(blocks.in_use))
        return arena

    def watched_give_back(self: Arenas, arena: Arena) -> None:
        tensors = StorageWeakRef(arena.block.untyped_storage())
        blocks.in_use.remove(arena.block.data_ptr())
        arena.block.fill_(POISON)
        give_back(self, arena)
        blocks.left_behind += not tensors.expired()

    with patch.object(Arenas, "take", watched_take), patch.object(Arenas, "give_back", watched_give_back):
        yield blocks


@dataclass(eq=False)
class LateEvent:
    """`reached`: when it was waited for, by the accelerator's clock."""

    reach: Callable[[], None]
    reached: int | None = None

    def synchronize(self) -> None:
        self.reach()


@dataclass(eq=False)
class Copy:
    """One copy to a block: `after` is the event that it had to wait for, `event` its own."""

    source: int
    target: int
    after: LateEvent | None
    event: LateEvent


class LateAccelerator(Accelerator):
    """An accelerator in host memory that does everything as late as events allow.

    A copy that nobody waited for has not happened: who forgets to wait reads what was there before. `memories` and
    `buffers` count what was asked for; `copies` are all copies, and events know when they were waited for.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.memories = self.buffers = self.clock = 0
        self.copies: list[Copy] = []

    def memory(self, nbytes: int) -> Memory:
        self.memories += 1
        return host_memory(nbytes)

    def buffer(self, nbytes: int) -> Tensor:
        self.buffers += 1
        return super().buffer(nbytes)

    def copy(self, source: Tensor, target: Tensor, after: Event | None) -> LateEvent:
        addresses = source.data_ptr(), target.data_ptr()

        def reach() -> None:
            nonlocal source, target
            if event.reached is None:
                if after is not None:
                    after.synchronize()
                target.copy_(source)
                source = target = torch.empty(0)  # holds neither any longer
                event.reached = self._tick()

        event = LateEvent(reach)
        self.copies.append(Copy(*addresses, after, event))
        return event

    def mark(self) -> LateEvent:
        """The host computes at once, so that the work before the event is done."""
        return LateEvent(lambda: None, self._tick())

    def wait(self, event: Event) -> None:
        event.synchronize()

    def _tick(self) -> int:
        self.clock += 1
        return self.clock
