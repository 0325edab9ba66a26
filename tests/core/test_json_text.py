"""What Python's parser takes beyond JSON, and numbers beyond any measure, are refused where they are read."""

from __future__ import annotations

from math import inf

import pytest

from reapkit.core.json_text import parse_json


@pytest.mark.parametrize(
    "text",
    ['{"a": NaN}', "[Infinity]", "[-Infinity]", "[1e999]", f"[{'9' * 5000}]", f"[{'9' * 41}]", "[" * 100_000, "{", ""],
)
def test_what_no_file_of_a_model_says_is_refused(text):
    with pytest.raises(ValueError, match=r".") as raised:
        parse_json(text)
    assert len(str(raised.value)) < 200


def test_everything_else_is_what_it_says():
    assert parse_json(b'{"a": [1, -2.5e3, 1000000000000000019884624838656, true, null, "NaN"]}') == {
        "a": [1, -2500.0, 1000000000000000019884624838656, True, None, "NaN"]
    }
    assert parse_json("[0.0, Infinity, -Infinity]", infinite=True) == [0.0, inf, -inf]
    with pytest.raises(ValueError, match="NaN, which is no number"):
        parse_json("NaN", infinite=True)
