"""Exports an observation's tables, page and charts, with the calibration, run and speed found around it."""

from __future__ import annotations

import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from reapkit.core.artifact_store import KEY_LETTERS
from reapkit.core.as_written import require_as_written
from reapkit.core.atomic_files import copy_file
from reapkit.core.errors import RecipeError
from reapkit.observation.observation import Observation
from reapkit.recipe.loading import load
from reapkit.report.export import export
from reapkit.report.facts import recipe_yaml
from reapkit.report.inspection.recognise import Found, observation_at, read_json, recognise
from reapkit.report.observation_report import write_observation_report
from reapkit.report.pictures import write_pictures
from reapkit.selection.selection import Selection

REPORT = "report.html"

SHAPING = ("model", "calibration", "observe")
"""The sections of a recipe that an observation depends on."""


def export_at(path: str | Path, directory: Path) -> list[Path]:
    """saliency.parquet, ranking_by_layer.json and profile.md below `directory`, from an observation, its artifact or a
    run.

    Raises UnusableError where there is no observation.
    """
    found, place = recognise(path), observation_at(path)
    return export(Observation.load(place), directory, **_around(found, place))


def page_at(path: str | Path, output: Path | None = None, selection: Path | None = None) -> Path:
    """The page of what lies at `path`: a run's own, or one drawn of an observation (to `output`, else
    observation.html), `selection` marked.

    Raises UnusableError where there is neither.
    """
    found = recognise(path)
    own = found.place / REPORT
    if found.kind == "run" and own.is_file() and selection is None:
        return own if output is None else _copied(own, output)
    place = observation_at(path)
    output = output or Path("observation.html")
    if selection is not None:
        require_as_written(selection)
    write_observation_report(
        Observation.load(place),
        Selection.load(selection) if selection else None,
        output,
        _around(found, place).get("model"),
    )
    return output


def _copied(file: Path, target: Path) -> Path:
    copy_file(file, target)
    return target


def pictures_at(path: str | Path, directory: Path) -> list[Path]:
    """The charts of the same page as PNG files below `directory`, with captions.md. Raises UnusableError without a
    browser."""
    with TemporaryDirectory(prefix="reapkit-page-") as scratch:
        found = recognise(path)
        own = found.kind == "run" and (found.place / REPORT).is_file()
        return write_pictures(page_at(path, None if own else Path(scratch) / REPORT), directory)


def _around(found: Found, place: Path) -> dict[str, Any]:
    """What the neighbours of an observation say; what is not there is left out."""
    if found.artifact:
        key = found.artifact["inputs"].get("calibrate", "")
        file = found.place.parent.parent / f"calibrate-{key[:KEY_LETTERS]}" / "payload" / "calibration.json"
        told: dict[str, Any] = {"tokens_per_second": found.artifact["summary"].get("tokens_per_second")}
    else:
        file, told = place.parent / "calibration" / "calibration.json", _of_run(place.parent / "run.json")
    return told | ({"calibration": read_json(file)} if file.is_file() else {})


def _of_run(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    run = read_json(file, ("recipe", "model", "stages"))
    speed = run["stages"].get("observe", {}).get("summary", {}).get("tokens_per_second")
    return {
        "model": run["model"],
        "reproduce": _command(run["recipe"], file.parent / "recipe.resolved.yaml"),
        "tokens_per_second": speed,
    }


def _command(recipe: str, resolved: Path) -> str | None:
    """What makes the observation again; None where the recipe is gone, or differs from the run's in what shapes it."""
    try:
        now, then = (yaml.safe_load(recipe_yaml(load(recipe))), yaml.safe_load(resolved.read_text(encoding="utf-8")))
    except (RecipeError, OSError):
        return None
    return (
        f"reapkit observe {shlex.quote(recipe)}" if all(now[section] == then[section] for section in SHAPING) else None
    )
