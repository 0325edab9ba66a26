"""Finds saliency criteria by name: built-in ones, those of installed packages, and `module:function`. Torch-free.

A package offers its own under the entry point group `reapkit.criteria`; a project's own file needs no packaging, only
to be importable: `saliency.criterion: my_module:my_function`. Both are functions of the totals and the recipe's
`saliency` section (see `totals.Totals`) that return an array [layers, experts], higher is kept.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from reapkit.core.errors import Problem, RecipeError
from reapkit.observation.materials import Material
from reapkit.recipe.schema import SaliencySpec
from reapkit.selection.criteria.criterion import Criterion
from reapkit.selection.criteria.eaft_reap import EAFT_REAP
from reapkit.selection.criteria.ean import EAN
from reapkit.selection.criteria.ean_mean import EAN_MEAN
from reapkit.selection.criteria.frequency import FREQUENCY
from reapkit.selection.criteria.knockout import KNOCKOUT
from reapkit.selection.criteria.random_control import RANDOM
from reapkit.selection.criteria.reap import REAP
from reapkit.selection.criteria.reap_relative import REAP_RELATIVE
from reapkit.selection.criteria.reroute import REROUTE, REROUTE_SINGLE
from reapkit.selection.criteria.weighted_frequency import WEIGHTED_FREQUENCY

BUILTIN: dict[str, Criterion] = {
    record.name: record
    for record in (
        REAP,
        REAP_RELATIVE,
        EAFT_REAP,
        FREQUENCY,
        WEIGHTED_FREQUENCY,
        EAN,
        EAN_MEAN,
        REROUTE,
        REROUTE_SINGLE,
        KNOCKOUT,
        RANDOM,
    )
}
"""Criteria by name, in the order in which people read them. To add a criterion, write its record in a file beside this
one and list it here."""

ENTRY_POINT_GROUP = "reapkit.criteria"
_MODULE_FUNCTION = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")


def criterion(name: str) -> Criterion:
    """The record of a criterion that recipes can name; a user's function is imported when it is first computed.

    Raises RecipeError for an unknown name.
    """
    if problem := criterion_problem(name):
        raise RecipeError([problem])
    return described(name)


def described(name: str) -> Criterion:
    """As `criterion`, also for names that only a selection made elsewhere knows: what can be said of any of them."""
    return BUILTIN.get(name) or Criterion(
        name=name,
        summary="a criterion of its own",
        explanation="a criterion of its own",
        symbols=name,
        function=lambda evidence, spec: _user_function(name)(evidence.totals, spec),
    )


def vocabulary() -> dict[str, str]:
    """The built-in names, each with its formula under default settings and one line, for schema and reference."""
    return {name: f"{record.formula(SaliencySpec())}: {record.summary}." for name, record in BUILTIN.items()}


def reading(material: Material) -> list[str]:
    """Names of the built-in criteria that need a material."""
    return [name for name, record in BUILTIN.items() if material in record.materials]


def installed_criteria() -> dict[str, EntryPoint]:
    """Criteria that installed packages offer, by name; a built-in name cannot be taken over."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in BUILTIN}


def criterion_problem(name: str, path: str = "saliency.criterion") -> Problem | None:
    """What is wrong with a criterion's name, without importing anything of the user's; None if nothing is."""
    known = (*BUILTIN, *sorted(installed_criteria()))
    if name in known or _MODULE_FUNCTION.match(name):
        return None
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return Problem(
        path,
        f"found '{name}'. Known: {', '.join(known)}, or your own as module:function."
        + (f" Did you mean '{near[0]}'?" if near else ""),
    )


def criterion_fingerprint(name: str) -> str | None:
    """sha256 of the file that defines a user's criterion, for keys: its code decides. None for built-in ones.

    The file is found, not run. Raises RecipeError where there is none.
    """
    if name in BUILTIN:
        return None
    if problem := criterion_problem(name):
        raise RecipeError([problem])
    module = _target(name).partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.has_location or spec.origin is None:
        raise RecipeError([_not_found(name, f"No module named '{module}'")])
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def _user_function(name: str) -> Callable[..., Any]:
    """The function behind an installed criterion's name or `module:function`. Raises RecipeError if it cannot be
    had."""
    if problem := criterion_problem(name):
        raise RecipeError([problem])
    module, _, attribute = _target(name).partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise RecipeError([_not_found(name, error)]) from error
    if not callable(found):
        kind = type(found).__name__
        raise RecipeError([Problem("saliency.criterion", f"'{name}' is a {kind}, not a function of (totals, spec).")])
    return found


def _target(name: str) -> str:
    point = installed_criteria().get(name)
    return point.value if point else name


def _not_found(name: str, why: object) -> Problem:
    folder = _target(name).partition(":")[0].partition(".")[0]
    return Problem(
        "saliency.criterion",
        f"'{name}' cannot be imported ({why}). Put the folder that holds {folder} on "
        "PYTHONPATH, or install its package.",
    )
