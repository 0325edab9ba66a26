"""What users import: `from reapkit import …` loads these names on first use.

Torch is imported by what loads or runs a model, and by nothing else: a recipe is read, planned and decided without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy import ndarray

from reapkit.core.errors import Problem, ReapkitError, RecipeError, StageFailed, UnusableError
from reapkit.observation import observation as recorded
from reapkit.pipeline.planned import plan
from reapkit.pipeline.run import apply
from reapkit.planning.plan import Plan
from reapkit.recipe.loading import load_recipe
from reapkit.recipe.schema import DEFAULT_CRITERION, Recipe, SaliencySpec
from reapkit.selection.decide import select
from reapkit.selection.saliency import saliency
from reapkit.selection.selection import Selection
from reapkit.selection.totals import Totals

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Observation",
    "Plan",
    "Problem",
    "ReapkitError",
    "Recipe",
    "RecipeError",
    "Selection",
    "StageFailed",
    "Totals",
    "UnusableError",
    "apply",
    "load_model",
    "load_recipe",
    "plan",
    "select",
]


@dataclass(frozen=True, eq=False)
class Observation(recorded.Observation):
    """What one pass over the calibration recorded about every routed expert, and the criteria that can be computed from
    it."""

    def saliency(self, criterion: str = DEFAULT_CRITERION, **settings: Any) -> ndarray:
        """Saliency of every expert, float64 [L, E], -inf for those never routed; `settings` as in a recipe's
        `saliency:` section.

        Raises RecipeError for an unknown criterion, UnusableError where this observation lacks what the criterion
        needs.
        """
        return saliency(self, SaliencySpec.model_validate({"criterion": criterion, **settings}, strict=False))


def load_model(
    path: str | Path, *, device: str = "cpu", dtype: str = "auto", trust_remote_code: bool = False
) -> nn.Module:
    """The checkpoint's own class in evaluation mode, without gradients, on `device` ("auto": spread over the
    accelerators).

    `dtype`: "auto" (the checkpoint's), "float32", "bfloat16" or "float16". Block-FP8 and MXFP4 weights are dequantized.
    Raises UnusableError where the weights do not fit the class.
    """
    from reapkit.model import loading

    return loading.load_model(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
