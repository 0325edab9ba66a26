"""Reads the generators' tables of words, templates and function descriptions from the YAML files beside this module.
Torch-free."""

from functools import cache
from importlib.resources import files
from typing import Any

import yaml


@cache
def table(name: str) -> dict[str, Any]:
    """The content of `name`.yaml, read once; it is shared, so it must not be changed."""
    text = (files("reapkit.calibration.builtin") / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
