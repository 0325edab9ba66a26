"""Random numbers: the control that every criterion must beat. Torch-free."""

from __future__ import annotations

import random

import numpy as np
from numpy import ndarray

from reapkit.recipe.schema import SaliencySpec
from reapkit.selection.criteria.criterion import Criterion
from reapkit.selection.evidence import Evidence


def uniform(evidence: Evidence, spec: SaliencySpec) -> ndarray:
    """Numbers in [0, 1) by seed and decoder layer, float64 [L, E], the same on every platform."""
    experts = evidence.observation.num_experts
    rows: list[list[float]] = []
    for layer in evidence.observation.layers:
        draw = random.Random(f"{spec.seed}:{layer}")
        rows.append([draw.random() for _ in range(experts)])
    return np.array(rows)


RANDOM = Criterion(
    name="random",
    summary="a control that every criterion must beat",
    explanation="random numbers, as a control",
    symbols=lambda spec: f"random (seed {spec.seed})",
    function=uniform,
    settings=("seed",),
)
