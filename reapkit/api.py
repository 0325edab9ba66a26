"""What users import: `from reapkit import …` loads these names on first use.

Torch is imported by what loads or runs a model, and by nothing else: a recipe is read, planned and decided without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from numpy import ndarray

from reapkit.core.errors import Problem, ReapkitError, RecipeError, RejectedByGates, StageFailed, UnusableError
from reapkit.core.notebook import html_table
from reapkit.observation import observation as recorded
from reapkit.pipeline.planned import plan
from reapkit.pipeline.run import Run, apply
from reapkit.planning.plan import Plan
from reapkit.recipe.loading import load_recipe
from reapkit.recipe.schema import DEFAULT_CRITERION, Recipe, SaliencySpec
from reapkit.selection.decide import select
from reapkit.selection.saliency import saliency
from reapkit.selection.selection import Selection
from reapkit.selection.totals import Totals

if TYPE_CHECKING:
    import pandas
    from torch import nn

__all__ = [
    "Observation",
    "Plan",
    "Problem",
    "ReapkitError",
    "Recipe",
    "RecipeError",
    "RejectedByGates",
    "Run",
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


@dataclass(frozen=True, eq=False, repr=False)
class Observation(recorded.Observation):
    """What one pass over the calibration recorded about every routed expert, and the criteria that can be computed from
    it."""

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Of a run, of an artifact in the store, or of the observation's own directory.

        Raises UnusableError where there is none.
        """
        from reapkit.report.inspection.recognise import observation_at

        return super().load(observation_at(directory))

    def __repr__(self) -> str:
        layers = f"{len(self.layers)} layers x {self.num_experts} experts, top-{self.num_experts_per_tok}"
        return (
            f"<Observation of {self.model_type}: {layers}; {int(self.tokens.sum()):,} tokens,"
            f" {int(self.scored_tokens.sum()):,} scored, of {', '.join(self.sources)}>"
        )

    def _repr_html_(self) -> str:
        rows = [
            (name, f"{int(tokens):,}", f"{int(scored):,}")
            for name, tokens, scored in zip(self.sources, self.tokens, self.scored_tokens, strict=True)
        ]
        return html_table(repr(self).strip("<>"), ("source", "tokens", "scored"), rows)

    def to_pandas(self) -> pandas.DataFrame:
        """A row per layer, expert and source, and one per layer and expert of all sources together (`source` "all"):
        every sum and maximum under the names of `export`'s saliency.parquet."""
        from reapkit.report.export import saliency_table

        return saliency_table(self).to_pandas()

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
