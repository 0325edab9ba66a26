"""The public names do what the documentation says, and importing them costs nothing."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import pytest

import reapkit
from reapkit import api
from tests.support.paths import ROOT


def callables(thing: Any) -> Iterator[Callable[..., Any]]:
    """A function, or what a class of the package defines for its users: methods, class methods and properties."""
    if not inspect.isclass(thing):
        yield thing
        return
    for base in thing.__mro__:
        if base.__module__.startswith("reapkit"):
            for name, member in vars(base).items():
                if name.startswith("_"):
                    continue
                if isinstance(member, property):
                    yield member.fget
                elif inspect.isfunction(member) or isinstance(member, classmethod | staticmethod):
                    yield inspect.unwrap(getattr(member, "__func__", member))


def unannotated(function: Callable[..., Any]) -> list[str]:
    """Parameters without a type, and `return` where the result has none."""
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    return [name for name in (*names, "return") if name not in function.__annotations__]


def test_public_names_are_there() -> None:
    assert {*reapkit.__all__} <= {*api.__all__} and {*reapkit.__all__} <= {*dir(reapkit)}
    assert all(getattr(reapkit, name) is getattr(api, name) for name in reapkit.__all__)


@pytest.mark.parametrize("name", sorted(api.__all__))
def test_public_names_are_documented_and_typed(name: str) -> None:
    thing = getattr(api, name)
    assert thing.__doc__
    assert {function.__qualname__: missing for function in callables(thing) if (missing := unannotated(function))} == {}


def test_a_missing_type_is_found() -> None:
    class Loose:
        def typed(self, a: int, *, b: str = "") -> None: ...

        def half(self, a: int, b) -> None: ...

        @property
        def size(self): ...

    Loose.__module__ = "reapkit.made_up"
    assert {function.__name__: unannotated(function) for function in callables(Loose)} == {
        "typed": [],
        "half": ["b"],
        "size": ["return"],
    }


def test_type_checkers_are_told_that_the_package_is_typed() -> None:
    assert resources.files("reapkit").joinpath("py.typed").is_file()


def test_a_submodule_never_hides_a_public_function() -> None:
    code = (
        "import reapkit, reapkit.planning.plan, reapkit.pipeline.run, reapkit.selection.selection; assert"
        " callable(reapkit.plan) and callable(reapkit.select)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_plan_takes_a_path_a_name_or_a_recipe() -> None:
    recipe = reapkit.load_recipe(ROOT / "recipes" / "demo.yaml")
    plans = [reapkit.plan(recipe), reapkit.plan(str(ROOT / "recipes" / "demo.yaml")), reapkit.plan("demo")]
    assert len({tuple(stage.key for stage in plan.stages) for plan in plans}) == 1
