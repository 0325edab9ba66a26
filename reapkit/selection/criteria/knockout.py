"""Knock-outs: how far the model's own output moves without an expert, measured instead of estimated. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from reapkit.core.errors import UnusableError
from reapkit.core.formatting import ranges
from reapkit.observation.materials import KNOCKOUTS
from reapkit.observation.removal_paths import Removal
from reapkit.recipe.schema import SaliencySpec
from reapkit.selection.criteria.criterion import Criterion, Kept, Remarks
from reapkit.selection.criteria.reap_relative import REAP_RELATIVE
from reapkit.selection.evidence import Evidence


@dataclass(frozen=True, eq=False)
class Nats:
    """Nats per scored position of the mix: `kl` float64 [L, E] without each expert, `floor` float64 [L] that rounding
    alone makes, and which layers were `measured`, bool [L]; 0 in the others."""

    kl: ndarray
    floor: ndarray
    measured: ndarray

    @property
    def below(self) -> ndarray:
        """Experts whose absence changes less than rounding does, bool [L, E]."""
        return self.measured[:, None] & (self.kl < self.floor[:, None])


def nats(evidence: Evidence) -> Nats:
    """Σ_s KO_s / Σ_s t_s, with KO_s the sum over a source's t_s measured positions, which are equal parts of the
    sources; under a mix Σ_s w_s KO_s / t_s, with w_s the source's share of the mix. Raises UnusableError where a source
    that has weight was not measured."""
    observation = evidence.observation
    found = KNOCKOUTS.of(observation, f"saliency.criterion: {KNOCKOUT.name}")
    weighed = [s for s, alpha in enumerate(evidence.alphas) if alpha and observation.scored_tokens[s]]
    if missing := [observation.sources[source] for source in weighed if not found.positions[source]]:
        raise UnusableError(
            f"saliency.criterion: {KNOCKOUT.name} was measured on no position of {', '.join(missing)}. Raise"
            f" observe.{KNOCKOUTS.setting}."
        )
    mixed = any(alpha != 1 for alpha in evidence.alphas)  # 1 each without a mix
    weights = [evidence.alphas[s] * int((observation.scored_tokens if mixed else found.positions)[s]) for s in weighed]
    shares = {s: float(weight) for s, weight in zip(weighed, weights, strict=True)}
    kl, floor = np.zeros((len(found.layers), observation.num_experts)), np.zeros(len(found.layers))
    for source, share in shares.items():
        weight = share / sum(shares.values()) / int(found.positions[source])
        kl += weight * found.kl[:, source]
        floor += weight * found.floor[:, source]
    rows = [observation.layers.index(layer) for layer in found.layers]
    depth = len(observation.layers)
    whole = Nats(np.zeros((depth, observation.num_experts)), np.zeros(depth), np.zeros(depth, dtype=bool))
    whole.kl[rows], whole.floor[rows], whole.measured[rows] = kl, floor, True
    return whole


def nats_or_relative(evidence: Evidence, spec: SaliencySpec) -> ndarray:
    """Nats per position, float64 [L, E]. Experts below their layer's floor stand between 0 and it, in the order that
    their contribution relative to the residual stream gives them; that ranks layers that were not measured, too."""
    return _ranked(nats(evidence), REAP_RELATIVE.values(evidence, spec))


def _ranked(found: Nats, relative: ndarray) -> ndarray:
    values = np.where(found.measured[:, None], found.kl, relative)
    for row in np.flatnonzero(found.below.any(1)):
        below = np.flatnonzero(found.below[row])
        place = np.argsort(np.argsort(relative[row, below], kind="stable"), kind="stable")
        values[row, below] = found.floor[row] * (place + 1) / (len(below) + 1)
    return values


def each_alone(evidence: Evidence) -> Removal:
    """Nats are comparable between layers: the cost of a removal is what it was measured to be."""
    found = nats(evidence)
    values = _ranked(found, REAP_RELATIVE.values(evidence, SaliencySpec()))
    return Removal(values, values, found.measured, None)


def remarks(evidence: Evidence, spec: SaliencySpec, kept: Kept, kept_by: Callable[[ndarray], Kept]) -> Remarks:
    """On how many positions it was measured, and which experts lie below the floor. `kept_by` takes saliencies, float64
    [L, E]."""
    found, measured = nats(evidence), KNOCKOUTS.of(evidence.observation, KNOCKOUT.name)
    layers = evidence.observation.layers
    below = {layers[row]: np.flatnonzero(found.below[row]).tolist() for row in np.flatnonzero(found.below.any(1))}
    details = {
        "knockout": {
            "positions": int(measured.positions.sum()),
            "rows": int(measured.rows.sum()),
            "floor": {str(layers[row]): float(found.floor[row]) for row in np.flatnonzero(found.measured)},
            "below_floor": {str(layer): experts for layer, experts in below.items()},
        }
    }
    if not below:
        return Remarks(details)
    where = ("layers " if len(below) > 1 else "layer ") + ranges(list(below))
    return Remarks(
        details,
        [
            f"{sum(map(len, below.values()))} of {found.kl.size} experts change the model's output by less than"
            f" rounding does ({where}); among themselves they are ranked by {REAP_RELATIVE.name}."
        ],
    )


KNOCKOUT = Criterion(
    name="knockout",
    summary="how far the model's own output moves without the expert, measured on whole rows",
    explanation=(
        "the KL divergence of the model's predictions without the expert, its tokens re-routed, from those of the whole"
        " model, in nats per position, measured on whole rows of the calibration"
    ),
    symbols="KL(p ‖ p without it)",
    function=nats_or_relative,
    removal=each_alone,
    columns=REAP_RELATIVE.columns,
    materials=(KNOCKOUTS,),
    remarks=remarks,
)
