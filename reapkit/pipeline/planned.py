"""Makes plans with all stages; the command line and Python users call it. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reapkit.checkpoint.locate import model_directory
from reapkit.core.errors import Problem, ReapkitError, RecipeError, UnusableError
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
        loaded = load(name, overrides)
    except RecipeError as error:
        more = [] if error.partial is None else _more(error, observation)
        raise RecipeError(in_file_order(error.problems + more)) from None
    made = _made(loaded, download, observation)
    refuse_foreign(made)
    return made


def _made(loaded: LoadedRecipe, download: bool, observation: Path | None) -> Plan:
    """The plan. Raises as `make_plan`, with what is wrong with rows that a run would render beside the rest."""
    try:
        made = make_plan(loaded, download=download, observation=observation)
    except RecipeError as error:
        more = [] if observation is not None else _rendering_problems(loaded)
        raise RecipeError(in_file_order([*error.problems, *more])) from None
    renders = any(stage.name in ("calibrate", "packs") and stage.must_run for stage in made.stages)
    if renders and (problems := _rendering_problems(loaded)):
        raise RecipeError(problems)
    return made


def _rendering_problems(loaded: LoadedRecipe) -> list[Problem]:
    """What is wrong with the first rows of the recipe's sources as its model's chat template shows them; nothing of a
    model that is not on this machine, and of packaged rows in the packaged model's."""
    calibration, extra = loaded.calibration, loaded.evaluate.extra_packs
    listed = {f"calibration.mix[{i}]": entry for i, entry in enumerate(calibration.mix)}
    listed |= {f"evaluate.extra_packs[{i}]": entry for i, entry in enumerate(extra)}
    if loaded.model.source.startswith("builtin:") and calibration.chat_template is None and calibration.spans is None:
        listed = {path: entry for path, entry in listed.items() if not entry.source.startswith("builtin:")}
    if not listed:
        return []
    try:
        model = model_directory(loaded.model, loaded.directory)
    except UnusableError:
        return []  # said already
    if model is None or not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return []
    from reapkit.calibration.first_rendered import rendering_problems

    problems = rendering_problems(
        calibration, listed, model, loaded.directory, trust_remote_code=loaded.model.trust_remote_code
    )
    return list(loaded.located(RecipeError(problems)).problems)


def _more(error: RecipeError, observation: Path | None) -> list[Problem]:
    """What else is wrong with a recipe of which parts could not be read: the checks that do not depend on those."""
    renders = observation is None and not {"model", "calibration"} & set(error.stand_ins)
    return _contradictions(error, observation) + (_rendering_problems(error.partial) if renders else [])


def _contradictions(error: RecipeError, observation: Path | None) -> list[Problem]:
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
