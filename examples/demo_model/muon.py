"""Muon: momentum whose matrix is orthogonalised before each step, so that all directions move equally far."""

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration by Keller Jordan (2024), "Muon: an optimizer for hidden layers"."""


class Muon(torch.optim.Optimizer):
    """Muon for matrices `[rows, columns]` and stacks of them `[experts, rows, columns]`, each orthogonalised alone.

    A parameter with the attribute `halves = 2` is two matrices fused along its rows.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.02) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: torch.Tensor, group: dict) -> None:
        state = self.state[parameter]
        average = state.setdefault("average", torch.zeros_like(parameter))
        average.lerp_(parameter.grad, 1 - group["momentum"])
        update = parameter.grad.lerp(average, group["momentum"])
        matrices = update.reshape(-1, update.shape[-2] // getattr(parameter, "halves", 1), update.shape[-1])
        scale = max(1.0, matrices.shape[-2] / matrices.shape[-1]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalised(matrices).reshape(parameter.shape), alpha=-group["lr"] * scale)


def orthogonalised(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """The stack `[n, rows, columns]` with every singular value brought near 1."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    linear, cubic, quintic = NEWTON_SCHULZ
    for _ in range(iterations):
        square = x @ x.mT
        x = linear * x + (cubic * square + quintic * square @ square) @ x
    return x.mT if tall else x
