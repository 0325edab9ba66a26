"""EAN: expert activation norm, a sum by definition. Torch-free."""

from __future__ import annotations

from numpy import ndarray

from reapkit.recipe.schema import SaliencySpec
from reapkit.selection.criteria.criterion import Criterion
from reapkit.selection.evidence import Evidence


def norm_sum(evidence: Evidence, spec: SaliencySpec) -> ndarray:
    """Σn over the positions routed to the expert, float64 [L, E]."""
    return evidence.totals.norm_sum


EAN = Criterion(
    name="ean",
    summary="norm of the expert's output, summed over its tokens",
    explanation="the sum of ‖f(x)‖₂ over the positions routed to the expert",
    symbols="Σn",
    function=norm_sum,
    reduction="sum",
    columns=("norm_sum",),
    from_sums=True,
)
