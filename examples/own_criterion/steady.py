"""A saliency criterion of one's own: experts whose contribution is steady rank above those that only spike.

    PYTHONPATH=examples/own_criterion reapkit apply examples/own_criterion/recipe.yaml

A criterion is a function of the totals (`reapkit.Totals`: sums and maxima, each an array [layers,
experts] of numpy's) and the recipe's `saliency` section. It returns an array [layers, experts]; higher is kept. Experts
that received no token are ranked last by reapkit, whatever the function says of them. To share one, offer it from a
package and name it in recipes like a built-in criterion:

    [project.entry-points."reapkit.criteria"]
    steady = "steady:steady"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy import ndarray

    from reapkit import Totals
    from reapkit.recipe.schema import SaliencySpec


def steady(totals: Totals, spec: SaliencySpec) -> ndarray:
    """mean(gn) - std(gn): the mean contribution, less how much it varies from token to token."""
    mean = totals.mean(totals.gate_norm_sum, spec.prior_count)
    variance = totals.mean(totals.gate_norm_sq_sum, spec.prior_count) - mean**2
    return mean - np.sqrt(np.maximum(variance, 0))  # rounding can leave a variance just below zero
