"""How much gate weight an expert receives. Torch-free."""

from __future__ import annotations

from numpy import ndarray

from reapkit.recipe.schema import SaliencySpec
from reapkit.selection.criteria.criterion import Criterion
from reapkit.selection.evidence import Evidence


def gate_sum(evidence: Evidence, spec: SaliencySpec) -> ndarray:
    """Σg over the positions routed to the expert, float64 [L, E]."""
    return evidence.totals.gate_sum


WEIGHTED_FREQUENCY = Criterion(
    name="weighted-frequency",
    summary="how much gate weight the expert receives",
    explanation="the gate weight the expert received",
    symbols="Σg",
    function=gate_sum,
    reduction="sum",
    columns=("gate_sum",),
    from_sums=True,
)
