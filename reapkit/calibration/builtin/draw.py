"""Draws random choices that are the same on every Python version, and fills sentence templates with them."""

import random
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

Option = TypeVar("Option")

_SLOT = re.compile(r"\{(a )?(\w+)\}")


class Draw:
    """A stream of choices that depends on `key` alone.

    Only `Random.random()` is used underneath: Python promises the same numbers from it in every version, while
    `choice`, `randint`, `sample` and `shuffle` may change theirs.
    """

    def __init__(self, key: str) -> None:
        self._random = random.Random(key).random

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self._random() < probability

    def integer(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, options: Sequence[Option]) -> Option:
        """One of the options, all equally likely."""
        return options[int(self._random() * len(options))]

    def sample(self, options: Sequence[Option], count: int) -> list[Option]:
        """`count` different positions of `options`, in random order."""
        remaining = list(options)
        return [remaining.pop(int(self._random() * len(remaining))) for _ in range(count)]

    def shuffled(self, options: Sequence[Option]) -> list[Option]:
        """All options in random order."""
        return self.sample(options, len(options))


def expand(draw: Draw, text: str, rules: Mapping[str, Sequence[str]], bound: Mapping[str, str]) -> str:
    """Replace every `{slot}` by what `bound` holds for it, else by a random alternative of its rule, recursively.

    `{a slot}` also puts the right indefinite article in front.

    Raises: KeyError for a slot that neither `bound` nor `rules` knows.
    """

    def replace(match: re.Match) -> str:
        article, name = match.groups()
        value = bound[name] if name in bound else draw.pick(rules[name])
        value = expand(draw, value, rules, bound)
        return with_article(value) if article else value

    return _SLOT.sub(replace, text)


def with_article(phrase: str) -> str:
    """`phrase` behind "a" or "an"; vowel letters take "an", apart from a few words that do not sound like one."""
    sounds_consonant = phrase.lower().startswith(("uni", "use", "one", "eu"))
    sounds_vowel = phrase[0].lower() in "aeiou" or phrase.lower().startswith(("hour", "honest"))
    return f"an {phrase}" if sounds_vowel and not sounds_consonant else f"a {phrase}"


def sentence(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]
