"""Split expressions: the rows that each names, the same as `datasets` takes, and what is refused."""

from __future__ import annotations

import pytest
from datasets import ReadInstruction

from reapkit.recipe.split_expression import split_parts

EXPRESSIONS = [
    *("train", "train[:10]", "train[10:]", "train[3:7]", "train[-5:]", "train[:-5]", "train[50:200]", "train[:]"),
    *("train[:10%]", "train[33%:66%]", "train[-10%:]", "train[50%:]", "train[:1%](pct1_dropremainder)", "train[8:3%]"),
    *("train+test", "train[:5]+test[:50%]", "train[:2]+train[4:6]", " train [ : 4 ] + test"),
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("total", [7, 100, 1037])
def test_parts_hold_the_rows_that_datasets_takes(expression: str, total: int) -> None:
    if "dropremainder" in expression and total < 100:
        assert not split_parts(expression)[0].rows(total)  # `datasets` refuses it, as nothing would be left
        return
    lengths = {"train": total, "test": 10}
    expected = [(part.splitname, range(part.from_, part.to)) for part in _absolute(expression, lengths)]
    found = [(part.name, part.rows(lengths[part.name])) for part in split_parts(expression)]
    assert [(name, list(rows)) for name, rows in found] == [(name, list(rows)) for name, rows in expected]


def _absolute(expression: str, lengths: dict[str, int]) -> list:
    return ReadInstruction.from_spec(expression.replace(" ", "")).to_absolute(lengths)


def test_rows_written_out() -> None:
    [part] = split_parts("train[10%:20%]")
    assert part.rows(30) == range(3, 6) and part.needs_total and not part.whole
    assert split_parts("train[:1000]")[0].rows(30) == range(30)


@pytest.mark.parametrize("expression", ["", "train[", "train[:10", "train[a:b]", "train[1]", "train++test", "a b"])
def test_what_is_no_split(expression: str) -> None:
    with pytest.raises(
        ValueError, match=r"which is no split.*Write a split's name, a part of it such as train\[:1000\]"
    ):
        split_parts(expression)


def test_more_than_everything() -> None:
    with pytest.raises(ValueError, match="more than 100 %"):
        split_parts("train[:110%]")
