"""The house keeps its plan: imports go down the floors, and everything up to the plan stays free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "reapkit"
FLOORS = {
    0: "errors hashing interruption progress ranks",
    1: "recipe architecture gates criteria",
    2: "checkpoint mapped shards hub layout mtp schemes sizes store builtin resolve layer_budget",
    3: "allocation budget garbage imported planning lock starter differences estimates quantize_memory tables",
    4: "observation saliency selection decision eaft eaft_table statistics metrics ridge reroute removal",
    5: "foreign models masking calibration observe surgery repair",
    6: "stages quantize evaluate verify report serving",
    7: "run export inspection comparison",
    8: "cli terminal llmcompressor __init__ __main__",
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}


def room(module: str) -> str:
    """`reapkit.recipe.schema` -> `recipe`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports when it is used, type checking aside."""
    tree = ast.parse(path.read_text())
    hidden = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
              for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "reapkit":
            found |= {f"{node.module}.{alias.name}" if node.module == "reapkit" else node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "reapkit"}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if "_recipes" not in path.parts)


def module_of(path: Path) -> str:
    return ".".join(("reapkit", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def test_every_room_has_a_floor() -> None:
    homeless = {room(module_of(path)) for path in FILES} - set(FLOOR)
    assert not homeless, f"give these a floor in FLOORS: {sorted(homeless)}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down(path: Path) -> None:
    here = room(module_of(path))
    climbing = [target for target in imports(path) if room(target) != here and FLOOR[room(target)] > FLOOR[here]]
    assert not climbing, f"floor {FLOOR[here]} imports upward: {climbing}"


@pytest.mark.parametrize("module", ["reapkit", "reapkit.planning", "reapkit.cli"])
def test_torch_stays_out_until_the_plan_is_made(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
