"""Copies layers to an accelerator through two pinned buffers: one is filled while the other is copied.

Nothing here waits for the device but the reader that wants a buffer whose bytes are still being copied. What must not
overtake what is said by events: a copy waits for the work that last used its block, the forward for the copy.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # pyright: ignore[reportPrivateImportUsage]

from reapkit.model.streaming.layer_memory import Arena, Event, Memory

BUFFERS = 2  # one is read into, the other's bytes are on their way


class Accelerator:
    """What streaming asks of a device. This one knows neither streams nor events: copies are over when they return."""

    def __init__(self, device: torch.device):
        self.device = device

    def memory(self, nbytes: int) -> Memory:
        """A block of the device's memory, which lives as long as its tensors."""
        block = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        if block.device.type == "meta":
            return lambda: torch.empty_like(block)
        return lambda: from_dlpack(to_dlpack(block))

    def buffer(self, nbytes: int) -> Tensor:
        """Host memory, uint8 [nbytes], to copy from."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, source: Tensor, target: Tensor, after: Event | None) -> Event | None:
        """Copies `source`, uint8 [nbytes] on the host, to `target`, uint8 [nbytes] on the device, beside the forward,
        not before `after`; the event of its end."""
        target.copy_(source)
        return None

    def mark(self) -> Event | None:
        """An event behind all work that the caller's stream has been given."""
        return None

    def wait(self, event: Event) -> None:
        """What the caller's stream is given from now on waits for the event."""


class CudaAccelerator(Accelerator):
    """Copies run on a stream of their own, from pinned memory."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)

    def buffer(self, nbytes: int) -> Tensor:
        """Pinned host memory, uint8 [nbytes], to copy from."""
        with torch.cuda.device(self.device):  # else a rank's reader thread would open a context on the first card
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, source: Tensor, target: Tensor, after: Event | None) -> Event:
        """Copies uint8 [nbytes] from pinned memory on the stream of its own."""
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(cast(torch.cuda.Event, after))
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def mark(self) -> Event:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(cast(torch.cuda.Event, event))


def accelerator(device: torch.device) -> Accelerator | None:
    """The operations of the device; None for the host, whose layers are read to where they stay."""
    if device.type == "cpu":
        return None
    return CudaAccelerator(device) if device.type == "cuda" else Accelerator(device)


class StagedCopies:
    """Two buffers, used in turns."""

    def __init__(self, accelerator: Accelerator, nbytes: int):
        """`nbytes`: of the largest layer."""
        self._accelerator, self._nbytes = accelerator, nbytes
        self._buffers: list[Tensor] = []
        self._copied: list[Event | None] = [None] * BUFFERS
        self._turn = 0

    def buffer(self) -> Tensor:
        """The buffer whose turn it is, uint8 [nbytes]; waits until its last bytes have left it."""
        if self._turn == len(self._buffers):
            self._buffers.append(self._accelerator.buffer(self._nbytes))
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        return self._buffers[self._turn]

    def send(self, nbytes: int, arena: Arena) -> Event | None:
        """Starts copying the buffer's first `nbytes` into the arena; the next buffer's turn begins. The event of the
        copy's end."""
        turn, self._turn = self._turn, (self._turn + 1) % BUFFERS
        copied = self._accelerator.copy(self._buffers[turn][:nbytes], arena.block[:nbytes], arena.after)
        self._copied[turn] = copied
        return copied
