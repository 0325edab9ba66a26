"""Finds which linear layer of a loaded model with linearised experts holds which tensor of the source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.projection_names import LINEARISED, expert_tensor
from reapkit.core.errors import UnusableError
from reapkit.model.loaded_names import LoadedNames
from reapkit.quantization.targets import Matrix, Targets, expert_pieces
from reapkit.quantization.writing import read_tensor


def place_matrices(
    model: nn.Module, names: LoadedNames, checkpoint: Checkpoint, plan: Targets
) -> dict[str, dict[str, nn.Linear]]:
    """Source tensor -> {prefix to write: the linear that holds it}; a stack of experts becomes one prefix per expert
    and projection.

    Which of an expert's linears is which tensor is decided by value, so no naming habit is trusted. Raises
    UnusableError where a matrix has no counterpart.
    """
    modules = dict(model.named_modules())
    places: dict[str, dict[str, nn.Linear]] = {}
    for name, matrix in plan.matrices.items():
        parameter = names.rename(name)
        if len(matrix.tensor.shape) == 3:
            places[name] = _stack(matrix, modules, parameter)
            continue
        module = modules.get(parameter.removesuffix(".weight"))
        if not isinstance(module, nn.Linear):
            found = expert_tensor(name)
            expert = modules.get(f"{parameter.rpartition('.')[0]}.{found.expert}") if found else None
            if expert is None:
                raise UnusableError(
                    f"{checkpoint.path}: {name} becomes {parameter} in {type(model).__name__}, which is not a linear"
                    f" layer. Add {matrix.module} to quantize.ignore."
                )
            module = _by_value(expert, read_tensor(checkpoint, name), matrix, checkpoint)
        places[name] = {matrix.module: module}
    return places


def _by_value(expert: nn.Module, weight: Tensor, matrix: Matrix, checkpoint: Checkpoint) -> nn.Linear:
    """The linear that holds these values; the one of the same role is looked at first, and wins where several do."""
    named = None if matrix.role is None else getattr(expert, LINEARISED.word(matrix.role), None)
    linears = [module for module in expert.modules() if isinstance(module, nn.Linear)]
    for module in sorted(linears, key=lambda module: module is not named):
        held = module.weight
        if held.shape == weight.shape and torch.equal(held.cpu(), weight.to(held.dtype)):
            return module
    raise UnusableError(
        f"{checkpoint.path}: no linear layer of the loaded expert holds {matrix.tensor.name}. transformers converts"
        " this architecture's experts on loading; quantize it with method: rtn."
    )


def _stack(matrix: Matrix, modules: Mapping[str, nn.Module], parameter: str) -> dict[str, nn.Linear]:
    """The linears of a stacked expert tensor under the names they are written by."""
    experts = cast(nn.ModuleList, modules[parameter.rpartition(".")[0]])
    return {
        piece.prefix: getattr(experts[piece.expert], LINEARISED.word(piece.role)) for piece in expert_pieces(matrix)
    }
