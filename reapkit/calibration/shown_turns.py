"""Finds what each assistant turn wrote in a whole rendered conversation, whatever the template did to earlier turns.

Templates drop thoughts of earlier turns, end the last turn otherwise, or insert empty thoughts, so that comparing
renderings of growing conversations finds nothing. Here every piece of what turns say is put between two characters
that no text holds, and the conversation is rendered again: where the pieces stand is then seen, and what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reapkit.calibration.template_process import TemplateStopped
from reapkit.calibration.turns import REASONING_KEYS, Message, said_pieces

FIRST_MARK = 0xF0000
"""The private characters of Unicode's plane 15, of which nothing published makes use."""

Render = Callable[..., str]
"""`(messages, prompt=False)` to text."""


class NotFound(ValueError):
    """The turns cannot be found in the rendering; the text says why."""


@dataclass(frozen=True)
class Shown:
    """Character spans of assistant turns, and those of what others say."""

    spans: list[tuple[int, int]]
    others: list[tuple[int, int]]


@dataclass(frozen=True)
class _Turn:
    """Where a message's pieces stand in the text without marks; `first` None: none of it is shown."""

    first: int | None
    last: int


def shown_turns(messages: Sequence[Message], whole: str, render: Render, added: Sequence[str]) -> Shown:
    """What each assistant turn wrote in `whole`, the rendering of `messages`; `added`: the tokenizer's added tokens.

    A span begins behind the generation prompt, as far as the text agrees with it, and ends with what ends the turn.
    Raises NotFound where the template changes what is said, or does not show it.
    """
    found = _found(messages, whole, render)
    spans, others = [], []
    header, user = opening(messages, render), _user_header(render)
    for number, (message, turn) in enumerate(zip(messages, found, strict=True)):
        if message["role"] != "assistant":
            if turn.first is not None:
                others.append((turn.first, turn.last))
            continue
        if turn.first is None:
            continue  # a thought alone, which the template left out
        begin = max((each.last for each in found[:number]), default=0)
        after = [each.first for each in found[number + 1 :] if each.first is not None]
        end = min(after, default=len(whole))
        start = _behind(header, whole[begin : turn.first], user)
        if start is None:
            raise NotFound(f"the chat template does not render turn {number + 1} as an assistant's")
        rest = whole[turn.last : end]
        stop = _ending(rest, _tail(messages[: number + 1], render), header, user, added) if after else len(rest)
        spans.append((begin + start, turn.last + stop))
    return Shown(spans, others)


def marked(messages: Sequence[Message]) -> tuple[list[Message], list[range], set[int]]:
    """The messages with every piece that is said between two marks, per message the numbers of its pieces, and those
    that are thoughts."""
    pieces = 0
    thoughts: set[int] = set()
    out, numbers = [], []
    for message in messages:
        begin = pieces

        def mark(text: str, thought: bool = False) -> str:
            nonlocal pieces
            said = text.strip()
            if not said:
                return text
            if thought:
                thoughts.add(pieces)
            opening, closing = (chr(FIRST_MARK + 2 * pieces + side) for side in (0, 1))
            pieces += 1
            place = text.index(said)
            return text[:place] + opening + said + closing + text[place + len(said) :]

        changed = dict(message)
        for key in REASONING_KEYS:
            if isinstance(message.get(key), str):
                changed[key] = mark(message[key], thought=True)
        if isinstance(message.get("content"), str):
            parts = said_pieces(message["content"])
            ends = [number for number, part in enumerate(parts) if part.startswith("</")]
            changed["content"] = "".join(
                part if number % 2 else mark(part, thought=any(number < end for end in ends))
                for number, part in enumerate(parts)
            )
        if message.get("tool_calls"):
            changed["tool_calls"] = [
                {**call, "function": {**call["function"], "name": mark(call["function"]["name"])}}
                for call in message["tool_calls"]
            ]
        out.append(changed)
        numbers.append(range(begin, pieces))
    if 2 * pieces > 0xFFFE:
        raise NotFound("the conversation has too many turns")
    return out, numbers, thoughts


def _found(messages: Sequence[Message], whole: str, render: Render) -> list[_Turn]:
    if any(ord(char) >= FIRST_MARK for char in whole):
        raise NotFound("the conversation holds private characters of Unicode")
    changed, numbers, thoughts = marked(messages)
    text = render(changed)
    places = _places(text)
    if places.plain != whole or any(places.closes[piece] < place for piece, place in places.opens.items()):
        raise NotFound("the chat template changes what is said")
    for number, own in enumerate(numbers, 1):
        if any(piece not in places.opens and piece not in thoughts for piece in own):
            raise NotFound(f"the chat template does not show what turn {number} says")
    return [
        _Turn(
            min((places.opens[piece] for piece in own if piece in places.opens), default=None),
            max((places.closes[piece] for piece in own if piece in places.closes), default=0),
        )
        for own in numbers
    ]


@dataclass(frozen=True)
class _Places:
    """A marked text without its marks, and where the pieces' marks stood in it."""

    plain: str
    opens: dict[int, int]
    closes: dict[int, int]


def _places(text: str) -> _Places:
    plain: list[str] = []
    opens: dict[int, int] = {}
    closes: dict[int, int] = {}
    length = 0
    for part in re.split("([\U000f0000-\U000ffffd])", text):
        if len(part) == 1 and ord(part) >= FIRST_MARK:
            piece, side = divmod(ord(part) - FIRST_MARK, 2)
            if side:
                closes[piece] = length
            else:
                opens.setdefault(piece, length)
        else:
            plain.append(part)
            length += len(part)
    return _Places("".join(plain), opens, {piece: place for piece, place in closes.items() if piece in opens})


def opening(messages: Sequence[Message], render: Render) -> str:
    """What a generation prompt adds: the header of an assistant's turn, perhaps with the beginning of a thought."""
    asked: Sequence[Message] = [{"role": "user", "content": "x"}]
    for number, message in enumerate(messages):
        if number and message["role"] == "assistant" and messages[number - 1]["role"] == "user":
            asked = messages[:number]
            break
    before, prompt = _tried(render, asked), _tried(render, asked, prompt=True)
    return prompt[shared_length(before, prompt) :] if before else ""


def _tried(render: Render, messages: Sequence[Message], prompt: bool = False) -> str:
    """The rendering of a conversation that the template may refuse, then nothing."""
    try:
        return render(messages, prompt=prompt)
    except TemplateStopped:
        raise
    except ValueError:
        return ""


def _behind(opening: str, text: str, user: str) -> int | None:
    """Where in `text` the longest beginning of the opening ends, the last place where there are several; `user`: a
    user's header.

    None where no more of it is there than that header has too; the text's end where generation prompts add nothing.
    """
    if not opening:
        return len(text)
    common = max((length for length in range(len(opening)) if opening[:length] in user), default=0)
    for length in range(len(opening), common, -1):
        if (place := text.rfind(opening[:length])) >= 0:
            return place + length
    return None


def _tail(upto: Sequence[Message], render: Render) -> str:
    """What follows the last words of a conversation that ends here; nothing where the template refuses it."""
    places = _places(_tried(render, marked(upto)[0]))
    return places.plain[max(places.closes.values(), default=len(places.plain)) :]


def _ending(rest: str, tail: str, opening: str, user: str, added: Sequence[str]) -> int:
    """How many characters of `rest`, which lies between a turn's last piece and the next turn's first, are the turn's.

    The turn's own end is `tail`, what follows it where the conversation ends with it. Where the template ends earlier
    turns otherwise, it is what stands before the next turn's header, which begins as the opening does or with a token
    that a user's header has too.
    """
    if tail and rest.startswith(tail):
        return len(tail)
    place = shared_length(tail, rest)
    token = _token_over(rest, place, added)
    place = token[0] if token else place
    if (header := _token_over(opening, 0, added)) and (begins := rest.find(header[1], place)) >= 0:
        return begins
    if token is None or token[1] in user:
        return place
    return place + len(token[1])


def _token_over(text: str, place: int, added: Sequence[str]) -> tuple[int, str] | None:
    """The longest added token that begins at `place` or before and ends behind it, and where it begins."""
    found = [
        (begin, token)
        for token in added
        for begin in range(max(0, place - len(token) + 1), place + 1)
        if text.startswith(token, begin)
    ]
    return max(found, key=lambda each: len(each[1]), default=None)


def _user_header(render: Render) -> str:
    """What stands before the words of a user who speaks first."""
    mark = chr(FIRST_MARK)
    return _tried(render, [{"role": "user", "content": mark}]).partition(mark)[0]


def shared_length(one: str, other: str) -> int:
    """Characters of the longest common prefix."""
    for number, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return number
    return min(len(one), len(other))
