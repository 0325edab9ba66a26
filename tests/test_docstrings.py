"""Docstrings of public functions that take or return arrays say the shapes and dtypes of these."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.house import House
from tests.support.paths import ROOT

ARRAY = re.compile(r"\b(Tensor|ndarray)\b")
SHAPE = re.compile(r"\[[\w ,'×+*/.…-]+\]|\bany shape\b|\bscalar\b")
"""`[tokens, top_k]`; a scalar is called one; what takes every shape says "of any shape"."""
DTYPE = re.compile(r"\b(float|u?int\d|bool\b|bf16\b|dtype)", re.IGNORECASE)
"""`int64`, "in the model's dtype", "in the dtypes of `Observation`"."""

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


def lacking(source: str) -> dict[str, str]:
    """Public functions on arrays whose docstring names no shape or no dtype: which of both."""
    found = {}
    for name, function in public_functions(ast.parse(source).body):
        text = " ".join((ast.get_docstring(function) or "").split())
        lacks = [what for what, pattern in (("shape", SHAPE), ("dtype", DTYPE)) if not pattern.search(text)]
        if lacks and takes_or_returns_arrays(function):
            found[name] = " and ".join(lacks)
    return found


MODULES = House(ROOT / "reapkit").modules


@pytest.mark.parametrize("module", MODULES)
def test_public_functions_on_arrays_say_shapes_and_dtypes(module: str) -> None:
    found = lacking(MODULES[module].read_text())
    assert not found, (
        f"{module}: docstrings lack {found}. Write, for example, `float32 [tokens, top_k]` or `of any shape`"
    )


def test_functions_that_say_too_little_are_found() -> None:
    source = '''
def plain(count: int) -> int: ...
def silent(values: Tensor) -> float: ...
def range_only() -> np.ndarray:
    """Float64 numbers in [0, 1)."""
def shape_only(values: Tensor) -> None:
    """`values`: [tokens, top_k]."""
def told(values: torch.Tensor | None, *, keep: int = 1) -> None:
    """`values`: float32 [tokens,
    top_k]."""
def copied(tensors: dict[str, Tensor]) -> None:
    """Tensors of any shape and dtype."""
def _private(values: Tensor) -> None: ...
class Table:
    """Sums, float64 [L, E]."""
    def method(self, *parts: ndarray) -> None: ...
    def _private(self, values: Tensor) -> None: ...
class _Hidden:
    def method(self, values: Tensor) -> None: ...
'''
    assert lacking(source) == {
        "silent": "shape and dtype",
        "range_only": "shape",
        "shape_only": "dtype",
        "Table.method": "shape and dtype",
    }
