"""Runs routed experts as their module does, and says what each (token, slot) pair put out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reapkit.checkpoint.projection_names import Role
from reapkit.model.routed_experts import RoutedExperts, activated, first_role, is_transposed, weight_and_bias

if TYPE_CHECKING:
    from reapkit.model.routed_experts import ExpertsModule


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
        inner = _grouped_linear(module, first_role(module), x, expert, ends)
        y = _grouped_linear(module, Role.DOWN, activated(module, inner), expert, ends)
    norm, peak = _sizes(y)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    weighted = y if site.gate_on_input else y * gate[:, None]
    out = weighted[place].view(hidden.shape[0], -1, y.shape[-1]).sum(dim=1).to(hidden.dtype)
    return out, norm / gate.float() if site.gate_on_input else norm, peak


def _grouped_linear(module: ExpertsModule, role: Role, rows: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
    """`_linear` on rows [pairs, in] sorted by expert; `ends` int32 [experts]: where each expert's rows end."""
    weight, bias = weight_and_bias(module, role)
    out = nn.functional.grouped_mm(rows, weight if is_transposed(module) else weight.transpose(-2, -1), offs=ends)
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
