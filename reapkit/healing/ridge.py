"""Re-fits the kept experts' output matrices in closed form, so that they make up for the dropped experts. Pure maths.

A layer adds Σ_e φ_te W_eᵀ to the residual stream, with φ_te the expert's activation before its last matrix times its
gate. With E_t = r_t − r̃_t, what the pruned layer lacks of the original's residual stream, the corrections D_e minimise

    Σ_t w_t ‖E_t − Σ_e φ_te D_eᵀ‖² + λ Σ_e ‖D_e‖²,   w_t = 1/‖r_t‖²,

expert by expert (block coordinate descent), each step a ridge regression towards the old weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""λ in units of the mean diagonal entry of the experts' Gram matrices; held-out rows choose among them."""
SWEEPS = 2


@dataclass(frozen=True, eq=False)
class ExpertFeatures:
    """One kept expert on the tokens routed to it: `rows` int64 [n], and `features()` float32 [n, intermediate]."""

    rows: Tensor
    features: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Refit:
    """Corrections by expert, [hidden, intermediate] float32, and the error shares that they leave.

    `fitted` and `held_out`: Σ w‖E‖² after over before, on the rows that the fit saw and on those kept from it;
    `strength` is None where no strength helped on the latter, and then there are no corrections.
    """

    corrections: Mapping[int, Tensor]
    strength: float | None
    fitted: float
    held_out: float


def refit(
    experts: Mapping[int, ExpertFeatures],
    error: Tensor,
    weight: Tensor,
    held_out: Tensor,
    strengths: Sequence[float] = STRENGTHS,
    sweeps: int = SWEEPS,
) -> Refit:
    """The corrections whose strength leaves the least error on held-out rows.

    `error` float32 [tokens, hidden]: E. `weight` float32 [tokens]: w. `held_out` bool [tokens]: rows that only judge.
    Sums are float32 products of the device, systems are solved in float64.
    """
    before = _share(error, weight, held_out)
    scale = _mean_diagonal(experts, weight, ~held_out)
    best = Refit({}, None, 1.0, 1.0)
    if scale <= 0:
        return best
    for strength in strengths:
        corrections, left = descend(experts, error, torch.where(held_out, 0.0, weight), strength * scale, sweeps)
        after = _share(left, weight, held_out)
        fitted, judged = (_ratio(new, old) for new, old in zip(after, before, strict=True))
        if judged < best.held_out:
            best = Refit(corrections, strength, fitted, judged)
    return best


def descend(
    experts: Mapping[int, ExpertFeatures], error: Tensor, weight: Tensor, ridge: float, sweeps: int = SWEEPS
) -> tuple[dict[int, Tensor], Tensor]:
    """Corrections D float32 [hidden, intermediate] by expert after `sweeps` rounds over the experts in order, and the
    error left, float32 [tokens, hidden].

    `error` E float32 [tokens, hidden] and `weight` w float32 [tokens] as `refit` takes them; `ridge`: λ itself.
    """
    left = error.clone()
    found: dict[int, Tensor] = {}
    for _ in range(sweeps):
        for expert, seen in experts.items():
            if not len(seen.rows):
                continue
            phi = seen.features()
            target = left[seen.rows]
            if expert in found:
                target = target + phi @ found[expert].T
            found[expert] = _ridge(phi, target, weight[seen.rows], ridge)
            left[seen.rows] = target - phi @ found[expert].T
    return found, left


def _ridge(phi: Tensor, target: Tensor, weight: Tensor, ridge: float) -> Tensor:
    weighted = phi * weight[:, None]
    gram = (phi.T @ weighted).double()
    gram.diagonal().add_(ridge)
    return torch.linalg.solve(gram, (weighted.T @ target).double()).T.to(phi.dtype)


def _mean_diagonal(experts: Mapping[int, ExpertFeatures], weight: Tensor, seen: Tensor) -> float:
    total, count = 0.0, 0
    for expert in experts.values():
        phi, rows = expert.features(), expert.rows
        total += float((phi.square() * (weight * seen)[rows][:, None]).sum(dtype=torch.float64))
        count += phi.shape[1]
    return total / max(count, 1)


def _share(error: Tensor, weight: Tensor, held_out: Tensor) -> tuple[float, float]:
    each = error.square().sum(1).double() * weight
    return float(each[~held_out].sum()), float(each[held_out].sum())


def _ratio(new: float, old: float) -> float:
    return new / old if old > 0 else 1.0
