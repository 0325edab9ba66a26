"""Makes selections from an observation: saliency, protection, allocation, and warnings about the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy import ndarray

from reapkit.checkpoint.architecture import Architecture
from reapkit.core.errors import RecipeError, UnusableError
from reapkit.core.formatting import ranges
from reapkit.observation.observation import Observation
from reapkit.recipe.schema import PruneSpec, SaliencySpec
from reapkit.selection.allocation import (
    BY_HAND,
    CORE,
    NEVER_ROUTED,
    SUPER,
    LayerRanking,
    global_counts,
    global_cut,
    reasons,
    uniform_counts,
)
from reapkit.selection.candidates import Candidate, candidates
from reapkit.selection.criteria.criterion import Criterion, Remarks
from reapkit.selection.criteria.registry import criterion
from reapkit.selection.evidence import Evidence
from reapkit.selection.layer_budget import LayerBudget, kept_unit, layer_budgets
from reapkit.selection.selection import LayerSelection, Selection

NEAR_TIE = 1e-4  # relative: what another device's kernels may turn round
SUPER_QUANTILE, SUPER_FRACTION, SUPER_DEPTH = 0.995, 0.1, 0.75


@dataclass(frozen=True, eq=False)
class Shared:
    """What all candidates of one decision have in common: the observation and what follows from it, protected
    experts."""

    evidence: Evidence
    architecture: Architecture
    protected: tuple[Mapping[int, str], ...]

    def rankings(self, values: ndarray, criterion: Criterion) -> dict[int, LayerRanking]:
        """By layer, from saliency `values` float64 [L, E] and the criterion's order and costs of removal, where it has
        them."""
        layers, groups = self.evidence.observation.layers, self.architecture.n_group
        rows = zip(layers, values.tolist(), self.protected, strict=True)
        plain = {layer: LayerRanking(tuple(row), kept, groups) for layer, row, kept in rows}
        if criterion.removal is None:
            return plain
        found = criterion.removal(self.evidence)
        orders = found.order or (None,) * len(layers)
        measured = zip(layers, orders, found.cost.tolist(), found.measured.tolist(), strict=True)
        return {
            layer: replace(plain[layer], path=order, costs=tuple(cost)) if is_measured else plain[layer]
            for layer, order, cost, is_measured in measured
        }


@dataclass(frozen=True, eq=False)
class CandidateTerms:
    """What one candidate asks for: its budget by decoder layer, in steps of `unit` experts, spent by its allocation."""

    criterion: Criterion
    spec: SaliencySpec
    prune: PruneSpec
    budgets: Mapping[int, LayerBudget]
    unit: int

    def counts(self, rankings: Mapping[int, LayerRanking], allocation: str | None = None) -> dict[int, int]:
        """Kept experts by layer, under this or another allocation of the same budget.

        Multi-token-prediction blocks are built with the one number that config.json says, the largest: they keep as
        many as the decoder layer that keeps most, and take no part in the allocation.
        """
        decoder = self.decoder(rankings)
        counts = (
            global_counts(decoder, self.budgets, self.unit)
            if (allocation or self.prune.allocation) == "global"
            else uniform_counts(decoder, self.budgets)
        )
        beyond = {layer: ranking for layer, ranking in rankings.items() if layer not in decoder}
        return counts | uniform_counts(beyond, {layer: _fixed(max(counts.values())) for layer in beyond})

    def decoder(self, rankings: Mapping[int, LayerRanking]) -> dict[int, LayerRanking]:
        """The rankings of layers that have a budget of their own."""
        return {layer: ranking for layer, ranking in rankings.items() if layer in self.budgets}


def _fixed(count: int) -> LayerBudget:
    return LayerBudget(count, count, count, count)


def decoder_layers(observation: Observation, architecture: Architecture) -> tuple[int, ...]:
    """The observation's layers without multi-token-prediction blocks."""
    return tuple(layer for layer in observation.layers if layer < architecture.num_hidden_layers)


def select(
    observation: Observation,
    saliency: SaliencySpec,
    prune: PruneSpec,
    architecture: Architecture,
    candidate: Candidate | None = None,
) -> Selection:
    """Decides from an observation which experts go; the same input gives the same selection, without the model.

    `candidate` takes the place of the recipe's criterion, ratio, allocation and top-k. Raises RecipeError where the
    budget, the caps and what is protected contradict each other, UnusableError where the observation lacks what the
    criterion needs.
    """
    return select_all(observation, saliency, prune, architecture, None if candidate is None else (candidate,))[0]


def select_all(
    observation: Observation,
    spec: SaliencySpec,
    prune: PruneSpec,
    architecture: Architecture,
    chosen: Sequence[Candidate] | None = None,
) -> tuple[Selection, ...]:
    """One selection per candidate (default: the recipe's own grid, in its order).

    What candidates share (EAFT regions, super experts, saliency by criterion) is computed once. Raises as `select`.
    """
    decoder = decoder_layers(observation, architecture)
    if chosen is None:
        chosen = candidates(prune, spec, architecture, decoder)
    evidence = Evidence.of(observation, spec)
    shared = Shared(evidence, architecture, _protected(evidence, prune, len(decoder)))
    criteria = {candidate.criterion: (criterion(candidate.criterion), candidate.saliency(spec)) for candidate in chosen}
    rankings = {name: shared.rankings(one.saliency(evidence, own), one) for name, (one, own) in criteria.items()}
    return tuple(
        _selection(shared, candidate, _terms(candidate, spec, prune, shared), rankings[candidate.criterion])
        for candidate in chosen
    )


def super_experts(activation_max: ndarray) -> list[list[int]]:
    """Experts with massive activations by layer (arXiv 2507.23279): `activation_max` float32 [L, E] above its limit in
    early layers.

    The limit is the larger of the 99.5th percentile over all layers (linear interpolation) and a tenth of the maximum;
    early is the first 75 % of the layers.
    """
    values = activation_max.astype(np.float64)
    limit = max(float(np.quantile(values, SUPER_QUANTILE)), SUPER_FRACTION * float(values.max()))
    deepest = int(len(values) * SUPER_DEPTH)
    return [np.flatnonzero(row > limit).tolist() if layer < deepest else [] for layer, row in enumerate(values)]


def _protected(evidence: Evidence, prune: PruneSpec, depth: int) -> tuple[dict[int, str], ...]:
    """Expert -> reason by layer; what is protected by hand says so before super expert, and that before core. Super
    experts are looked for in the first `depth` layers, the decoder's.
    """
    observation = evidence.observation
    protected: tuple[dict[int, str], ...] = tuple({} for _ in observation.layers)
    if prune.protect.core_per_layer:
        mass = evidence.regions.good_mass(evidence.alphas)
        top = np.argsort(-mass, axis=1, kind="stable")[:, : prune.protect.core_per_layer]
        for layer, experts in enumerate(top.tolist()):
            protected[layer].update({expert: CORE for expert in experts if mass[layer, expert] > 0})
    if prune.protect.super_experts:
        if "activation_max" not in observation.maxima:
            raise UnusableError(
                "prune.protect.super_experts: this observation has no activation_max, which is needed to find super"
                " experts. Set prune.protect.super_experts: false, or observe with reapkit."
            )
        weighed = [source for source, alpha in enumerate(evidence.alphas) if alpha]
        for layer, experts in enumerate(super_experts(observation.maxima["activation_max"][:depth, weighed].max(1))):
            protected[layer].update(dict.fromkeys(experts, SUPER))
    for layer, experts in prune.protect.experts.items():
        protected[observation.layers.index(layer)].update(dict.fromkeys(experts, BY_HAND))
    return protected


def _terms(candidate: Candidate, spec: SaliencySpec, prune: PruneSpec, shared: Shared) -> CandidateTerms:
    applied = candidate.prune(prune)
    decoder = decoder_layers(shared.evidence.observation, shared.architecture)
    budgets = layer_budgets(applied, shared.architecture, decoder)
    return CandidateTerms(
        criterion(candidate.criterion),
        candidate.saliency(spec),
        applied,
        budgets,
        kept_unit(applied, shared.architecture),
    )


def _selection(
    shared: Shared, candidate: Candidate, terms: CandidateTerms, rankings: Mapping[int, LayerRanking]
) -> Selection:
    counts = terms.counts(rankings)
    cut = global_cut(terms.decoder(rankings), counts) if terms.prune.allocation == "global" else None
    layers = {
        layer: (
            _layer(ranking, counts[layer], terms.budgets[layer], cut)
            if layer in terms.budgets
            else _layer(ranking, counts[layer], _fixed(counts[layer]), None)
        )
        for layer, ranking in rankings.items()
    }
    remarks = _remarks(shared, terms, layers)
    details = _how(candidate, terms) | _outcome(layers, rankings, terms, counts) | {"eaft": None} | remarks.details
    warnings = [*_unrouted_warnings(details), *remarks.warnings]
    return Selection(terms.criterion.name, layers, terms.prune.experts_per_token, details | {"warnings": warnings})


def _layer(ranking: LayerRanking, count: int, budget: LayerBudget, cut: float | None) -> LayerSelection:
    keep = ranking.keep(count)
    drop = tuple(sorted(set(range(len(ranking.saliency))) - set(keep)))
    return LayerSelection(keep, drop, ranking.saliency, reasons(ranking, keep, budget, cut))


# ---------------------------------------------------------------------------------------------- details


def _how(candidate: Candidate, terms: CandidateTerms) -> dict[str, Any]:
    """What was asked for."""
    spec = terms.spec
    return {
        "candidate": candidate.name,
        "ratio": None if candidate.ratio is None else str(candidate.ratio),
        "allocation": candidate.allocation,
        "formula": terms.criterion.formula(spec),
        "reduction": spec.reduction,
        "prior_count": spec.prior_count,
        "seed": spec.seed if "seed" in terms.criterion.settings else None,
        "mix": None if spec.mix is None else {name: str(weight) for name, weight in spec.mix.items()},
    }


def _outcome(
    layers: Mapping[int, LayerSelection],
    rankings: Mapping[int, LayerRanking],
    terms: CandidateTerms,
    counts: Mapping[int, int],
) -> dict[str, Any]:
    """What came of it, layers by their decoder index."""
    unrouted = {
        layer: [expert for expert, value in enumerate(ranking.saliency) if value == NEVER_ROUTED]
        for layer, ranking in rankings.items()
    }
    protected = {
        name: {
            layer: sorted(expert for expert, why in ranking.protected.items() if why == name)
            for layer, ranking in rankings.items()
        }
        for name in (BY_HAND, SUPER, CORE)
    }
    return {
        "experts": sum(len(ranking.saliency) for ranking in rankings.values()),
        "removed": sum(len(layer.drop) for layer in layers.values()),
        "never_routed": _listed(unrouted),
        "protected": {name: _listed(by_layer) for name, by_layer in protected.items()},
        "dropped_saliency": _dropped_saliency(rankings, terms, counts),
        "near_ties": _near_ties(layers),
    }


def _remarks(shared: Shared, terms: CandidateTerms, layers: Mapping[int, LayerSelection]) -> Remarks:
    """What the criterion itself says of this decision."""

    def kept_by(values: ndarray) -> dict[int, tuple[int, ...]]:
        rankings = shared.rankings(values, terms.criterion)
        counts = terms.counts(rankings)
        return {layer: ranking.keep(counts[layer]) for layer, ranking in rankings.items()}

    if terms.criterion.remarks is None:
        return Remarks({})
    kept = {layer: chosen.keep for layer, chosen in layers.items()}
    return terms.criterion.remarks(shared.evidence, terms.spec, kept, kept_by)


def _dropped_saliency(
    rankings: Mapping[int, LayerRanking], terms: CandidateTerms, counts: Mapping[int, int]
) -> dict[str, float | None]:
    """Σ over dropped experts of S_e / Σ|S|, averaged over the layers, under the chosen allocation and the other one.

    None where the other is impossible: it need not fit what is protected.
    """
    chosen = terms.prune.allocation
    other = "uniform" if chosen == "global" else "global"
    try:
        found: dict[str, Mapping[int, int] | None] = {chosen: counts, other: terms.counts(rankings, other)}
    except RecipeError:
        found = {chosen: counts, other: None}
    return {
        how: None if kept is None else _dropped_share(rankings, kept)
        for how, kept in sorted(found.items(), reverse=True)
    }


def _dropped_share(rankings: Mapping[int, LayerRanking], counts: Mapping[int, int]) -> float:
    dropped = 0.0
    for layer, ranking in rankings.items():
        kept, shares = set(ranking.keep(counts[layer])), ranking.normalised or ()
        dropped += sum(share for expert, share in enumerate(shares) if expert not in kept and share != NEVER_ROUTED)
    return dropped / len(rankings)


def _near_ties(layers: Mapping[int, LayerSelection]) -> list[dict[str, Any]]:
    """Pairs about which another device might decide otherwise: the best dropped expert and kept ones hardly above
    it."""
    ties = []
    for index, layer in layers.items():
        best = max(layer.drop, key=lambda expert: layer.saliency[expert], default=None)
        if best is None or layer.saliency[best] == NEVER_ROUTED:
            continue
        high = layer.saliency[best]
        ties += [
            {
                "layer": index,
                "kept": expert,
                "dropped": best,
                "relative_gap": (layer.saliency[expert] - high) / (abs(high) or 1.0),
            }
            for expert in layer.keep
            if layer.reasons[expert] not in (BY_HAND, SUPER, CORE)
            and abs(layer.saliency[expert] - high) <= NEAR_TIE * abs(high)
        ]
    return ties


def _unrouted_warnings(details: Mapping[str, Any]) -> list[str]:
    unrouted = details["never_routed"]
    if not unrouted:
        return []
    where = ("layers " if len(unrouted) > 1 else "layer ") + ranges([int(layer) for layer in unrouted])
    return [
        f"{sum(map(len, unrouted.values()))} of {details['experts']} experts received no token ({where}). Raise "
        "calibration.samples, or accept that they rank last."
    ]


def _listed(by_layer: Mapping[int, list[int]]) -> dict[str, list[int]]:
    return {str(layer): experts for layer, experts in by_layer.items() if experts}
