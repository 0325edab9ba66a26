"""Generates English prose from a grammar: travel notes, reports, letters, instructions, nature, invented histories."""

from dataclasses import dataclass

from reapkit.calibration.builtin.draw import Draw, expand, sentence
from reapkit.calibration.builtin.tables import table

SHORTEST, LONGEST = 400, 2000


@dataclass(frozen=True)
class Genre:
    """Sentence templates of one kind of text; `closes_apart` gives the last sentence a paragraph of its own."""

    titles: list[str]
    openings: list[str]
    middles: list[str]
    closings: list[str]
    closes_apart: bool


NAMES: dict[str, list[str]] = table("english")["names"]
RULES: dict[str, list[str]] = table("english")["rules"]
GENRES = [Genre(**genre) for genre in table("english")["genres"].values()]


def prose_row(draw: Draw) -> dict:
    """One text of one genre: a few paragraphs about the same people and places."""
    genre = draw.pick(GENRES)
    bound = _setting(draw)
    wanted = draw.integer(SHORTEST + 50, LONGEST - 300)
    openings, middles, closings = (draw.shuffled(pool) for pool in (genre.openings, genre.middles, genre.closings))
    paragraphs = [_title(draw, genre, bound), _paragraph(draw, bound, openings[:1] + _take(draw, middles))]
    while sum(map(len, paragraphs)) < wanted and middles:
        paragraphs.append(_paragraph(draw, bound, _take(draw, middles)))
    ending = _paragraph(draw, bound, closings[:1])
    text = "\n\n".join(part for part in paragraphs if part)
    text = f"{text}\n\n{ending}" if genre.closes_apart or draw.chance(0.2) else f"{text} {ending}"
    return {"text": _shortened(text) + "\n"}


def _setting(draw: Draw) -> dict[str, str]:
    """The names, pronouns and numbers that stay the same within one text."""
    starts, endings = draw.sample(NAMES["place_starts"], 2), draw.sample(NAMES["place_endings"], 2)
    place, other_place = (start + ending for start, ending in zip(starts, endings, strict=True))
    family, other_family = draw.sample(NAMES["families"], 2)
    woman, man = draw.pick(NAMES["women"]), draw.pick(NAMES["men"])
    she = {"person": woman, "friend": man, "she": "she", "her": "her", "hers": "her"}
    he = {"person": man, "friend": woman, "she": "he", "her": "him", "hers": "his"}
    year = draw.integer(1480, 1960)
    return (she if draw.chance(0.5) else he) | {
        "place": place,
        "other_place": other_place,
        "family": family,
        "other_family": other_family,
        "year": str(year),
        "later_year": str(year + draw.integer(2, 40)),
        "number": draw.pick(NAMES["small_numbers"]),
        "count": str(draw.integer(12, 980)),
        "percent": str(draw.integer(2, 60)),
    }


def _take(draw: Draw, pool: list[str]) -> list[str]:
    """Three to six templates, removed from the pool so that none is used twice; some get a connecting word in front."""
    count = min(draw.integer(3, 6), len(pool))
    return [_led(draw, pool.pop()) for _ in range(count)]


def _led(draw: Draw, template: str) -> str:
    leads_already = template.startswith(("first", "then", "next", "last", "in ", '"'))
    return "{lead}" + template if draw.chance(0.12) and not leads_already else template


def _title(draw: Draw, genre: Genre, bound: dict[str, str]) -> str:
    """The first line of a letter or report; other texts have a title only sometimes."""
    if not genre.titles or not (genre.closes_apart or draw.chance(0.4)):
        return ""
    return sentence(expand(draw, draw.pick(genre.titles), RULES, bound))


def _paragraph(draw: Draw, bound: dict[str, str], templates: list[str]) -> str:
    return " ".join(sentence(expand(draw, template, RULES, bound)) for template in templates)


def _shortened(text: str) -> str:
    """The text without what follows the last full stop before `LONGEST`."""
    return text if len(text) < LONGEST else text[: text.rindex(".", 0, LONGEST - 1) + 1]
