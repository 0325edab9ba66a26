"""Computes the removal paths of one layer in memory from its token sample: every expert's output, and the block's own
routing without those that are gone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reapkit.checkpoint.architecture import Architecture
from reapkit.checkpoint.projection_names import Role
from reapkit.core.errors import UnusableError
from reapkit.model.expert_calls import intercepted
from reapkit.model.masking import sliced_routing
from reapkit.model.routed_experts import Experts, RoutedExperts
from reapkit.observation.rerouting import (
    PROJECTED,
    InnerProducts,
    Outputs,
    Path,
    Sampled,
    Vectors,
    path,
    projection,
    single,
)

CHUNK_BYTES = 512 << 20  # of all experts' float32 outputs held at once, before their inner products are taken
PROBED_TOKENS, PROBED_EXPERTS = 256, 16
ROUNDED = 0.02  # share of tokens whose choice may turn on rounding alone


@torch.no_grad()
def measure_layer(
    model: PreTrainedModel,
    site: RoutedExperts,
    inputs: Tensor,
    residual: Tensor,
    source: Tensor,
    scored: Tensor,
    projected: bool | None = None,
) -> dict[str, Tensor]:
    """`order` int64 and `error` float64 [S + 2, E], and `single` float64 [S, E] (see observation.Reroute), of a layer
    in memory.

    `inputs` [T, hidden]: what the block read; `residual` float32 [T]: ‖r_t‖²; `source` int64 [T]; `scored` int64 [S]:
    scored tokens of each source, which the sample stands for. `projected`: keep random projections of the experts'
    outputs instead of their inner products (default: where there are more experts than dimensions).
    """
    architecture = Architecture.from_config(model.config.to_dict())
    with Router(site, inputs.to(site.matrix(Role.DOWN).device)) as router:
        read = router.read
        outputs = _outputs(site, read, residual, site.num_experts > PROJECTED if projected is None else projected)
        equally = 1 / torch.bincount(source, minlength=len(scored)).double()[source]
        sampled = Sampled(
            outputs,
            router.route,
            source,
            equally,
            site.num_experts,
            architecture.least_experts,
            architecture.n_group,
            architecture.n_group == 1 and is_local(router, site.num_experts, architecture.least_experts),
        )
        found = [path(sampled.of_source(number)) for number in range(len(scored))]
        found += [path(sampled), path(replace(sampled, weight=equally * scored[source]))]
        return {
            "order": _stacked(found, "order"),
            "error": _stacked(found, "error"),
            "single": single(sampled, len(scored)),
        }


def _stacked(paths: Sequence[Path], name: str) -> Tensor:
    return torch.stack([getattr(one, name) for one in paths])


def _outputs(site: RoutedExperts, read: Tensor, residual: Tensor, projected: bool) -> Outputs:
    """All experts on all tokens, in chunks."""
    width = site.expert(read[:1], 0).shape[-1]
    chunk = max(1, CHUNK_BYTES // (4 * width * site.num_experts))
    matrix = projection(width).to(read.device) if projected else None
    scale = residual.to(read.device).clamp_min(1e-30).rsqrt()
    parts = []
    for at in range(0, len(read), chunk):
        rows = slice(at, at + chunk)
        out = (
            torch.stack([_output(site, read[rows], expert) for expert in range(site.num_experts)], 1)
            * scale[rows, None, None]
        )
        parts.append(out @ out.mT if matrix is None else out @ matrix)
    found = torch.cat(parts)
    return InnerProducts(found) if matrix is None else Vectors(found)


def _output(site: RoutedExperts, hidden: Tensor, expert: int) -> Tensor:
    """f(x) of one expert in float32, computed so on a CPU: without matrix units for it, half precision is several times
    slower there."""
    if hidden.device.type != "cpu" or hidden.dtype == torch.float32 or site.linearised:
        return site.expert(hidden, expert).float()
    alone = copy.copy(site.module)
    alone._parameters = {
        name: tensor if tensor is None else nn.Parameter(tensor[expert : expert + 1].float(), requires_grad=False)
        for name, tensor in site.module._parameters.items()
    }
    return replace(site, module=alone).expert(hidden.float(), 0)


class Router:
    """The block's own routing of some tokens, whatever experts are left; used as a context manager.

    The block runs up to the call of its experts, which ends it; what else it would have added (shared experts) is never
    computed where it comes behind, and skipped where it comes first.
    """

    def __init__(self, site: RoutedExperts, inputs: Tensor):
        self.site, self.inputs = site, inputs
        self.shared = [
            module
            for name, module in site.block.named_children()
            if "shared" in name and not isinstance(module, nn.Linear)
        ]

    def __enter__(self) -> Router:
        with ExitStack() as stack:
            stack.enter_context(intercepted((self.site,), _stop))
            for module in self.shared:
                module.__dict__["forward"] = lambda hidden, *args, **kwargs: hidden
                stack.callback(module.__dict__.pop, "forward")
            self.read = self._run(None, torch.arange(len(self.inputs)))[0]
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def route(self, alive: Sequence[int], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Experts int64 [t, k] by their original numbers and gates float32 [t, k] of the sampled `tokens` (int64 [t])
        once only `alive` is left, on the host (see `rerouting.Route`)."""
        kept = torch.tensor(alive)
        _, index, gates = self._run(kept if len(alive) < self.site.num_experts else None, tokens)
        return kept[index.cpu()], gates.float().cpu()

    def _run(self, kept: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with nullcontext() if kept is None else sliced_routing(self.site, kept):
            try:
                self.site.block(self.inputs[tokens.to(self.inputs.device)][None])
            except _Reached as reached:
                return reached.call
        raise UnusableError(
            f"layer {self.site.layer}: the block finished without calling its experts, so it cannot be re-routed."
        )


class _Reached(Exception):
    def __init__(self, call: tuple[Tensor, Tensor, Tensor]):
        self.call = call


def _stop(site: RoutedExperts, hidden: Tensor, index: Tensor, gates: Tensor, inner: Experts) -> Tensor:
    raise _Reached((hidden, index, gates))


def is_local(router: Router, num_experts: int, least: int) -> bool:
    """Does removing an expert leave the routing of the tokens that did not choose it as it was? Tried out on a few, in
    float32.

    Gates that are softmax values over all experts, not renormalised, are not: they grow as others leave. In half
    precision neither that nor a tie between two experts' logits could be told from rounding.
    """
    if num_experts <= least:
        return True
    tokens, everyone = torch.arange(min(PROBED_TOKENS, len(router.inputs))), list(range(num_experts))
    with _in_float32(router):
        index, gates = _dense(router.route(everyone, tokens), num_experts)
        for expert in everyone[:: max(1, num_experts // PROBED_EXPERTS)]:
            without, left = _dense(router.route([e for e in everyone if e != expert], tokens), num_experts)
            others = ~index[:, expert]
            rerouted = (without != index).any(1) & others
            if rerouted.sum() > ROUNDED * others.sum():
                return False
            same = others & ~rerouted
            if not torch.allclose(left[same], gates[same], rtol=1e-4, atol=1e-7):
                return False
    return True


@contextmanager
def _in_float32(router: Router) -> Iterator[None]:
    """The block's parameters beside its experts, and the inputs, in float32."""
    inputs, held = router.inputs, []
    left_out = {module for part in (router.site.module, *router.shared) for module in part.modules()}
    for module in router.site.block.modules():
        if module not in left_out:
            held += [
                (module._parameters, name, tensor) for name, tensor in module._parameters.items() if tensor is not None
            ]
    try:
        router.inputs = inputs.float()
        for store, name, tensor in held:
            store[name] = nn.Parameter(tensor.detach().float(), requires_grad=False)
        yield
    finally:
        router.inputs = inputs
        for store, name, tensor in held:
            store[name] = tensor


def _dense(routing: tuple[Tensor, Tensor], num_experts: int) -> tuple[Tensor, Tensor]:
    """Chosen experts bool and gates float32, [t, E]."""
    index, gates = routing
    chosen = torch.zeros(len(index), num_experts, dtype=torch.bool).scatter_(1, index, True)
    return chosen, torch.zeros(len(index), num_experts).scatter_(1, index, gates)
