"""Commands that show what there is: inspect, compare, export, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from reapkit.cli.app import Json, app, out
from reapkit.differences import compare_recipes
from reapkit.inspection import inspect as look_into
from reapkit.recipe.loading import load
from reapkit.tables import difference_tables


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
        out().print(table)


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
    console = out()
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
