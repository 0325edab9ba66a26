"""Streams the layers of a model in one loop: reads the next layer while the current one computes, then drops it.

Who passes decides what happens while a layer is in memory: which forwards go through it, under which mask, what is
summed, kept or written. A forward may begin in front of any layer, and the layers may come in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from reapkit.core.progress import SILENT_TASK, Task
from reapkit.model.streaming.layers import LayeredModel
from reapkit.model.streaming.lockstep import Forward, Lockstep, Spool


def in_turn(layered: LayeredModel, layers: Sequence[int], task: Task = SILENT_TASK) -> Iterator[int]:
    """Each of `layers` while it alone is in memory, but for the one after it, which is being read.

    The loop's body must leave nothing behind that reads the layer's weights. However the loop ends, no layer stays.
    """
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="layer-reader") as reader:
            coming = [reader.submit(layered.load_ahead, layer) for layer in layers[:1]]
            for place, layer in enumerate(layers):
                task.note(f"layer {layer}")
                coming.pop().result()
                layered.use(layer)
                coming = [reader.submit(layered.load_ahead, following) for following in layers[place + 1 : place + 2]]
                yield layer
                layered.drop(layer)
                task.advance(1)
    finally:
        layered.drop_all()


class LayerPass:
    """Forwards of one model that go through its decoder layers together, so that each layer is read once for all.

        with LayerPass(layered, hidden_bytes, directory) as layer_pass:
            forwards = [layer_pass.begin(run) for run in runs]
            for layer in layer_pass.through(range(len(layered.layers)), task):
                for forward in forwards:
                    layer_pass.advance(forward)

    Between two calls a forward waits in front of a layer, and its hidden states are parked: off an accelerator, and
    beyond `hidden_bytes` on the host in a file in `offload_directory`, where there is one. Hooks that others add to the
    layers must be added inside the block and before the forwards begin, behind those that make them wait.
    """

    def __init__(self, layered: LayeredModel, hidden_bytes: int | None = None, offload_directory: Path | None = None):
        self._layered, self._lockstep = layered, Lockstep(layered.layers)
        self._spool = Spool(layered.device, hidden_bytes, offload_directory)

    def __enter__(self) -> LayerPass:
        self._lockstep.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._lockstep.__exit__(*exception)

    def through(self, layers: Sequence[int], task: Task = SILENT_TASK) -> Iterator[int]:
        """Each of `layers` while it is in memory (see `in_turn`); `task` is told its name and that it is done."""
        return in_turn(self._layered, layers, task)

    # ------------------------------------------------------------------------------------------------ forwards

    def begin(self, run: Callable[[], Any], *, park: bool = True) -> Forward:
        """The forward that `run` computes, waiting in front of the first layer or of the one `starting_at` names."""
        forward = self._lockstep.forward(run)
        self.advance(forward, park=park)
        return forward

    def advance(self, forward: Forward, *, park: bool = True) -> None:
        """Through the layer in memory, after the last one to the end; `park=False` keeps its hidden states at hand."""
        self._spool.unpark(forward)
        forward.advance()
        if park:
            self.park(forward)

    def park(self, forward: Forward) -> None:
        """Puts away the hidden states of a forward that was kept at hand, unless it is finished."""
        if not forward.finished:
            self._spool.park(forward)

    @contextmanager
    def at_hand(self, forward: Forward) -> Iterator[Tensor]:
        """A parked forward's hidden states [batch, tokens, hidden] in the model's dtype, to read or to change in place;
        they are parked again after the block."""
        self._spool.unpark(forward)
        yield forward.hidden
        self._spool.park(forward)

    def forget(self, forwards: Sequence[Forward]) -> None:
        """Those that are finished, or that nobody will go on with."""
        self._lockstep.forget(forwards)
        for forward in forwards:
            self._spool.forget(forward)

    @property
    def held(self) -> int:
        """Bytes of parked hidden states that are on the host."""
        return self._spool.held

    @property
    def held_on_disk(self) -> int:
        """Bytes of parked hidden states that are in the offload directory, in a file without a name."""
        return self._spool.held_on_disk

    # -------------------------------------------------------------------------------- beginning behind the first layer

    @contextmanager
    def starting_at(self, layer: int, returns_tuple: Sequence[bool] | None = None) -> Iterator[None]:
        """Forwards that begin inside the block wait in front of `layer` at once; the layers before it are not computed.

        `returns_tuple`: which of those layers return a tuple, as `output_kinds` said of an earlier pass; None where
        this pass has been through them.
        """
        self._lockstep.start_at(layer, self.output_kinds(layer) if returns_tuple is None else returns_tuple)
        try:
            yield
        finally:
            self._lockstep.start_at(0, ())

    def output_kinds(self, before: int) -> list[bool]:
        """Which of the layers before `before` return a tuple."""
        return self._lockstep.output_kinds(before)

    @property
    def outputs_are_hidden_states(self) -> bool:
        """Whether every layer so far returned its hidden states and nothing else, so that those can begin a forward."""
        return self._lockstep.simple_outputs
