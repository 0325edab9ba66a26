"""Makes plans with all stages; the command line and Python users call it. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reapkit.core.errors import ReapkitError, RecipeError
from reapkit.pipeline.run_directory import refuse_foreign
from reapkit.pipeline.stages.every_stage import STAGES
from reapkit.planning import plan as planning
from reapkit.planning.plan import Plan
from reapkit.recipe.loading import LoadedRecipe, as_loaded, in_file_order, load
from reapkit.recipe.schema import Recipe


def plan(recipe: Recipe | LoadedRecipe | str | Path) -> Plan:
    """What a recipe (or the one at a path) would do, without doing it. Raises as `make_plan`."""
    return make_plan(as_loaded(recipe))


def load_and_plan(
    name: str, overrides: Sequence[str] = (), *, download: bool = False, observation: Path | None = None
) -> Plan:
    """The plan of the recipe at a path or of a shipped name; what is wrong with the file and with the budget is raised
    together.

    Raises RecipeError with every problem, UnusableError for the checkpoint of a recipe that is right in itself.
    """
    try:
        made = make_plan(load(name, overrides), download=download, observation=observation)
    except RecipeError as error:
        if error.partial is not None:
            try:
                make_plan(error.partial)
            except RecipeError as more:
                known = {problem.path for problem in error.problems}
                raise RecipeError(
                    in_file_order(error.problems + [p for p in more.problems if p.path not in known])
                ) from None
            except ReapkitError:
                pass  # the checkpoint's turn comes when the recipe is right
        raise
    refuse_foreign(made)
    return made


def make_plan(loaded: LoadedRecipe, *, download: bool = False, observation: Path | None = None) -> Plan:
    """`planning.plan.make_plan` of every stage that reapkit has."""
    return planning.make_plan(loaded, STAGES, download=download, observation=observation)
