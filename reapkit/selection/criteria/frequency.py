"""How often an expert is routed to. Torch-free."""

from __future__ import annotations

from numpy import ndarray

from reapkit.recipe.schema import SaliencySpec
from reapkit.selection.criteria.criterion import Criterion
from reapkit.selection.evidence import Evidence


def count(evidence: Evidence, spec: SaliencySpec) -> ndarray:
    """N, the positions routed to the expert, float64 [L, E]."""
    return evidence.totals.count


FREQUENCY = Criterion(
    name="frequency",
    summary="how many tokens are routed to the expert",
    explanation="how many positions were routed to the expert",
    symbols="N",
    function=count,
    reduction="sum",
    from_sums=True,
)
