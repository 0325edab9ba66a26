"""The mean norm of an expert's output while routed. Torch-free."""

from __future__ import annotations

from reapkit.selection.criteria.criterion import Criterion
from reapkit.selection.criteria.ean import norm_sum

EAN_MEAN = Criterion(
    name="ean-mean",
    summary="norm of the expert's output, averaged over its tokens",
    explanation="‖f(x)‖₂ over the positions routed to the expert",
    symbols="Σn",
    function=norm_sum,
    reduction="mean",
    columns=("norm_sum",),
    from_sums=True,
)
