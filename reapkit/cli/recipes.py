"""Commands for recipes: validate, plan, apply and its stages, lock, init, schema."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from reapkit.cli.app import Elsewhere, Json, Overrides, RecipeArgument, app, out, quiet_libraries
from reapkit.core.atomic_files import write_text
from reapkit.core.errors import RecipeError, UnusableError
from reapkit.core.ranks import current
from reapkit.pipeline.planned import load_and_plan
from reapkit.pipeline.stages.every_stage import STAGE_NAMES
from reapkit.planning.lock import check_lock, lock_path, read_lock, recipe_digest, revisions, write_lock
from reapkit.planning.starting_recipe import starting_recipe
from reapkit.quantization.schemes import SCHEMES
from reapkit.recipe.json_schema import recipe_schema
from reapkit.recipe.loading import find_recipe, load
from reapkit.recipe.reference_page import language_page
from reapkit.report.tables import checks_table, plan_as_json, plan_tables, result_table
from reapkit.selection.criteria.registry import vocabulary

if TYPE_CHECKING:
    from reapkit.pipeline.first_minute import Proven


@app.command()
def validate(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Recipes to check.")],
    overrides: Overrides,
    as_json: Json = False,
) -> None:
    """Check recipes against their models (local, cached or on the hub) and show all problems at once.

    Example: reapkit validate recipes/demo.yaml
    """
    problems, notes = [], {}
    for name in recipes:
        try:
            load_and_plan(name, overrides)
            notes[name] = "valid"
        except RecipeError as error:
            problems += error.problems
        except UnusableError as error:
            notes[name] = f"valid, but not checked against the model: {error}"
    if as_json:
        print(json.dumps({"valid": not problems, "notes": notes, "problems": [vars(problem) for problem in problems]}))
    elif not problems:
        for name, note in notes.items():
            print(f"{name}: {note}")
    if problems:
        raise typer.Exit(RecipeError.exit_code) if as_json else RecipeError(problems)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Try in a minute what a run would meet in its last hour: the model's class, its first layers, an"
            " expert quantized, the pruned model.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what would run: stages, experts, parameters and bytes before and after. Reads config and headers only.

    Example: reapkit plan demo --set prune.ratio=0.25
    """
    _show_plan(recipe, overrides, as_json, check=check)


def _show_plan(
    recipe: str, overrides: list[str], as_json: bool, observation: str | None = None, *, check: bool = False
) -> None:
    made = load_and_plan(recipe, overrides, observation=_directory_of(observation))
    tried: list[Proven] | None = None
    if check:
        quiet_libraries()
        from reapkit.pipeline.first_minute import first_minute

        tried = first_minute(made)
    if as_json:
        print(json.dumps(plan_as_json(made) | ({} if tried is None else {"checks": [asdict(each) for each in tried]})))
        return
    for table in plan_tables(made):
        out().print(table)
    if tried is not None:
        out().print(checks_table(tried))


@app.command()
def apply(
    recipe: RecipeArgument,
    overrides: Overrides,
    until: Annotated[
        str | None, typer.Option(metavar="STAGE", help=f"Stop after a stage: {', '.join(STAGE_NAMES)}.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and exit.")] = False,
    observation: Elsewhere = None,
    locked: Annotated[
        bool, typer.Option("--locked", help=("Use the revisions of the lock; fail if anything differs from the lock."))
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Read every byte of finished results before they are used, not only what seems changed."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe: calibrate, observe, select, evaluate, prune, quantize, verify, report. Finished stages are skipped.

    Example: reapkit apply demo
    """
    if until is not None and until not in STAGE_NAMES:
        raise RecipeError(f"--until: found '{until}'. Allowed: {', '.join(STAGE_NAMES)}.")
    if locked:
        overrides = [*overrides, *_pinned(recipe, overrides)]
    if dry_run:
        _show_plan(recipe, overrides, as_json, observation)
    else:
        _apply(recipe, overrides, until, as_json, observation, check)


def _pinned(recipe: str, overrides: list[str]) -> list[str]:
    """The revisions that the recipe's lock pins, once everything else agrees with it."""
    loaded = load(recipe, overrides)
    path = lock_path(loaded, find_recipe(recipe))  # refuses a pipe, which could not be read a second time
    lock = read_lock(path)
    pins = revisions(lock, loaded)
    check_lock(lock, load(recipe, [*overrides, *pins]), recipe_digest(loaded), path)
    return pins


def _directory_of(observation: str | None) -> Path | None:
    """Where an observation's files lie, of its own directory, its artifact in a store or a run."""
    if observation is None:
        return None
    from reapkit.report.inspection.recognise import observation_at

    return observation_at(observation)


def _apply(
    recipe: str,
    overrides: list[str],
    until: str | None,
    as_json: bool,
    observation: str | None = None,
    check: bool = False,
) -> None:
    # every contradiction is found before weights are fetched or torch is imported
    made = load_and_plan(recipe, overrides, observation=_directory_of(observation))
    quiet_libraries()
    from reapkit.cli.progress_bars import make_progress
    from reapkit.pipeline.run import walk
    from reapkit.pipeline.run_state import describe

    run = walk(made, until=until, progress=make_progress(), ranks=current(), check=check)
    if as_json:
        print(json.dumps({**describe(run), "directory": str(run.directory), "executed": run.executed}))
        return
    console = out()
    if "verify" in run.artifacts:
        console.print(result_table(run.summary("verify")))
    elif until == "evaluate":
        _show_evaluation(run.directory)
    console.print(
        f"{'Nothing to do, all results exist' if not run.executed else 'Done'}: {run.directory}"
        + (f"  (open {run.directory / 'report.html'})" if {"report", "evaluate"} & {until or "report"} else ""),
        soft_wrap=True,
        markup=False,
    )


def _show_evaluation(directory: Path) -> None:
    """Numbers, gates and advice, as `inspect` shows them."""
    from reapkit.report.inspection import evaluation

    for block in evaluation.blocks(evaluation.facts(directory / "evaluation"), colour=False):
        out().print(block)


def _stage_command(stage: str, purpose: str) -> None:
    def deciding(
        recipe: RecipeArgument, overrides: Overrides, observation: Elsewhere = None, as_json: Json = False
    ) -> None:
        _apply(recipe, overrides, stage, as_json, observation)

    def observing(recipe: RecipeArgument, overrides: Overrides, as_json: Json = False) -> None:
        _apply(recipe, overrides, stage, as_json)

    command = observing if stage == "observe" else deciding
    command.__doc__ = f"{purpose} (apply --until {stage}).\n\nExample: reapkit {stage} demo"
    app.command(name=stage)(command)


for _stage, _purpose in (
    ("observe", "Run the calibration through the model and keep its routing statistics"),
    ("select", "Decide which experts stay"),
    ("evaluate", "Compare the candidates, as masks, with the base"),
    ("prune", "Write the pruned checkpoint"),
    ("quantize", "Write the quantized checkpoint"),
):
    _stage_command(_stage, _purpose)


@app.command()
def lock(recipe: RecipeArgument, overrides: Overrides, as_json: Json = False) -> None:
    """Write NAME.lock.json beside the recipe: the revisions, file hashes and versions that `apply --locked` requires.

    Example: reapkit lock my-recipe.yaml
    """
    path = lock_path(load(recipe, overrides), find_recipe(recipe))
    loaded = load_and_plan(recipe, overrides).loaded
    written = write_lock(loaded, path)
    print(
        json.dumps({"path": str(path), **written})
        if as_json
        else f"{path}: {len(written['sources'])} sources and the model locked"
    )


@app.command()
def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, model directory or builtin:demo.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="File to write the recipe to; default: NAME.yaml."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a commented starting recipe for a model, filled from its config and headers.

    Example: reapkit init /models/my-moe -o my-moe.yaml
    """
    name, text = starting_recipe(model, Path.cwd(), output and output.parent)
    path = output or Path(f"{name}.yaml")
    if path.exists():
        raise RecipeError(f"{path}: the file exists already. Choose another name with -o.")
    write_text(path, text)
    print(
        json.dumps({"path": str(path), "name": name})
        if as_json
        else f"{path}: written. Next: reapkit plan {quote(str(path))}"
    )


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the language as one page of Markdown instead.")
    ] = False,
) -> None:
    """Print the recipe language as JSON Schema (2020-12).

    Example: reapkit schema > recipe.schema.json
    """
    names = {"criterion": vocabulary(), "scheme": {name: scheme.meaning for name, scheme in SCHEMES.items()}}
    if markdown:
        print(language_page(names), end="")
    else:
        print(json.dumps(recipe_schema(names), indent=2))
