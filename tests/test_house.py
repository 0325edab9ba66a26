"""The house keeps its plan: no circle among modules, rooms import rooms above them only, torch-free files are free of
torch.

    python tests/test_house.py

prints the rooms with their modules, lines and arrows.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "reapkit"
ROOMS = (
    "core",
    "recipe",
    "checkpoint",
    "calibration",
    "model",
    "observation",
    "selection",
    "pruning",
    "healing",
    "quantization",
    "evaluation",
    "planning",
    "report",
    "pipeline",
    "cli",
)
"""From the ground up: a room imports rooms that stand before it, and itself."""
BESIDE = {"calibration", "model"}
"""Neighbours on one floor, which do not import each other."""
LOOSE = {"__init__", "__main__", "api", "llmcompressor"}
HEAVY = {"torch", "transformers", "datasets", "llmcompressor", "compressed_tensors", "accelerate"}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    files = (path for path in sorted(PACKAGE.rglob("*.py")) if "_recipes" not in path.parts)
    return {
        ".".join(("reapkit", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in files
    }


MODULES = modules()


def room(module: str) -> str:
    """`reapkit.recipe.schema` -> `recipe`; loose modules are rooms of their own."""
    return module.split(".")[1] if "." in module else "__init__"


@cache
def imports(module: str, *, lazy: bool = True) -> frozenset[str]:
    """What a module imports when it is used, by full dotted name; type checking aside. Without `lazy`: when it is
    imported."""
    tree = ast.parse(MODULES[module].read_text())
    hidden = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if typing_only or (not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            hidden |= {id(inner) for inner in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inside or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(found)


def own(module: str, *, lazy: bool = True) -> set[str]:
    """The package's own modules among `imports`."""
    return {name for name in imports(module, lazy=lazy) if name in MODULES}


@cache
def loaded_by(module: str) -> frozenset[str]:
    """Top-level names of everything outside the package that importing a module imports, its own packages' `__init__`
    included."""
    seen: set[str] = set()
    outside: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        parts = name.split(".")
        waiting += [".".join(parts[:n]) for n in range(1, len(parts))]
        found = imports(name, lazy=False)
        waiting += [other for other in found if other in MODULES]
        outside |= {other.split(".")[0] for other in found if other not in MODULES}
    return frozenset(outside)


def test_there_is_no_circle() -> None:
    try:
        tuple(TopologicalSorter({module: own(module) - {module} for module in MODULES}).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_module_has_a_room() -> None:
    assert {room(module) for module in MODULES} == {*ROOMS, *LOOSE}
    assert {path.stem for path in PACKAGE.glob("*.py")} == LOOSE


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in ROOMS])
def test_rooms_import_rooms_below_them(module: str) -> None:
    here = room(module)
    allowed = {*ROOMS[: ROOMS.index(here) + 1]} - (BESIDE - {here} if here in BESIDE else set())
    wrong = sorted(other for other in own(module) if room(other) not in allowed and other != "reapkit")
    assert not wrong, f"{module} imports {wrong}, which stand above or beside {here}"


@pytest.mark.parametrize(
    "module",
    [
        name
        for name, path in MODULES.items()
        if "torch-free." in (ast.get_docstring(ast.parse(path.read_text())) or "").lower()
    ],
)
def test_torch_free_modules_are(module: str) -> None:
    assert not loaded_by(module) & HEAVY


@pytest.mark.parametrize(
    "module", ["reapkit", "reapkit.api", "reapkit.planning.plan", "reapkit.cli.main", "reapkit.pipeline.run"]
)
def test_torch_stays_out_until_the_plan_is_made(module: str) -> None:
    assert not loaded_by(module) & HEAVY


def main() -> None:
    """Prints the house."""
    arrows = Counter(
        (room(module), room(other)) for module in MODULES for other in own(module) if room(module) != room(other)
    )
    for name in (*ROOMS, *sorted(LOOSE)):
        inside = [module for module in MODULES if room(module) == name]
        lines = sum(len(MODULES[module].read_text().splitlines()) for module in inside)
        reads = ", ".join(
            f"{other} {count}" for (here, other), count in sorted(arrows.items()) if here == name and other in ROOMS
        )
        print(f"{name:14s} {len(inside):3d} modules {lines:6d} lines   imports {reads or 'nothing'}")
    print(
        f"{len(arrows)} arrows between {len({*ROOMS, *LOOSE})} boxes, {sum(len(own(module)) for module in MODULES)}"
        " between modules"
    )


if __name__ == "__main__":
    sys.exit(main())
