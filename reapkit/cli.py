"""The command line: parses, calls, formats, exits. Everything up to the plan runs without importing torch."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from reapkit.differences import compare_recipes
from reapkit.errors import ReapkitError, RecipeError, UnusableError
from reapkit.inspection import inspect as look_into
from reapkit.lock import check_lock, lock_path, read_lock, recipe_digest, revisions, write_lock
from reapkit.planning import STAGES, load_and_plan
from reapkit.recipe.jsonschema import recipe_schema
from reapkit.recipe.loading import find_recipe, load
from reapkit.recipe.reference import language_page
from reapkit.starter import starting_recipe
from reapkit.tables import difference_tables, plan_as_json, plan_tables, result_table

app = typer.Typer(name="reapkit", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Compress Mixture-of-Experts language models from one YAML recipe.\n\nExample: reapkit apply demo",
                  context_settings={"help_option_names": ["-h", "--help"]})

UsageError = typer.BadParameter.__mro__[1]  # typer carries its own click, whose errors it re-exports only in part

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Path of a recipe, or the name of a shipped one.")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a field: --set prune.ratio=0.25")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]


def _out() -> Console:
    return Console(highlight=False)


@app.command()
def validate(recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Recipes to check.")],
             overrides: Overrides = [], as_json: Json = False) -> None:
    """Check recipes, against their model where it is local, cached or on the hub; every problem is shown at once.

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
            notes[name] = f"valid in itself; not checked against its model: {error}"
    if as_json:
        print(json.dumps({"valid": not problems, "notes": notes, "problems": [vars(problem) for problem in problems]}))
    elif not problems:
        for name, note in notes.items():
            print(f"{name}: {note}")
    if problems:
        raise typer.Exit(RecipeError.exit_code) if as_json else RecipeError(problems)


@app.command()
def plan(recipe: RecipeArgument, overrides: Overrides = [], as_json: Json = False) -> None:
    """Show what would run: stages, experts, parameters and bytes before and after. Reads config and headers only.

    Example: reapkit plan demo --set prune.ratio=0.25
    """
    _show_plan(recipe, overrides, as_json)


def _show_plan(recipe: str, overrides: list[str], as_json: bool) -> None:
    made = load_and_plan(recipe, overrides)
    if as_json:
        print(json.dumps(plan_as_json(made)))
        return
    for table in plan_tables(made):
        _out().print(table)


@app.command()
def apply(recipe: RecipeArgument, overrides: Overrides = [],
          until: Annotated[str | None, typer.Option(metavar="STAGE", help=f"Stop after a stage: {', '.join(STAGES)}.")] = None,
          dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
          locked: Annotated[bool, typer.Option("--locked", help="Take revisions from the lock; refuse to differ from it.")] = False,
          as_json: Json = False) -> None:
    """Run a recipe: calibrate, observe, select, evaluate, prune, quantize, verify, report. Finished stages are skipped.

    Example: reapkit apply demo
    """
    if until is not None and until not in STAGES:
        raise RecipeError(f"--until: found '{until}'. Allowed: {', '.join(STAGES)}.")
    if locked:
        overrides = [*overrides, *_pinned(recipe, overrides)]
    if dry_run:
        _show_plan(recipe, overrides, as_json)
    else:
        _apply(recipe, overrides, until, as_json)


def _pinned(recipe: str, overrides: list[str]) -> list[str]:
    """The revisions that the recipe's lock pins, once everything else agrees with it."""
    loaded = load(recipe, overrides)
    path = lock_path(loaded, find_recipe(recipe))
    lock = read_lock(path)
    pins = revisions(lock, loaded)
    check_lock(lock, load(recipe, [*overrides, *pins]), recipe_digest(loaded), path)
    return pins


def _apply(recipe: str, overrides: list[str], until: str | None, as_json: bool) -> None:
    loaded = load_and_plan(recipe, overrides).loaded  # every contradiction is found before weights are fetched or torch is imported
    _quiet_libraries()
    from reapkit.run import apply as run_recipe
    from reapkit.run import describe
    from reapkit.terminal import make_progress

    run = run_recipe(loaded, until=until, progress=make_progress())
    if as_json:
        print(json.dumps({**describe(run), "directory": str(run.directory), "executed": run.executed}))
        return
    console = _out()
    if "verify" in run.artifacts:
        console.print(result_table(run.summary("verify")))
    console.print(f"{'Nothing to do, all of it was there' if not run.executed else 'Done'}: {run.directory}"
                  + (f"  (open {run.directory / 'report.html'})" if "report" in run.artifacts else ""), soft_wrap=True, markup=False)


def _stage_command(stage: str, purpose: str) -> None:
    def command(recipe: RecipeArgument, overrides: Overrides = [], as_json: Json = False) -> None:
        _apply(recipe, overrides, stage, as_json)

    command.__doc__ = f"{purpose} (apply --until {stage}).\n\nExample: reapkit {stage} demo"
    app.command(name=stage)(command)


for _stage, _purpose in (("observe", "Run the calibration through the model and keep its routing statistics"),
                         ("select", "Decide which experts stay"),
                         ("evaluate", "Compare the candidates, as masks, with the base"),
                         ("prune", "Write the pruned checkpoint"),
                         ("quantize", "Write the quantized checkpoint")):
    _stage_command(_stage, _purpose)


@app.command()
def lock(recipe: RecipeArgument, overrides: Overrides = [], as_json: Json = False) -> None:
    """Write NAME.lock.json beside the recipe: revisions, file hashes and versions that `apply --locked` insists on.

    Example: reapkit lock my-recipe.yaml
    """
    loaded = load_and_plan(recipe, overrides).loaded
    path = lock_path(loaded, find_recipe(recipe))
    written = write_lock(loaded, path)
    print(json.dumps({"path": str(path), **written}) if as_json else f"{path}: {len(written['sources'])} sources and the model locked")


@app.command()
def init(model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, model directory or builtin:demo.")],
         output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where to write it; default NAME.yaml.")] = None,
         as_json: Json = False) -> None:
    """Write a commented starting recipe for a model, filled from its config and headers.

    Example: reapkit init /models/my-moe -o my-moe.yaml
    """
    name, text = starting_recipe(model, Path.cwd())
    path = output or Path(f"{name}.yaml")
    if path.exists():
        raise RecipeError(f"{path}: is there already. Choose another name with -o.")
    path.write_text(text)
    print(json.dumps({"path": str(path), "name": name}) if as_json else f"{path}: written. Next: reapkit plan {path}")


@app.command()
def compare(left: Annotated[str, typer.Argument(metavar="A.yaml")], right: Annotated[str, typer.Argument(metavar="B.yaml")],
            as_json: Json = False) -> None:
    """Show in what two recipes differ, and which stages the second runs anew after the first.

    Example: reapkit compare recipes/demo.yaml mine.yaml
    """
    difference = compare_recipes(load(left), load(right))
    if as_json:
        print(json.dumps({"fields": [{"path": path, "left": a, "right": b} for path, a, b in difference.fields],
                          "stages": difference.stages}))
        return
    for table in difference_tables(difference):
        _out().print(table)


@app.command()
def inspect(path: Annotated[str, typer.Argument(metavar="PATH", help="A recipe, a checkpoint, a run, or an artifact of one.")],
            as_json: Json = False) -> None:
    """Show what lies at a path: recipe, checkpoint, calibration, packs, observation, selection, evaluation or run.

    Example: reapkit inspect runs/demo/calibration
    """
    found = look_into(path)
    if as_json:
        print(json.dumps(found.to_json()))
        return
    console = _out()
    for block in found.blocks(colour=console.is_terminal and console.color_system is not None and not console.no_color):
        console.print(block)


@app.command()
def export(observation: Annotated[str, typer.Argument(metavar="OBSERVATION", help="Directory of an observation, or of a run.")],
           directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go.")], as_json: Json = False) -> None:
    """Write an observation as saliency.parquet, ranking_by_layer.json and profile.md.

    Example: reapkit export runs/demo/observation saliency
    """
    from reapkit.inspection.exporting import export_at

    written = [str(file) for file in export_at(observation, directory)]
    print(json.dumps({"files": written}) if as_json else "\n".join(written))


@app.command()
def merge(observations: Annotated[list[str], typer.Argument(metavar="OBSERVATION...", help="Observations of one model, from any machines.")],
          output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where the sum goes.")], as_json: Json = False) -> None:
    """Add observations of the same model: other data, other machines, one decision.

    Example: reapkit merge monday/observation tuesday/observation -o both
    """
    from functools import reduce
    from operator import add

    from reapkit.observation import Observation

    if output.exists():
        raise RecipeError(f"{output}: is there already. Choose another directory with -o.")
    merged = reduce(add, (Observation.load(Path(directory)) for directory in observations))
    merged.save(output)
    facts = {"directory": str(output), "tokens": int(merged.tokens.sum()), "sources": list(merged.sources)}
    print(json.dumps(facts) if as_json else f"{output}: {len(observations)} observations, {facts['tokens']:,} tokens of {', '.join(merged.sources)}")


@app.command()
def report(observation: Annotated[str, typer.Argument(metavar="OBSERVATION", help="Directory of an observation.")],
           output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The page.")] = Path("observation.html"),
           selection: Annotated[Path | None, typer.Option("--selection", metavar="DIR", help="Mark what this selection drops.")] = None,
           as_json: Json = False) -> None:
    """Draw an observation as one HTML page that opens offline; a run draws its own report.

    Example: reapkit report runs/demo/observation --selection runs/demo/selection
    """
    from reapkit.observation import Observation
    from reapkit.report import write_observation_report
    from reapkit.selection import Selection

    write_observation_report(Observation.load(Path(observation)), Selection.load(selection) if selection else None, output)
    print(json.dumps({"file": str(output)}) if as_json else str(output))


@app.command()
def schema(markdown: Annotated[bool, typer.Option("--markdown", help="The language on one page, for people.")] = False) -> None:
    """Print the recipe language as JSON Schema (2020-12).

    Example: reapkit schema > recipe.schema.json
    """
    if markdown:
        print(language_page(), end="")
    else:
        print(json.dumps(recipe_schema(), indent=2))


def _quiet_libraries() -> None:
    """The libraries' own bars and advice would break ours; must happen before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")


def _terminate(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt  # Slurm's SIGTERM means the same as Ctrl-C: save and stop


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with the documented code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _run(arguments, debug)
    except KeyboardInterrupt:  # it came while another error was being dealt with
        code = _interrupted()
    if code == 130:
        # Python dies of SIGINT at its end if one ever crossed an exec() of text (imports do that), handled or not: leave with our code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _interrupted() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # we are leaving already
    print("Interrupted. Finished stages are kept; run the same command again to go on.", file=sys.stderr)
    return 130


def _run(arguments: list[str], debug: bool) -> int:
    try:
        result = typer.main.get_command(app).main(args=arguments, prog_name="reapkit", standalone_mode=False)
        if result == 130:  # typer turns Ctrl-C into this code without a word
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except UsageError as error:
        error.show()
        return RecipeError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
        return 0
    except ReapkitError as error:
        if debug:
            traceback.print_exc()
        print(error if isinstance(error, RecipeError) else f"reapkit: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:  # a defect of ours: say so, and how to report it
        if debug:
            traceback.print_exc()
        print(f"reapkit: a defect of reapkit: {type(error).__name__}: {error}\n"
              "Run again with --debug for the traceback, and please report it.", file=sys.stderr)
        return 1
