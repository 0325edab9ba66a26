"""The data that a criterion may use: an observation with the weights of its sources. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from reapkit.observation.observation import Observation
from reapkit.recipe.schema import EaftSpec, SaliencySpec
from reapkit.selection.eaft import Regions, measure_regions
from reapkit.selection.totals import Totals, source_alphas, totals


@dataclass(frozen=True, eq=False)
class Evidence:
    """An observation of L layers and E experts, the exact weight α of each source's sums, and what follows from both.

    `totals`: the sums [L, E] with the sources added up. Criteria that are compared share one of these, so that what
    several of them read is computed once.
    """

    observation: Observation
    alphas: tuple[Fraction, ...]
    totals: Totals
    eaft: EaftSpec

    @classmethod
    def of(cls, observation: Observation, spec: SaliencySpec) -> Evidence:
        """Under the mix and the EAFT settings of `spec`. Raises RecipeError for a mix that the observation cannot
        have."""
        alphas = source_alphas(observation, spec.mix)
        return cls(observation, alphas, totals(observation, spec.mix), spec.eaft)

    @cached_property
    def regions(self) -> Regions:
        """The EAFT sums by region. Raises UnusableError where the observation holds no usable EAFT signals."""
        return measure_regions(self.observation, self.eaft, self.alphas)
