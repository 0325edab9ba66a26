"""One thing has one name wherever people read it: terminal, pages, cards, errors, README, schema."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FORBIDDEN = {
    r"of the saliency(?! (mass|curve))": "of the saliency mass",
    r"^rows of$": "row length",
    r"\broom\b": "margin (of a limit), space (of a disk)",
    r"^of the mix$": "share of the mix",
    r"asked of the mix": "share of the mix",
    r"%\{?[^ ]* deleted\b|^deleted$|^Deletes ": "removed, Removes",
    r"same (next|most likely) token": "top-1 agreement",
    r"same top-1|top-1 same": "top-1 agreement",
    r"perplexity against the base": "perplexity ratio",
    r"KL (from|against) the base|(: |^)KL$": "mean KL",
    r"routing traffic": "routed traffic",
    r"positions scored|scored positions": "scored tokens",
}
"""What no text for people says, and what it says instead."""
DOCUMENTED_SCHEMA = ROOT / "reapkit" / "recipe" / "schema.py"
MODULES = [path for path in sorted((ROOT / "reapkit").rglob("*.py")) if "builtin" not in path.parts]
TEXTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "recipe.schema.json")),
    *sorted((ROOT / "reapkit" / "report" / "assets").glob("page.*")),
]


def docstrings(tree: ast.Module) -> set[int]:
    """Constants that only a developer reads: statements of their own."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def texts_of(module: Path) -> Iterator[tuple[int, str]]:
    """A module's strings with their lines; of the schema its docstrings too, since they describe the fields."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    aside = set() if module == DOCUMENTED_SCHEMA else docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in aside:
            yield node.lineno, " ".join(node.value.split())


def wrong_words(text: str) -> list[str]:
    return [f"{found[0]!r}: say {right}" for wrong, right in FORBIDDEN.items() if (found := re.search(wrong, text))]


def test_no_text_of_a_module_uses_another_word() -> None:
    found = [
        f"{module.relative_to(ROOT)}:{line}: {word}"
        for module in MODULES
        for line, text in texts_of(module)
        for word in wrong_words(text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_no_document_uses_another_word(file: Path) -> None:
    found = [
        f"{file.name}:{number}: {word}"
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        for word in wrong_words(line)
    ]
    assert not found, "\n".join(found)


def test_the_words_are_found_where_they_stand(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""The room of a docstring is free."""\nSAID = f"{1} of the saliency"\nCOLUMN = "rows of"\n')
    said = [text for _, text in texts_of(module)]
    assert sorted(word for text in said for word in wrong_words(text)) == [
        "'of the saliency': say of the saliency mass",
        "'rows of': say row length",
    ]
    assert not wrong_words("12.0 % of the saliency mass are removed by the least of the saliency curve")
