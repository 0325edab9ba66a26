"""Computes the saliency of every expert, by the name of a criterion. Torch-free."""

from __future__ import annotations

from numpy import ndarray

from reapkit.observation.observation import Observation
from reapkit.recipe.schema import SaliencySpec
from reapkit.selection.criteria.registry import criterion, described
from reapkit.selection.evidence import Evidence


def saliency(observation: Observation, spec: SaliencySpec) -> ndarray:
    """The saliency of every expert, array [L, E] float64; -inf for experts that no position was routed to.

    Raises RecipeError for an unknown criterion or mix, UnusableError where the observation lacks what the criterion
    needs or holds a number that is not finite.
    """
    return criterion(spec.criterion).saliency(Evidence.of(observation, spec), spec)


def formula(spec: SaliencySpec) -> str:
    """What is computed for each expert, in the words of the report."""
    return described(spec.criterion).formula(spec)
