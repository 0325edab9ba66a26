"""Finds the routed experts of any model that transformers dispatches, and intercepts their calls with the model's own
routing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from reapkit.checkpoint.projection_names import LOADED, Role
from reapkit.core.errors import UnusableError

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    class ExpertsModule(nn.Module):
        """What is read of a module of experts: what transformers' experts interface gives a class, and an expert of its
        own where they are linearised."""

        config: PretrainedConfig
        has_gate: bool
        has_bias: bool
        is_transposed: bool
        act_fn: Callable[[Tensor], Tensor]
        _apply_gate: Callable[[Tensor], Tensor]

        def __getitem__(self, expert: int) -> nn.Module: ...


IMPLEMENTATION = "reapkit"
GATE_ON_INPUT = (
    "Llama4TextMoe",
)  # blocks with their own experts loop, which scale the expert's input instead of its output
LINEARISED = "LinearExperts2D"
NOT_TEXT = ("vision", "visual", "audio", "talker", "code_predictor", "image")
EXAMPLES = (
    "qwen2_moe, qwen3_moe, qwen3_next, qwen3_vl_moe, glm4_moe, deepseek_v2, deepseek_v3, kimi_linear, minimax_m2,"
    " mixtral, gpt_oss, olmoe, ernie4_5_moe, granitemoe, phimoe, dots1, hunyuan_v1_moe, nemotron_h, gemma4, lfm2_moe,"
    " jamba, llama4"
)

Experts = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # hidden [tokens, hidden], index [tokens, top_k], gates [tokens, top_k] -> [tokens, hidden]


@dataclass(frozen=True, eq=False)
class RoutedExperts:
    """The routed experts of one decoder layer: the module that is called with (hidden, index, gates), and the block
    that calls it.
    """

    layer: int
    name: str
    module: ExpertsModule
    block: nn.Module
    num_experts: int
    gate_on_input: bool = False
    linearised: bool = False

    def expert(self, hidden: Tensor, expert: int) -> Tensor:
        """f(x) of one expert for `hidden` x, both [tokens, hidden] in the model's dtype, by the layout that the class
        declares to transformers' experts interface."""
        if self.linearised:
            return self.module[expert](hidden)
        inner = self.activation(hidden, expert)
        return (
            inner @ self.matrix(Role.DOWN)[expert]
            if self.gate_on_input
            else _linear(self.module, Role.DOWN, inner, expert)
        )

    def activation(self, hidden: Tensor, expert: int) -> Tensor:
        """What one expert's `down_proj` reads, [tokens, intermediate], for `hidden` [tokens, hidden]; both in the
        model's dtype."""
        module = self.module
        if self.gate_on_input:
            gate, up = (hidden @ self.matrix(Role.GATE_UP)[expert]).chunk(2, dim=-1)
            return up * module.act_fn(gate)
        inner = _linear(module, _first(module), hidden, expert)
        return module._apply_gate(inner) if module.has_gate else module.act_fn(inner)

    def matrix(self, role: Role) -> Tensor:
        """The experts' matrices of a role, stacked: [experts, rows, columns] in the model's dtype, as the module holds
        them."""
        return getattr(self.module, LOADED.word(role))

    def parameter(self, role: Role) -> str:
        """The name of `matrix(role)` in the model."""
        return f"{self.name}.{LOADED.word(role)}"

    @property
    def down_proj_is_transposed(self) -> bool:
        """Whether `down_proj[e]` is [intermediate, hidden], multiplied from the right."""
        return self.gate_on_input or bool(self.module.is_transposed)


def _first(module: ExpertsModule) -> Role:
    """The role of the matrix that reads the hidden states."""
    return Role.GATE_UP if module.has_gate else Role.UP


def _linear(module: ExpertsModule, role: Role, hidden: Tensor, expert: int) -> Tensor:
    weight, bias = _weight_and_bias(module, role)
    out = hidden @ weight[expert] if module.is_transposed else nn.functional.linear(hidden, weight[expert])
    return out if bias is None else out + bias[expert]


def _weight_and_bias(module: ExpertsModule, role: Role) -> tuple[Tensor, Tensor | None]:
    """The stacked matrices of a role, [experts, rows, columns], and their biases, [experts, outputs]."""
    name = LOADED.word(role)
    return getattr(module, name), getattr(module, f"{name}_bias") if module.has_bias else None


def find_experts(model: nn.Module) -> tuple[RoutedExperts, ...]:
    """Every layer of routed experts in the text model, in layer order.

    Raises UnusableError where there is none that transformers' experts interface (or an adapter here) lets us see.
    """
    found: dict[int, list[RoutedExperts]] = {}
    for name, block in model.named_modules():
        for child, module in block.named_children():
            linearised = is_linearised(module)
            adapted = type(block).__name__ in GATE_ON_INPUT and child == "experts" and not linearised
            if adapted or linearised or is_dispatched(module):
                path = f"{name}.{child}" if name else child
                layer = next((int(part) for part in path.split(".") if part.isdigit()), 0)
                found.setdefault(layer, []).append(
                    RoutedExperts(
                        layer, path, cast("ExpertsModule", module), block, _count(module), adapted, linearised
                    )
                )
    sites = [_text_experts(layer, candidates) for layer, candidates in sorted(found.items())]
    if not sites:
        raise UnusableError(
            f"model_type '{_model_type(model)}' hides its experts from transformers' experts interface, so it cannot be"
            f" observed. Known to work: {EXAMPLES}, and every other model that transformers dispatches through it."
        )
    return tuple(sites)


def is_dispatched(module: nn.Module) -> bool:
    """Does transformers dispatch this module's forward through its experts interface?"""
    return (
        hasattr(type(module).forward, "__wrapped__")
        and hasattr(module, "has_gate")
        and hasattr(module, "is_transposed")
    )


def is_linearised(module: nn.Module) -> bool:
    """Has llm-compressor replaced this experts module by a list of one MLP per expert, called with the same
    arguments?"""
    return any(kind.__name__ == LINEARISED for kind in type(module).__mro__)


def _count(module: nn.Module) -> int:
    return int(getattr(module, "num_experts", None) or getattr(module, LOADED.word(Role.DOWN)).shape[0])


def _text_experts(layer: int, candidates: Sequence[RoutedExperts]) -> RoutedExperts:
    text = [site for site in candidates if not any(word in site.name for word in NOT_TEXT)]
    if len(text) != 1:
        raise UnusableError(
            f"layer {layer} has {len(text)} sets of routed text experts ({', '.join(s.name for s in candidates)});"
            " only one is supported."
        )
    return text[0]


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


# ---------------------------------------------------------------------------------------------- interception


class Handler(Protocol):
    """What a call of watched experts goes to; `inner` is what would have run otherwise."""

    def __call__(
        self, site: RoutedExperts, hidden: Tensor, index: Tensor, gates: Tensor, /, inner: Experts
    ) -> Tensor: ...


@contextmanager
def intercepted(sites: Sequence[RoutedExperts], handler: Handler) -> Iterator[None]:
    """Inside the block every call of these experts goes to `handler(site, hidden, index, gates, inner)`.

    `inner(hidden, index, gates)` is what would have run otherwise; interceptions nest, the innermost block is called
    first.
    """
    undo: list[Callable[[], None]] = []
    inners = [
        site.module.__dict__.get("_routed_call") or _plain(site) for site in sites
    ]  # before a shared config changes
    try:
        for site, inner in zip(sites, inners, strict=True):
            undo.append(_redirect(site, functools.partial(handler, site, inner=inner)))
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _redirect(site: RoutedExperts, call: Experts) -> Callable[[], None]:
    module = site.module
    outer = module.__dict__.get("_routed_call")
    module.__dict__["_routed_call"] = call
    if outer is not None:
        return functools.partial(module.__dict__.__setitem__, "_routed_call", outer)
    if site.gate_on_input:
        block = cast("Llama4TextMoe", site.block)
        undo = _give_forward(block, functools.partial(_gate_on_input_block, block))
    elif site.linearised:
        undo = _give_forward(module, functools.partial(_dispatch_linearised, module))
    else:
        config, previous = module.config, module.config._experts_implementation
        config._experts_implementation = IMPLEMENTATION
        undo = functools.partial(setattr, config, "_experts_implementation", previous)

    def restore() -> None:
        del module.__dict__["_routed_call"]
        undo()

    return restore


def _give_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Gives this one module another forward; what is returned takes it away again."""
    before = module.__dict__.get("forward")
    module.forward = forward

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return undo


def _dispatch(module: nn.Module, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    call = module.__dict__.get("_routed_call")
    if call is None:  # a module that shares the config but is not watched, such as a vision tower's experts
        return _original(module)(hidden, index, gates)
    return call(hidden, index, gates)


def _dispatch_linearised(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    return module.__dict__["_routed_call"](hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _dispatch)


def _original(module: nn.Module) -> Experts:
    """The fastest implementation transformers has for the module where it is: its own loop on a CPU, grouped kernels on
    a GPU.
    """
    if next(module.parameters()).device.type == "cpu":
        return functools.partial(type(module).forward.__wrapped__, module)
    return functools.partial(grouped_mm_experts_forward, module)


def _plain(site: RoutedExperts) -> Experts:
    if site.gate_on_input:
        return functools.partial(_sum_over_pairs, site)
    if site.linearised:
        return functools.partial(type(site.module).forward, site.module)
    name = site.module.config._experts_implementation
    if name in (None, "eager", IMPLEMENTATION):
        return _original(site.module)
    return functools.partial(ALL_EXPERTS_FUNCTIONS[name], site.module)


def _gate_on_input_block(block: Llama4TextMoe, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """llama4's block with its own router, spelled as a call of (hidden, index, gates)."""
    hidden = hidden.reshape(-1, block.hidden_dim)
    scores, logits = block.router(hidden)
    index = torch.topk(logits, block.router.top_k, dim=1)[1]
    routed = block.experts.__dict__["_routed_call"](hidden, index, scores.gather(1, index))
    return block.shared_expert(hidden).add_(routed), logits


def _sum_over_pairs(site: RoutedExperts, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    return observed_forward(site, hidden, index, gates)[0]


# ---------------------------------------------------------------------------------------------- what each expert puts
# out


@dataclass(frozen=True, eq=False)
class Pairs:
    """The (token, slot) pairs of one call, sorted by expert: position in the flattened index, expert, and the output's
    size.

    `order` int64 [pairs]: pair -> token * top_k + slot. `expert` int64 [pairs]. `gate`, `norm` (L2, before the gate)
    and `peak` (largest magnitude of a component) float32 [pairs]. `top_k`: slots per token.
    """

    order: Tensor
    expert: Tensor
    gate: Tensor
    norm: Tensor
    peak: Tensor
    top_k: int

    def by_slot(self, values: Tensor) -> Tensor:
        """Per-pair `values` [pairs] back as [tokens, top_k], in their dtype."""
        out = torch.empty_like(values)
        out[self.order] = values
        return out.view(-1, self.top_k)


def observed_forward(site: RoutedExperts, hidden: Tensor, index: Tensor, gates: Tensor) -> tuple[Tensor, Pairs]:
    """What the experts module returns, [tokens, hidden] in the dtype of `hidden`, and what each pair put out before its
    gate.

    `hidden`: [tokens, hidden] in the model's dtype; `index`: int64 [tokens, top_k], experts; `gates`: [tokens, top_k],
    in the dtype the router hands them over in. Where the gate scales the input (llama4), norm is ‖f(g·x)‖ / g, so that
    gate times norm is what the pair adds to the output, and the peak is that of f(g·x).
    """
    expert, order = torch.sort(index.reshape(-1), stable=True)
    gate = gates.reshape(-1)[order]
    run = _grouped if _has_grouped_kernels(hidden.device) and not site.linearised else _loop_over_experts
    out, norm, peak = run(site, hidden, expert, order // index.shape[1], order, gate)
    return out, Pairs(order, expert, gate.float(), norm, peak, index.shape[1])


def _loop_over_experts(
    site: RoutedExperts, hidden: Tensor, expert: Tensor, token: Tensor, order: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the experts that were chosen; every intermediate stays in cache, so this beats a grouped call on a
    CPU."""
    out = torch.zeros_like(hidden)
    norm, peak = hidden.new_empty(len(expert), dtype=torch.float32), hidden.new_empty(len(expert), dtype=torch.float32)
    start = 0
    for number, pairs in enumerate(torch.bincount(expert, minlength=site.num_experts).tolist()):
        if pairs == 0:
            continue
        part = slice(start, start := start + pairs)
        rows, g = token[part], gate[part, None]
        x = hidden[rows]
        y = site.expert(x * g if site.gate_on_input else x, number)
        norm[part], peak[part] = _sizes(y)
        out.index_add_(0, rows, (y if site.gate_on_input else y * g).to(out.dtype))
    if site.gate_on_input:
        norm = norm / gate.float()
    return out, norm, peak


def _grouped(
    site: RoutedExperts, hidden: Tensor, expert: Tensor, token: Tensor, order: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped kernels over the sorted pairs: no host synchronisation, no float atomics, one more read of what the
    experts put out than the plain forward.
    """
    x = hidden[token]
    if site.gate_on_input:
        y = torch.stack(
            [site.expert(x * gate[:, None], number) for number in range(site.num_experts)]
        )  # dense, as the model's own
        y = y[expert, torch.arange(len(expert), device=expert.device)]
    else:
        module = site.module
        ends = torch.searchsorted(expert, torch.arange(site.num_experts, device=expert.device), right=True).int()
        inner = _grouped_linear(module, _first(module), x, expert, ends)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        y = _grouped_linear(module, Role.DOWN, inner, expert, ends)
    norm, peak = _sizes(y)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    weighted = y if site.gate_on_input else y * gate[:, None]
    out = weighted[place].view(hidden.shape[0], -1, y.shape[-1]).sum(dim=1).to(hidden.dtype)
    return out, norm / gate.float() if site.gate_on_input else norm, peak


def _grouped_linear(module: ExpertsModule, role: Role, rows: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
    """`_linear` on rows [pairs, in] sorted by expert; `ends` int32 [experts]: where each expert's rows end."""
    weight, bias = _weight_and_bias(module, role)
    out = nn.functional.grouped_mm(rows, weight if module.is_transposed else weight.transpose(-2, -1), offs=ends)
    return out if bias is None else out.add_(bias[expert])


def _sizes(y: Tensor) -> tuple[Tensor, Tensor]:
    """L2 norm and largest magnitude per row, float32; the infinity norm is one kernel on a GPU and 15x slower than this
    on a CPU.
    """
    peak = y.abs().amax(dim=-1) if y.device.type == "cpu" else torch.linalg.vector_norm(y, ord=float("inf"), dim=-1)
    return torch.linalg.vector_norm(y, dim=-1, dtype=torch.float32), peak.float()


def kernels_on(device: torch.device) -> str:
    """What `observed_forward` runs there, for the record."""
    return "grouped_mm" if _has_grouped_kernels(device) else "loop over experts"


def _has_grouped_kernels(device: torch.device) -> bool:
    """PyTorch's need a GPU of compute capability 8.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
