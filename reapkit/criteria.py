"""Names of saliency criteria: the built-in ones, those of installed packages, and `module:function`. Torch-free.

A package offers its own under the entry point group `reapkit.criteria`; a project's own file needs no packaging, only to be
importable: `saliency.criterion: my_module:my_function`. Both are functions of the totals and the spec (see `saliency.Totals`).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from reapkit.errors import Problem, RecipeError
from reapkit.recipe.schema import BUILTIN_CRITERIA

ENTRY_POINT_GROUP = "reapkit.criteria"
_MODULE_FUNCTION = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")


def installed_criteria() -> dict[str, EntryPoint]:
    """Criteria that installed packages offer, by name; a built-in name cannot be taken over."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in BUILTIN_CRITERIA}


def criterion_problem(name: str, path: str = "saliency.criterion") -> Problem | None:
    """What is wrong with a criterion's name, without importing anything of the user's; None if nothing is."""
    known = (*BUILTIN_CRITERIA, *sorted(installed_criteria()))
    if name in known or _MODULE_FUNCTION.match(name):
        return None
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return Problem(path, f"found '{name}'. Known: {', '.join(known)}, or your own as module:function."
                   + (f" Did you mean '{near[0]}'?" if near else ""))


def user_criterion(name: str) -> Callable[..., Any]:
    """The function behind an installed criterion's name or `module:function`. Raises RecipeError if it cannot be had."""
    if problem := criterion_problem(name):
        raise RecipeError([problem])
    point = installed_criteria().get(name)
    target = point.value if point else name
    module_name, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise RecipeError([Problem("saliency.criterion", f"'{name}' cannot be imported ({error}). Put the folder that holds "
                                   f"{module_name.partition('.')[0]} on PYTHONPATH, or install its package.")]) from error
    if not callable(found):
        raise RecipeError([Problem("saliency.criterion", f"'{name}' is a {type(found).__name__}, not a function of (totals, spec).")])
    return found


def criterion_fingerprint(name: str) -> str | None:
    """sha256 of the file that defines a user's criterion, for keys: the code changes what it decides. None for built-in ones."""
    if name in BUILTIN_CRITERIA:
        return None
    function = user_criterion(name)
    module = inspect.getmodule(function)
    try:
        source = inspect.getsource(module if module is not None else function)
    except (OSError, TypeError):  # compiled or typed at a prompt: its name is all there is
        source = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    return hashlib.sha256(source.encode()).hexdigest()
