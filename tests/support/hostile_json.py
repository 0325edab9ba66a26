"""JSON with absurd values: what a file that came over the network, or was edited by hand, may hold anywhere."""

from __future__ import annotations

import json
import random
from typing import Any

NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "9" * 30, "-1", "1.5", "1" + "0" * 12, "0")
OTHERS = ("true", "null", '"4"', '""', "[]", "{}", "[-1]", '["x"]', '{"a": 1}', '"\\u0663"', "[" * 5000 + "]" * 5000)
PLACE = "@here@"


def absurd_texts(value: Any, draw: random.Random, count: int) -> list[str]:
    """`count` texts of `value` with one value in it replaced or a key renamed; every absurd number comes first at the
    top, so that a parser which takes it is noticed whatever the draw."""
    texts = [with_one(value, draw, number) for number in NUMBERS]
    return texts + [with_one(value, draw, draw.choice((*NUMBERS, *OTHERS))) for _ in range(count - len(texts))]


def with_one(value: Any, draw: random.Random, text: str) -> str:
    """The text of `value` with `text` in a place that `draw` chooses."""
    return json.dumps(_marked(value, draw)).replace(f'"{PLACE}"', text)


def _marked(value: Any, draw: random.Random) -> Any:
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.1:
        return PLACE
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if isinstance(value, dict) and draw.random() < 0.1:
        odd = draw.choice(["x", "-1", "007", "9" * 5000, "\u0663"])
        return {odd if name == key else name: item for name, item in value.items()}
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = _marked(value[key], draw)
    return copy
