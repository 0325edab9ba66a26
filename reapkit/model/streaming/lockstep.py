"""Runs many forward passes of one model together, layer by layer, so that each layer's weights are read once.

Every forward is the model's own, run in a greenlet that pauses before each decoder layer; whatever masks, rotary tables
or extra streams the architecture passes between its layers stay in its frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import greenlet
import torch
from torch import Tensor, nn

from reapkit.core.unnamed_file import Stretch, UnnamedFile


class Forward:
    """One forward: `advance()` runs it through one decoder layer, or to its end after the last.

    `park` moves the bytes of `hidden` elsewhere and `unpark` brings them back.
    """

    def __init__(self, run: Callable[[], Any]):
        self._greenlet = greenlet.greenlet(run)
        self._hidden: Tensor | None = None
        self.others: Callable[[], int] = lambda: 0
        self._replacement: Tensor | None = None
        self._parked: Tensor | tuple[UnnamedFile, Stretch] | None = None
        self._nbytes = 0

    def advance(self) -> None:
        self._greenlet.parent = greenlet.getcurrent()
        paused = self._greenlet.switch()
        self._hidden, self.others = paused if not self._greenlet.dead else (None, lambda: 0)

    def pause(self, hidden: Tensor, others: Callable[[], int]) -> None:
        """Gives the turn back to who called `advance`, from inside the forward. `hidden` [batch, tokens, hidden] in the
        model's dtype is the next layer's input, `others` the checksum of its other arguments."""
        caller = self._greenlet.parent
        assert caller is not None, "`advance` says who waits"
        caller.switch((hidden, others))

    @property
    def hidden(self) -> Tensor:
        """The next layer's input while the forward is paused, [batch, tokens, hidden] in the model's dtype."""
        assert self._hidden is not None, "the forward does not wait before a layer"
        return self._hidden

    @property
    def finished(self) -> bool:
        return self._greenlet.dead

    def replace_hidden(self, hidden: Tensor) -> None:
        """The next layer reads `hidden`, [batch, tokens, hidden] in the model's dtype, instead."""
        self._hidden = self._replacement = hidden

    def taken_replacement(self) -> Tensor | None:
        """What `replace_hidden` was given since the last call, [batch, tokens, hidden] in the model's dtype; None where
        nothing was."""
        replacement, self._replacement = self._replacement, None
        return replacement

    @property
    def nbytes(self) -> int:
        """Bytes of `hidden` where it waits."""
        return self._nbytes if self._parked is not None else self.hidden.untyped_storage().nbytes()

    def park(self, file: UnnamedFile | None = None) -> None:
        """Frees the memory of `hidden`, which the paused frames still refer to, after copying it to the host or to
        `file`."""
        storage = self.hidden.untyped_storage()
        self._nbytes = storage.nbytes()
        raw = torch.empty(0, dtype=torch.uint8, device=self.hidden.device).set_(storage)
        on_host = raw.to("cpu", copy=True)
        self._parked = on_host if file is None else (file, file.put(on_host.numpy().data))
        storage.resize_(0)

    def unpark(self) -> None:
        if self._parked is None:
            return
        if isinstance(self._parked, Tensor):
            raw = self._parked
        else:
            raw = torch.empty(self._nbytes, dtype=torch.uint8)
            file, block = self._parked
            file.take(block, raw.numpy().data)
        storage = self.hidden.untyped_storage()
        storage.resize_(self._nbytes)
        torch.empty(0, dtype=torch.uint8, device=self.hidden.device).set_(storage).copy_(raw)
        self._parked = None

    def forget_parked(self) -> None:
        """Nobody will go on with it: what it has on disk makes room."""
        if isinstance(self._parked, tuple):
            file, block = self._parked
            file.forget(block)
        self._parked = None


class Lockstep:
    """Makes forwards of a model pause before each of its decoder layers; used as a context manager.

    `start_at` makes the layers before it pass their input on, unread: a forward then arrives there at once, and is
    given its real hidden states by `Forward.replace_hidden`.
    """

    def __init__(self, layers: nn.ModuleList):
        self._layers = layers
        self._forwards: dict[greenlet.greenlet, Forward] = {}
        self._handles: list[Any] = []
        self._returns_tuple: dict[int, bool] = {}
        self.simple_outputs = True
        self._start = 0

    def __enter__(self) -> Lockstep:
        for number, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_pre_hook(self._pause(number), with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._note(number)))
        return self

    def __exit__(self, *exception: Any) -> None:
        self.start_at(0, ())
        for handle in self._handles:
            handle.remove()

    def forward(self, run: Callable[[], Any]) -> Forward:
        """A forward, not yet begun."""
        forward = Forward(run)
        self._forwards[forward._greenlet] = forward
        return forward

    def forget(self, forwards: Sequence[Forward]) -> None:
        for forward in forwards:
            self._forwards.pop(forward._greenlet, None)

    def output_kinds(self, before: int) -> list[bool]:
        """Which of the layers before `before` return a tuple."""
        return [self._returns_tuple[number] for number in range(before)]

    def start_at(self, layer: int, returns_tuple: Sequence[bool]) -> None:
        for number in range(self._start):
            del self._layers[number].forward
        self._start = layer
        for number, is_tuple in enumerate(returns_tuple):
            self._returns_tuple[number] = is_tuple
            self._layers[number].forward = _pass_on_tuple if is_tuple else _pass_on

    def _pause(self, number: int) -> Callable[..., Any]:
        def before(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            forward = self._forwards.get(greenlet.getcurrent())
            if forward is None or number < self._start:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            forward.pause(hidden, lambda: _checksum((args[1:], kwargs)))
            replacement = forward.taken_replacement()
            if replacement is None:
                return None
            return ((replacement, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": replacement})

        return before

    def _note(self, number: int) -> Callable[..., None]:
        def after(layer: nn.Module, args: tuple, output: Any) -> None:
            self._returns_tuple[number] = isinstance(output, tuple)
            self.simple_outputs &= isinstance(output, Tensor) or (isinstance(output, tuple) and len(output) == 1)

        return after


class Spool:
    """Where the hidden states of waiting forwards are: off the accelerator, on disk beyond `host_bytes` where there is
    a `directory`.
    """

    def __init__(self, device: torch.device, host_bytes: int | None, directory: Path | None):
        self._device, self._host_bytes, self._directory = device, host_bytes, directory
        self._on_host: dict[Forward, int] = {}
        self._on_disk: UnnamedFile | None = None
        self.held = 0
        """Bytes on the host."""

    @property
    def held_on_disk(self) -> int:
        """Bytes in the directory."""
        return self._on_disk.held if self._on_disk else 0

    def park(self, forward: Forward) -> None:
        nbytes = forward.nbytes
        if self._directory is not None and self._host_bytes is not None and self.held + nbytes > self._host_bytes:
            self._on_disk = self._on_disk or UnnamedFile(self._directory)
            return forward.park(self._on_disk)
        self._on_host[forward] = nbytes
        self.held += nbytes
        if self._device.type != "cpu":
            forward.park()

    def unpark(self, forward: Forward) -> None:
        """Nothing to do for a forward that is not parked."""
        self.held -= self._on_host.pop(forward, 0)
        forward.unpark()

    def forget(self, forward: Forward) -> None:
        """No longer counts it, nor keeps its hidden states."""
        self.held -= self._on_host.pop(forward, 0)
        forward.forget_parked()


def _pass_on(*args: Any, **kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _pass_on_tuple(*args: Any, **kwargs: Any) -> tuple[Tensor]:
    return (_pass_on(*args, **kwargs),)


def _checksum(arguments: Any) -> int:
    """Of every tensor among a layer's arguments beside its hidden states: equal where a replay may go on from here."""
    total = 0
    for tensor in _tensors_in(arguments, set()):
        total = crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, total)
    return total


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Also those inside dictionaries, lists and plain objects, such as keys and values that layers leave for later
    ones."""
    if id(value) in seen or isinstance(value, (nn.Module, type)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.device.type != "meta":
            yield value
        return
    inner = (
        value.values()
        if isinstance(value, Mapping)
        else value
        if isinstance(value, (list, tuple))
        else vars(value).values()
        if hasattr(value, "__dict__")
        else ()
    )
    for item in list(inner):
        yield from _tensors_in(item, seen)
