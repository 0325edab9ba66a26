"""Runs one decoder layer as it is without each of its experts, and computes no more of it than the absence changes.

What stands before the experts (attention, norms, shared experts that come first) is the same for every variant and is
computed once; of the experts' output only those tokens are computed anew that are routed otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reapkit.model.expert_calls import give_forward, intercepted
from reapkit.model.masking import routing_modules, without_expert
from reapkit.model.routed_experts import Experts, RoutedExperts

NOTHING = -1
"""Stands for an expert where nothing is taken out and all is computed as if something were."""
EXACT, ROUNDED = 2e-6, 1.5
"""A gate weight is another one if it moved by more than this: relative in float32, in units of the last place else."""


@dataclass(frozen=True, eq=False)
class Variants:
    """Some rows of a batch behind a layer, each without one expert: `expert` and `row` int64 [n] on the host (rows by
    their place in the batch), `hidden` [n, t, hidden] in the model's dtype."""

    expert: Tensor
    row: Tensor
    hidden: Tensor

    def __len__(self) -> int:
        return len(self.expert)


@dataclass(eq=False)
class LayerCall:
    """A call of a decoder layer with routed experts, ready to be repeated without each of them.

    `args`, `kwargs`: what the layer is called with for a batch of b rows of t tokens; `counts`: bool [b, t], positions
    at which a change can reach a scored one.
    """

    site: RoutedExperts
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    counts: Tensor
    returns_tuple: bool = field(init=False, default=False)

    @torch.no_grad()
    def __post_init__(self) -> None:
        self._before: dict[nn.Module, list[Any]] = {}
        self._routed: tuple[Tensor, Tensor, Tensor] | None = None
        with self._recording():
            output = self.site.decoder_layer(*self.args, **self.kwargs)
        self.returns_tuple = isinstance(output, tuple)

    @property
    def shape(self) -> torch.Size:
        """[b, t]."""
        return self.counts.shape

    @torch.no_grad()
    def variants(self, experts: range, limit: int) -> Iterator[Variants]:
        """The rows that the absence of an expert reaches, for NOTHING all of them and then for each of `experts`, in as
        many batches as hold at most `limit` tokens each (one row at least)."""
        most, waiting = max(1, limit // self.shape[1]), _Unfilled()
        for expert in (NOTHING, *experts):
            rows, hidden = self._without(expert)
            waiting.add(expert, rows, hidden)
            while len(waiting) >= most:
                yield waiting.taken(most)
        if len(waiting):
            yield waiting.taken(most)

    def _without(self, expert: int) -> tuple[Tensor, Tensor]:
        """Rows int64 [n] (on the host) and the layer's output there, [n, t, hidden]."""
        reached = torch.zeros(self.shape, dtype=torch.bool)

        def on_experts(site: RoutedExperts, hidden: Tensor, index: Tensor, gates: Tensor, inner: Experts) -> Tensor:
            nonlocal reached
            _, _, base = self._known
            index = index if kept is None else kept.to(index.device)[index]
            changed = torch.ones_like(index[:, 0], dtype=torch.bool) if expert == NOTHING else self._moved(index, gates)
            changed &= self.counts.reshape(-1).to(changed.device)
            reached = changed.view(self.shape).cpu()
            at = changed.nonzero()[:, 0]
            return base.clone() if not len(at) else base.index_copy(0, at, inner(hidden[at], index[at], gates[at]))

        absence = nullcontext() if expert == NOTHING else without_expert(self.site, expert)
        with self._repeating(), absence as kept, intercepted((self.site,), on_experts):
            output = self.site.decoder_layer(*self.args, **self.kwargs)
        rows = reached.any(1).nonzero()[:, 0]
        hidden = output[0] if isinstance(output, tuple) else output
        return rows, hidden[rows.to(hidden.device)]

    @property
    def _known(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self._routed is not None, "the layer calls its experts"
        return self._routed

    def _moved(self, index: Tensor, gates: Tensor) -> Tensor:
        """Positions bool [b * t] that are routed otherwise than in the whole model, beyond the rounding of gates."""
        base_index, base_gates, _ = self._known
        tolerance = EXACT if gates.dtype == torch.float32 else ROUNDED * torch.finfo(gates.dtype).eps
        other = (gates - base_gates).abs() > tolerance * base_gates.abs()
        return (index != base_index).any(1) | other.any(1)

    # ------------------------------------------------------------------------------------ what comes before the experts

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Keeps what the layer's modules put out until the experts are called, and what those were given and put
        out."""

        def on_experts(site: RoutedExperts, hidden: Tensor, index: Tensor, gates: Tensor, inner: Experts) -> Tensor:
            out = inner(hidden, index, gates)
            self._routed = index, gates, out
            return out.clone()

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._routed is None:
                self._before.setdefault(module, []).append(_copied(output))

        with ExitStack() as stack:
            for module in _beside_the_experts(self.site):
                stack.callback(module.register_forward_hook(after).remove)
            stack.enter_context(intercepted((self.site,), on_experts))
            yield

    @contextmanager
    def _repeating(self) -> Iterator[None]:
        """Modules that ran before the experts say again what they said."""
        with ExitStack() as stack:
            for module, outputs in self._before.items():
                stack.callback(give_forward(module, _saying(outputs)))
            yield


def _beside_the_experts(site: RoutedExperts) -> Iterator[nn.Module]:
    """The outermost modules of a layer that neither hold its experts nor are its router."""
    routers = {module for name, module in routing_modules(site) if name}
    around = {module for module in site.decoder_layer.modules() if site.module in set(module.modules())}

    def below(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if child in around:
                yield from below(child) if child is not site.module else ()
            elif child not in routers:
                yield child

    return below(site.decoder_layer)


def _saying(outputs: list[Any]) -> Callable[..., Any]:
    """A forward that puts out `outputs`, one after another."""
    left = iter(outputs)
    return lambda *args, **kwargs: _copied(next(left))


def _copied(output: Any) -> Any:
    """Tensors of its own, for a layer may change what a module put out in place."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple) and type(output) is tuple:
        return tuple(_copied(part) for part in output)
    return output


class _Unfilled:
    """Variants that do not fill a batch yet."""

    def __init__(self) -> None:
        self._parts: list[Variants] = []

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def add(self, expert: int, rows: Tensor, hidden: Tensor) -> None:
        if len(rows):
            self._parts.append(Variants(torch.full_like(rows, expert), rows, hidden))

    def taken(self, most: int) -> Variants:
        """The first `most` of them, or all."""
        expert, row, hidden = (
            torch.cat([getattr(part, name) for part in self._parts]) for name in ("expert", "row", "hidden")
        )
        self._parts = [Variants(expert[most:], row[most:], hidden[most:])] if len(row) > most else []
        return Variants(expert[:most], row[:most], hidden[:most])
