"""Numbers as people read them: one spelling for each use, and nothing that rounds to a wrong impression."""

from __future__ import annotations

import pytest

from reapkit.core import formatting as f


@pytest.mark.parametrize(
    "text, expected",
    [
        (f.percent(0.1234), "12.3 %"),
        (f.percent(0.0001), "< 0.1 %"),
        (f.percent(0.0), "0.0 %"),
        (f.percent(None), "–"),
        (f.exact_percent(0.0001), "0.0 %"),
        (f.exact_percent(0.5, 0), "50 %"),
        (f.exact_percent(None), "-"),
        (f.signed_percent(0.012), "+1.2 %"),
        (f.signed_percent(-0.5), "-50.0 %"),
        (f.narrow_percent(0.1234), "12.3%"),
        (f.narrow_percent(None), "-"),
        (f.decimal(1 / 3), "0.333"),
        (f.decimal(1 / 3, 4), "0.3333"),
        (f.decimal(None), "-"),
        (f.counted({"saliency": 1400, "cap": 2}), "1,400 saliency, 2 cap"),
        (f.counted({}), "-"),
        (f.plural(1, "layer"), "1 layer"),
        (f.plural(2000, "entry", "entries"), "2,000 entries"),
        (f.gigabytes(300_000_000), "0.3 GB"),
        (f.gigabytes(7_300_000, ".3g"), "0.0073 GB"),
        (f.human_bytes(7_300_000), "7.3 MB"),
        (f.human_bytes(None), "-"),
        (f.human_count(3_620_000), "3.62 M"),
        (f.seconds(0.44), "0.4 s"),
        (f.seconds(200), "3 min 20 s"),
        (f.seconds(7500), "2 h 5 min"),
        (f.listed("abc"), "a, b and c"),
        (f.listed("abcdefgh"), "a, b, c, d, e and 3 more"),
        (f.listed(""), "none"),
        (f.ranges([0, 3, 4, 5]), "0, 3-5"),
        (f.human_experts({0: 32, 1: 32}), "32"),
        (f.human_experts({0: 32, 1: 28}), "28 to 32"),
    ],
)
def test_numbers_read_as_people_write_them(text: str, expected: str) -> None:
    assert text == expected


def test_the_extreme_of_known_values_is_found_by_name() -> None:
    assert f.extreme([2.0, 3.0, 3.0], ["a", "b", "c"]) == ("b", 3.0)
    assert f.extreme([2.0, 3.0], [7, 9], largest=False) == (7, 2.0)
    assert f.known_extreme([None, 2.0, 1.0], "abc") == ("b", 2.0)
    assert f.known_extreme([None], "a") is None
    with pytest.raises(ValueError):
        f.extreme([], [])
