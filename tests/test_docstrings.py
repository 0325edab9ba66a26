"""Public functions that take or return arrays say what shape and dtype these have."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.house import House
from tests.support.paths import ROOT

ARRAY = re.compile(r"\b(Tensor|ndarray)\b")
SHAPE = re.compile(r"\[[\w ,'×+*/.…-]+\]|\bany shape\b|\bscalar\b")
"""`[tokens, top_k]`, `[]` never: a scalar is called one; what takes every shape says "of any shape"."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Functions and methods of public classes whose names have no leading underscore."""
    for node in body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from public_functions(node.body, f"{prefix}{node.name}.")
        else:
            yield f"{prefix}{node.name}", node


def takes_or_returns_arrays(function: Function) -> bool:
    args = function.args
    given = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    annotations = [*(arg.annotation for arg in given), function.returns]
    return any(ARRAY.search(ast.unparse(annotation)) for annotation in annotations if annotation)


def without_a_shape(source: str) -> list[str]:
    """Public functions on arrays whose docstring names no shape."""
    return [
        f"{name} (line {function.lineno})"
        for name, function in public_functions(ast.parse(source).body)
        if takes_or_returns_arrays(function) and not SHAPE.search(" ".join((ast.get_docstring(function) or "").split()))
    ]


MODULES = House(ROOT / "reapkit").modules


@pytest.mark.parametrize("module", MODULES)
def test_public_functions_on_arrays_say_shapes(module: str) -> None:
    silent = without_a_shape(MODULES[module].read_text())
    assert not silent, f"{module}: say the shapes (`[tokens, top_k]`, or `of any shape`) and dtypes of {silent}"


def test_functions_without_a_shape_are_found() -> None:
    source = '''
def plain(count: int) -> int: ...
def silent(values: Tensor) -> float: ...
def range_only() -> np.ndarray:
    """Numbers in [0, 1)."""
def told(values: torch.Tensor | None, *, keep: int = 1) -> None:
    """`values`: float32 [tokens,
    top_k]."""
def copied(tensors: dict[str, Tensor]) -> None:
    """Tensors of any shape."""
def _private(values: Tensor) -> None: ...
class Table:
    """Sums, float64 [L, E]."""
    def method(self, *parts: ndarray) -> None: ...
    def _private(self, values: Tensor) -> None: ...
class _Hidden:
    def method(self, values: Tensor) -> None: ...
'''
    assert without_a_shape(source) == ["silent (line 3)", "range_only (line 4)", "Table.method (line 14)"]
