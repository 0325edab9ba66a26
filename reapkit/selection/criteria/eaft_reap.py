"""EAFT-REAP: REAP with each position weighed by how sure and how right the model was there (after EAFT, arXiv
2601.02151). Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy import ndarray

from reapkit.observation.materials import EAFT_SIGNALS
from reapkit.recipe.schema import SaliencySpec
from reapkit.selection.criteria.criterion import Criterion, Kept, Remarks
from reapkit.selection.criteria.reap import REAP, REAP_CITATION
from reapkit.selection.eaft import region_weights, summarise, weights_without_conflict
from reapkit.selection.evidence import Evidence

SMALL_CONFLICT_SHARE = 0.005
EAFT_CITATION = """@article{diao2026eaft,
  title={Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting},
  author={Diao, Muxi and Yang, Lele and Gong, Wuxuan and Zhang, Yutong and Yan, Zhonghao and Han, Yufei and \
Liang, Kongming and Xu, Weiran and Ma, Zhanyu},
  journal={arXiv preprint arXiv:2601.02151},
  year={2026},
  url={https://arxiv.org/abs/2601.02151}
}"""


def weighed_sum(evidence: Evidence, spec: SaliencySpec) -> ndarray:
    """Σ w·g·n over the positions with a signal that are routed to the expert, signed, float64 [L, E]."""
    return evidence.regions.sums(evidence.alphas, region_weights(spec.eaft))


def positions_with_signal(evidence: Evidence) -> ndarray:
    """N over the positions with a signal, float64 [L, E]."""
    return evidence.regions.counts(evidence.alphas)


def remarks(evidence: Evidence, spec: SaliencySpec, kept: Kept, kept_by: Callable[[ndarray], Kept]) -> Remarks:
    """The regions, and how many kept experts would be others if conflict positions weighed what the rest weighs.

    `kept_by`: the experts that would be kept by other numbers, float64 [L, E].
    """
    sums = evidence.regions.sums(evidence.alphas, weights_without_conflict(spec.eaft))
    without = kept_by(EAFT_REAP.ranked(EAFT_REAP.reduced(sums, evidence, spec), evidence))
    changed = {str(layer): len(set(kept[layer]) - set(experts)) for layer, experts in without.items()}
    found = summarise(evidence.regions, evidence.observation.sources, evidence.alphas) | {
        "changed_by_conflict": sum(changed.values()),
        "changed_by_conflict_by_layer": {layer: count for layer, count in changed.items() if count},
    }
    return Remarks({"eaft": found}, conflict_warnings(found, len(evidence.observation.sources)))


def conflict_warnings(found: Mapping[str, Any], sources: int) -> list[str]:
    """A weight that cannot matter must not be believed to."""
    share, weight = found["shares"]["all"]["conflict"], found["weights"]["conflict"]
    pooled = "pooled" in found["thresholds"] and sources > 1
    better = "saliency.eaft.thresholds: per-source, " if pooled else ""
    advice = f"Try {better}larger quantiles, or criterion: {REAP.name}."
    if found["changed_by_conflict"] == 0:
        return [
            f"the conflict term of {EAFT_REAP.name} changed no kept expert ({share:.2%} of positions are in conflict)."
            f" {advice}"
        ]
    if share < SMALL_CONFLICT_SHARE:
        return [
            f"{share:.2%} of positions are in conflict, so the conflict weight {weight:g} can hardly matter: of the "
            f"kept experts it changed {found['changed_by_conflict']}. {advice}"
        ]
    return []


EAFT_REAP = Criterion(
    name="eaft-reap",
    summary="reap with tokens weighed by how sure and how right the model was there",
    explanation=(
        "w · g · ‖f(x)‖₂ over the positions routed to the expert, with w by how sure and how right the model was there"
    ),
    symbols="Σwgn",
    function=weighed_sum,
    reduction="mean",
    counts=positions_with_signal,
    materials=(EAFT_SIGNALS,),
    settings=("eaft",),
    citations=(REAP_CITATION, EAFT_CITATION),
    remarks=remarks,
)
