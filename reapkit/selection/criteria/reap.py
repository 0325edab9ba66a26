"""REAP: the mean contribution of an expert to its layer's output while routed (arXiv 2510.13999). Torch-free."""

from __future__ import annotations

from numpy import ndarray

from reapkit.recipe.schema import SaliencySpec
from reapkit.selection.criteria.criterion import Criterion
from reapkit.selection.evidence import Evidence

REAP_CITATION = """@article{lasby2025reap,
  title={REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression},
  author={Lasby, Mike and Lazarevich, Ivan and Sinnadurai, Nish and Lie, Sean and Ioannou, Yani and \
Thangarasa, Vithursan},
  journal={arXiv preprint arXiv:2510.13999},
  year={2025},
  url={https://arxiv.org/abs/2510.13999}
}"""


def gate_norm_sum(evidence: Evidence, spec: SaliencySpec) -> ndarray:
    """Σgn over the positions routed to the expert, float64 [L, E]."""
    return evidence.totals.gate_norm_sum


REAP = Criterion(
    name="reap",
    summary="gate x norm of the expert's output, averaged over its tokens",
    explanation=(
        "g · ‖f(x)‖₂ over the positions routed to the expert, with g the gate weight the model applied and f(x) the"
        " expert's output"
    ),
    symbols="Σgn",
    function=gate_norm_sum,
    reduction="mean",
    columns=("gate_norm_sum",),
    from_sums=True,
    citations=(REAP_CITATION,),
)
