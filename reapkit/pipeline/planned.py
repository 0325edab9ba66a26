"""Makes plans with all stages; the command line and Python users call it. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reapkit.core.errors import Problem, ReapkitError, RecipeError
from reapkit.pipeline.run_directory import refuse_foreign
from reapkit.pipeline.stages.every_stage import STAGES
from reapkit.planning import plan as planning
from reapkit.planning.checks import recipe_problems
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
        more = [] if error.partial is None else _more(error, observation)
        raise RecipeError(in_file_order(error.problems + more)) from None
    refuse_foreign(made)
    return made


def _more(error: RecipeError, observation: Path | None) -> list[Problem]:
    """What else is wrong with a recipe of which parts could not be read: the checks that do not depend on those."""
    partial, known = error.partial, {problem.path for problem in error.problems}
    try:
        if "model" in error.stand_ins:
            raise partial.located(RecipeError(recipe_problems(partial, observation)))
        make_plan(partial, observation=observation)
    except RecipeError as more:
        return [p for p in more.problems if p.path not in known and _section(p.path) not in error.stand_ins]
    except ReapkitError as unusable:
        return (
            []
            if "model.source" in known
            else [partial.problem("model.source", str(unusable).removeprefix("model.source: "))]
        )
    return []


def _section(path: str) -> str:
    return path.partition(".")[0]


def make_plan(loaded: LoadedRecipe, *, download: bool = False, observation: Path | None = None) -> Plan:
    """`planning.plan.make_plan` of every stage that reapkit has."""
    return planning.make_plan(loaded, STAGES, download=download, observation=observation)
