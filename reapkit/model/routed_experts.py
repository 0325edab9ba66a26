"""Finds the routed experts of any model that transformers dispatches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from reapkit.checkpoint.projection_names import LOADED, Role
from reapkit.core.errors import UnusableError
from reapkit.model.causal_lm import text_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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


GATE_ON_INPUT = (
    "Llama4TextMoe",
)  # blocks with their own experts loop, which scale the expert's input instead of its output
LINEARISED = "LinearExperts2D"
CALL = ("hidden_states", "top_k_index", "top_k_weights")
"""What transformers' experts interface calls experts with."""
NOT_TEXT = ("vision", "visual", "audio", "talker", "code_predictor", "image")
EXAMPLES = (
    "qwen2_moe, qwen3_moe, qwen3_next, qwen3_vl_moe, glm4_moe, deepseek_v2, deepseek_v3, kimi_linear, minimax_m2,"
    " mixtral, gpt_oss, olmoe, ernie4_5_moe, granitemoe, phimoe, dots1, hunyuan_v1_moe, nemotron_h, gemma4, lfm2_moe,"
    " jamba, llama4, step3p7"
)

Experts = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # hidden [tokens, hidden], index [tokens, top_k], gates [tokens, top_k] -> [tokens, hidden]


@dataclass(frozen=True, eq=False)
class RoutedExperts:
    """The routed experts of one decoder layer: the module that is called with (hidden, index, gates), the block that
    calls it, and the layer whose output is the residual stream behind them (the block itself where layers have no
    numbers).
    """

    layer: int
    name: str
    module: ExpertsModule
    block: nn.Module
    num_experts: int
    decoder_layer: nn.Module
    gate_on_input: bool = False
    linearised: bool = False
    own_loop: bool = False

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
        return activated(module, _linear(module, first_role(module), hidden, expert))

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
        return self.gate_on_input or is_transposed(self.module)


def first_role(module: ExpertsModule) -> Role:
    """The role of the matrix that reads the hidden states."""
    return Role.GATE_UP if has_gate(module) else Role.UP


def has_gate(module: ExpertsModule) -> bool:
    """Whether the first matrix holds a gate beside what it multiplies; classes that transformers does not dispatch say
    it by their parameters alone."""
    return getattr(module, "has_gate", hasattr(module, LOADED.word(Role.GATE_UP)))


def is_transposed(module: ExpertsModule) -> bool:
    """Whether the stacked matrices are multiplied from the right."""
    return bool(getattr(module, "is_transposed", False))


def activated(module: ExpertsModule, inner: Tensor) -> Tensor:
    """What the last matrix reads, [tokens, intermediate], of what the first puts out, [tokens, outputs]; both in the
    model's dtype."""
    return module._apply_gate(inner) if has_gate(module) else module.act_fn(inner)


def _linear(module: ExpertsModule, role: Role, hidden: Tensor, expert: int) -> Tensor:
    weight, bias = weight_and_bias(module, role)
    out = hidden @ weight[expert] if is_transposed(module) else nn.functional.linear(hidden, weight[expert])
    return out if bias is None else out + bias[expert]


def weight_and_bias(module: ExpertsModule, role: Role) -> tuple[Tensor, Tensor | None]:
    """The stacked matrices of a role, [experts, rows, columns], and their biases, [experts, outputs], both in the
    model's dtype."""
    name = LOADED.word(role)
    return getattr(module, name), getattr(module, f"{name}_bias", None)


def find_experts(model: nn.Module) -> tuple[RoutedExperts, ...]:
    """Every layer of routed experts in the text model, in layer order.

    Raises UnusableError where there is none that transformers' experts interface (or an adapter here) lets us see.
    """
    found = _experts_by_layer(model, text_model(model)) or _experts_by_layer(model, model)
    sites = [_text_experts(layer, candidates) for layer, candidates in sorted(found.items())]
    if not sites:
        raise UnusableError(
            f"model_type '{_model_type(model)}' hides its experts from transformers' experts interface, so it cannot be"
            f" observed. Known to work: {EXAMPLES}, and every other model that transformers dispatches through it."
        )
    return tuple(sites)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's layers and the name of their list: that which holds the routed experts, whatever it is called and
    whatever towers lie beside it."""
    first = find_experts(model)[0]
    name = first.name.partition(f".{first.layer}.")[0]
    return name, cast(nn.ModuleList, model.get_submodule(name))


def _experts_by_layer(model: nn.Module, part: nn.Module) -> dict[int, list[RoutedExperts]]:
    """The experts in a part of the model, under their names in the model; several in a layer where not all are of
    text."""
    found: dict[int, list[RoutedExperts]] = {}
    inside = {id(module) for module in part.modules()}
    for name, block in model.named_modules():
        for child, module in block.named_children() if id(block) in inside else ():
            linearised = is_linearised(module)
            adapted = type(block).__name__ in GATE_ON_INPUT and child == "experts" and not linearised
            own_loop = not (adapted or linearised or is_dispatched(module)) and is_called_alike(module)
            if adapted or linearised or own_loop or is_dispatched(module):
                path = f"{name}.{child}" if name else child
                layer, place = _numbered(path)
                around = model.get_submodule(place) if place else block
                experts = cast("ExpertsModule", module)
                found.setdefault(layer, []).append(
                    RoutedExperts(layer, path, experts, block, _count(module), around, adapted, linearised, own_loop)
                )
    return found


def is_called_alike(module: nn.Module) -> bool:
    """Are these stacked experts that are called, and compute, as transformers' interface has them, though it does not
    dispatch them: gate and up in one matrix, joined by a method of the class, nothing but routed experts?"""
    up, down = (getattr(module, LOADED.word(role), None) for role in (Role.GATE_UP, Role.DOWN))
    return (
        isinstance(up, nn.Parameter)
        and isinstance(down, nn.Parameter)
        and hasattr(type(module), "_apply_gate")
        and list(inspect.signature(type(module).forward).parameters)[1:] == list(CALL)
        and up.shape[0] == down.shape[0] == getattr(module, "num_experts", None)
        and up.shape[1:] == (2 * down.shape[2], down.shape[1])
    )


def _numbered(path: str) -> tuple[int, str | None]:
    """The layer that a module's path names first, and the path up to there; (0, None) where it names none."""
    parts = path.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return (0, None) if at is None else (int(parts[at]), ".".join(parts[: at + 1]))


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
