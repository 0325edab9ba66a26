"""What a package's modules import, read from their source: circles, rooms, and what is loaded with a module."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

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


def room(module: str) -> str:
    """`reapkit.recipe.schema` -> `recipe`; loose modules are rooms of their own."""
    return module.split(".")[1] if "." in module else "__init__"


class House:
    """The modules of the package in a directory, by their dotted names."""

    def __init__(self, package: Path):
        self.package = package
        files = (path for path in sorted(package.rglob("*.py")) if "_recipes" not in path.parts)
        self.modules = {
            ".".join((package.name, *path.relative_to(package).with_suffix("").parts)).removesuffix(".__init__"): path
            for path in files
        }
        self._imports: dict[tuple[str, bool], frozenset[str]] = {}

    def imports(self, module: str, *, lazy: bool = True) -> frozenset[str]:
        """What a module imports when it is used, by full dotted name; type checking aside. Without `lazy`: when it is
        imported."""
        if (module, lazy) not in self._imports:
            self._imports[module, lazy] = self._read_imports(module, lazy)
        return self._imports[module, lazy]

    def _read_imports(self, module: str, lazy: bool) -> frozenset[str]:
        tree = ast.parse(self.modules[module].read_text())
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
                inside = {f"{node.module}.{alias.name}" for alias in node.names} & self.modules.keys()
                found |= inside or {node.module}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        return frozenset(found)

    def own(self, module: str, *, lazy: bool = True) -> set[str]:
        """The package's own modules among `imports`."""
        return {name for name in self.imports(module, lazy=lazy) if name in self.modules}

    def loaded_by(self, module: str) -> set[str]:
        """Top-level names of everything outside the package that importing a module imports, its own packages'
        `__init__` included."""
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
            found = self.imports(name, lazy=False)
            waiting += [other for other in found if other in self.modules]
            outside |= {other.split(".")[0] for other in found if other not in self.modules}
        return outside

    def circle(self) -> list[str]:
        """Modules that import each other in turn, the first once more at the end; empty where there is no circle."""
        try:
            tuple(TopologicalSorter({module: self.own(module) - {module} for module in self.modules}).static_order())
        except CycleError as error:
            return error.args[1]
        return []

    def without_a_room(self) -> list[str]:
        """Modules that neither stand in a room nor may stand loose."""
        return [module for module in self.modules if room(module) not in {*ROOMS, *LOOSE}] + [
            f"{self.package.name}.{path.stem}" for path in self.package.glob("*.py") if path.stem in ROOMS
        ]

    def upward(self, module: str) -> list[str]:
        """What a module of a room imports from rooms above or beside its own."""
        here = room(module)
        allowed = {*ROOMS[: ROOMS.index(here) + 1]} - (BESIDE - {here} if here in BESIDE else set())
        return sorted(other for other in self.own(module) if room(other) not in allowed and other != self.package.name)

    @cached_property
    def torch_free(self) -> list[str]:
        """Modules whose docstring says "Torch-free."."""
        return [
            name
            for name, path in self.modules.items()
            if "torch-free." in (ast.get_docstring(ast.parse(path.read_text())) or "").lower()
        ]

    def heavy(self, module: str) -> set[str]:
        """The heavy packages that importing a module loads."""
        return self.loaded_by(module) & HEAVY

    def namesakes(self) -> dict[str, list[str]]:
        """Names that classes of several modules bear, private ones without their underscore: the modules."""
        modules: defaultdict[str, list[str]] = defaultdict(list)
        for name, path in self.modules.items():
            classes = (node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef))
            for each in {found.lstrip("_") for found in classes}:
                modules[each].append(name)
        return {name: found for name, found in modules.items() if len(found) > 1}
