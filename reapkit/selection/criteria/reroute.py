"""The reroute criteria: how much a layer's output changes when an expert's tokens are routed to the remaining experts,
along a path of removals or for each expert alone. Torch-free."""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from reapkit.core.errors import Problem, RecipeError
from reapkit.observation.materials import REMOVAL_PATHS
from reapkit.observation.removal_paths import Removal, path_number, removal_alone, removal_along
from reapkit.recipe.schema import Recipe, SaliencySpec
from reapkit.selection.criteria.criterion import Criterion
from reapkit.selection.criteria.reap import REAP
from reapkit.selection.evidence import Evidence

NO_PATH = (
    "reroute needs removal paths, and these were measured only for the shares of the calibration, for equal weights"
    " of all sources, and for each source alone. Choose one of these weightings, change calibration.mix, or choose"
    " reroute-single."
)


def along_the_path(evidence: Evidence) -> Removal:
    """Experts removed one after another, as it was measured for the mix, for equal weights, or for one source. Raises
    RecipeError for weights of sources that no path was measured for."""
    paths = REMOVAL_PATHS.of(evidence.observation, REROUTE.name)
    number = path_number(evidence.observation, paths, evidence.alphas)
    if number is None:
        raise RecipeError([Problem("saliency.mix", NO_PATH)])
    return removal_along(paths, number)


def each_alone(evidence: Evidence) -> Removal:
    """Each expert removed alone, sources weighed by the mix."""
    paths = REMOVAL_PATHS.of(evidence.observation, REROUTE_SINGLE.name)
    return removal_alone(evidence.observation, paths, evidence.alphas)


def path_error(evidence: Evidence, spec: SaliencySpec) -> ndarray:
    """‖y(A) − y‖² / ‖r‖² once the expert is gone and all that the path removes before it, float64 [L, E]."""
    return _or_reap(along_the_path(evidence), evidence, spec)


def single_error(evidence: Evidence, spec: SaliencySpec) -> ndarray:
    """‖y(A) − y‖² / ‖r‖² without the expert alone, float64 [L, E]."""
    return _or_reap(each_alone(evidence), evidence, spec)


def _or_reap(found: Removal, evidence: Evidence, spec: SaliencySpec) -> ndarray:
    """Layers without a path are ranked by plain REAP."""
    return np.where(found.measured[:, None], found.saliency, REAP.values(evidence, spec))


def unknown_weights(recipe: Recipe) -> list[Problem]:
    """Weights of sources that there will be no path for, said before anything is observed."""
    mix = recipe.saliency.mix
    if mix is None or sum(1 for weight in mix.values() if weight) <= 1:
        return []
    alike = len({weight for weight in mix.values() if weight}) == 1
    if alike and all(mix.get(entry.name) for entry in recipe.calibration.mix):
        return []
    return [Problem("saliency.mix", NO_PATH)]


REROUTE = Criterion(
    name="reroute",
    summary="how far the layer's output moves once the expert's tokens are re-routed, one expert removed after another",
    explanation=(
        "how far the layer's output moves, relative to the residual stream, once the expert is gone and its tokens are"
        " routed to those left, removing one after another"
    ),
    symbols="‖y(A) − y‖² / ‖r‖² along the removal path",
    function=path_error,
    removal=along_the_path,
    columns=REAP.columns,
    materials=(REMOVAL_PATHS,),
    problems=unknown_weights,
)
REROUTE_SINGLE = Criterion(
    name="reroute-single",
    summary="how far the layer's output moves once the expert's tokens are re-routed, each expert removed alone",
    explanation=(
        "how far the layer's output moves, relative to the residual stream, without the expert alone, its tokens"
        " re-routed"
    ),
    symbols="‖y(A) − y‖² / ‖r‖² without it alone",
    function=single_error,
    removal=each_alone,
    columns=REAP.columns,
    materials=(REMOVAL_PATHS,),
)
