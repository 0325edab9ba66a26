"""Commands that show results: inspect, compare, export, report."""

from __future__ import annotations

import json
import sys
import webbrowser
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated

import typer

from reapkit.cli.app import Json, app, out
from reapkit.core.errors import RecipeError
from reapkit.recipe.schema import DEFAULT_CRITERION
from reapkit.report.inspection.inspect import inspect as look_into


@app.command()
def compare(
    paths: Annotated[
        list[str], typer.Argument(metavar="A B...", help="Recipes, observations, selections or runs, all of one kind.")
    ],
    criterion: Annotated[
        str, typer.Option("--criterion", metavar="NAME", help="For observations: the criterion that ranks experts.")
    ] = DEFAULT_CRITERION,
    ratio: Annotated[
        str, typer.Option("--ratio", metavar="R", help="For observations: the share of experts to remove.")
    ] = "0.5",
    different_models: Annotated[
        bool, typer.Option("--different-models", help="For observations: compare them even if their models differ.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help=("Also write the comparison as an HTML page that opens offline.")),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two or more recipes, observations, selections or runs: what they share and where they differ.

    Observations: is the calibration large enough? It is if two observations of the same sources keep the same experts.
    Runs: sizes, quality with intervals, verdicts and recipes side by side.

    Example: reapkit compare monday/observation tuesday/observation --ratio 0.5
    """
    from reapkit.pipeline.planned import make_plan
    from reapkit.report.comparison.compare import compare as compare_all
    from reapkit.report.comparison.terms import ComparisonTerms

    found = compare_all(paths, ComparisonTerms(criterion, _ratio(ratio), different_models, make_plan))
    if html is not None:
        found.save_page(html)
    if as_json:
        print(json.dumps(found.to_json() | ({"html": str(html)} if html else {})))
        return
    for block in found.blocks():
        out().print(block)
    if html is not None:
        print(html)


def _ratio(text: str) -> Decimal:
    try:
        ratio = Decimal(text)
        if not ratio.is_finite() or not 0 < ratio < 1:
            raise ValueError
    except (InvalidOperation, ValueError):
        raise RecipeError(f"--ratio: found '{text}'. Allowed: a number between 0 and 1, such as 0.5.") from None
    return ratio


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A recipe, a checkpoint, a run, or an artifact of one.")],
    as_json: Json = False,
) -> None:
    """Describe a path: a recipe, checkpoint, calibration, packs, observation, selection, evaluation or run.

    Example: reapkit inspect runs/demo/calibration
    """
    found = look_into(path)
    if as_json:
        print(json.dumps(found.to_json()))
        return
    console = out()
    for block in found.blocks(colour=console.is_terminal and console.color_system is not None and not console.no_color):
        console.print(block)


@app.command()
def export(
    observation: Annotated[
        str, typer.Argument(metavar="OBSERVATION", help="Directory of an observation, or of a run.")
    ],
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Directory to write the tables to.", show_default=False)
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="DIR", help=("Directory to write a PNG of every chart to; needs Chromium.")),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an observation as saliency.parquet, ranking_by_layer.json and profile.md, and the charts of an observation
    or a run as PNG files.

    Example: reapkit export runs/demo saliency --png figures
    """
    from reapkit.report.inspection.exporting import export_at, pictures_at

    if directory is None and png is None:
        raise RecipeError(
            "export: no output was requested. Give DIR for the tables, --png DIR for the charts, or both."
        )
    files = export_at(observation, directory) if directory else []
    written = [str(file) for file in (*files, *(pictures_at(observation, png) if png else []))]
    print(json.dumps({"files": written}) if as_json else "\n".join(written))


@app.command()
def report(
    path: Annotated[str, typer.Argument(metavar="OBSERVATION", help="Directory of an observation, or of a run.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="File of the page; default: observation.html, or the run's own page.",
            show_default=False,
        ),
    ] = None,
    selection: Annotated[
        Path | None, typer.Option("--selection", metavar="DIR", help="Show this selection in the page.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: Json = False,
) -> None:
    """Write an observation as one HTML page that opens offline. For a run, print the path of its own page, or open it.

    Example: reapkit report runs/demo --open
    """
    from reapkit.report.inspection.exporting import page_at

    page = page_at(path, output, selection)
    print(json.dumps({"file": str(page)}) if as_json else page)
    if show and not webbrowser.open(page.resolve().as_uri()):
        print(f"No browser could be started. Open {page} in a browser.", file=sys.stderr)
