"""REAP's contribution relative to the residual stream, squared and summed. Torch-free."""

from __future__ import annotations

from numpy import ndarray

from reapkit.recipe.schema import SaliencySpec
from reapkit.selection.criteria.criterion import Criterion
from reapkit.selection.criteria.reap import REAP_CITATION
from reapkit.selection.evidence import Evidence


def relative_sq_sum(evidence: Evidence, spec: SaliencySpec) -> ndarray:
    """Σ(gn/‖r‖)² over the positions routed to the expert, float64 [L, E]; r is the residual stream behind the layer."""
    return evidence.totals.relative_sq_sum


REAP_RELATIVE = Criterion(
    name="reap-relative",
    summary="squared share of the expert's gate x norm in the residual stream behind the layer, summed over its tokens",
    explanation=(
        "the sum of (g · ‖f(x)‖₂ / ‖r‖₂)² over the positions routed to the expert, with g the gate weight the model"
        " applied, f(x) the expert's output and r the residual stream behind the layer"
    ),
    symbols="Σ(gn/‖r‖)²",
    function=relative_sq_sum,
    reduction="sum",
    columns=("relative_sq_sum",),
    from_sums=True,
    citations=(REAP_CITATION,),
)
