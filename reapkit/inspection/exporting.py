"""Writes an observation's tables for other tools, with all that lies around it: its calibration, its run, its speed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from reapkit.errors import RecipeError
from reapkit.export import export
from reapkit.inspection.recognise import Found, observation_at, read_json, recognise
from reapkit.observation import Observation
from reapkit.recipe.loading import load
from reapkit.report.facts import recipe_yaml
from reapkit.store import KEY_LETTERS

SHAPING = ("model", "calibration", "observe")
"""The sections of a recipe that an observation depends on."""


def export_at(path: str | Path, directory: Path) -> list[Path]:
    """saliency.parquet, ranking_by_layer.json and profile.md below `directory`, from an observation, its artifact or a run.

    Raises UnusableError where there is no observation.
    """
    found, place = recognise(path), observation_at(path)
    return export(Observation.load(place), directory, **_around(found, place))


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
        now, then = yaml.safe_load(recipe_yaml(load(recipe).recipe)), yaml.safe_load(resolved.read_text(encoding="utf-8"))
    except (RecipeError, OSError):
        return None
    return f"reapkit observe {shlex.quote(recipe)}" if all(now[section] == then[section] for section in SHAPING) else None
