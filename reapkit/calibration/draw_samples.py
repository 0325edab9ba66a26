"""Draws the samples of a source in its seeded order, tokenizes them block by block and keeps the usable ones until
there are enough."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any

from reapkit.calibration.encoder import UNUSABLE, Encoder, format_of, packing_of
from reapkit.calibration.formats import Format
from reapkit.calibration.held_out import HeldOut
from reapkit.calibration.inputs import Inputs
from reapkit.calibration.packing import Piece, pieces_of
from reapkit.calibration.sources import Walk, open_walk
from reapkit.calibration.token_journal import Encoded, Reader, Samples, append, opened
from reapkit.core.errors import UnusableError
from reapkit.recipe.schema import MixEntry

BLOCK = 256
"""Samples that are tokenized together and journalled together."""
JUDGED_ROWS = 1024
"""Rows after which a source with too many unusable ones is given up."""
MOST_REFUSED = 64
"""Samples of an endless source that may be refused for each that is wanted, before it counts as too small."""


@dataclass(frozen=True)
class Target:
    """When a source has enough: so many samples, or so many tokens in its rows; which field of the recipe says so, and
    whether it is the whole mix that must reach it."""

    samples: int | None = None
    tokens: int | None = None
    field: str = "calibration.samples"
    of_mix: bool = False

    @property
    def unit(self) -> str:
        return "tokens" if self.samples is None else "samples"

    @property
    def amount(self) -> int:
        return (self.tokens or 0) if self.samples is None else self.samples


@dataclass(frozen=True)
class Gathered:
    """A source's samples: those of `samples` with the numbers `chosen`, ascending.

    `refused`: what stands before the last of them and may not be held out, as `samples.dropped` lists the others.
    `asked`: what the recipe asks of the source, by unit.
    """

    entry: MixEntry
    walk: Walk
    format: Format
    samples: Samples
    chosen: Sequence[int]
    refused: Sequence[tuple[int, str, str]]
    target: Target
    asked: Mapping[str, int]


def gather(inputs: Inputs, entry: MixEntry, target: Target, held_out: HeldOut | None = None, skip: int = 0) -> Gathered:
    """Enough samples of a mix entry for the target; those that a killed run left are used first.

    `held_out`: what may not occur, which makes the samples a pack's; `skip`: rows of a stream that the calibration
    read. Raises UnusableError naming the source, and the row where one is at fault; where too few are left,
    with what was dropped and why.
    """
    with (
        drawing(inputs, entry, held_out, skip) as source,
        inputs.progress.task(f"tokenize {entry.name}", target.amount, target.unit) as task,
    ):
        reached = 0
        while reached < target.amount:
            number = source.next(target.amount - reached if target.samples is not None else None, target)
            step = 1 if target.samples is not None else source.row_tokens(number)
            reached += step
            task.advance(step)
        source.refuse_unusable()
        return source.gathered(target, {target.unit: target.amount})


@dataclass
class Drawing:
    """A source whose usable samples are taken one by one, in its order."""

    inputs: Inputs
    entry: MixEntry
    walk: Walk
    format: Format
    samples: Samples
    usable: Generator[int, tuple[int | None, int]]
    refused: list[tuple[int, str, str]]
    chosen: list[int] = field(default_factory=list)

    def next(self, missing: int | None, target: Target) -> int:
        """The number of the next usable sample, which is chosen by that; `missing`: how many are needed at most, where
        that is known.

        Raises UnusableError where the source ends before the target is met.
        """
        try:
            number = self.usable.send((missing, target.amount))
        except StopIteration:
            self.refuse_unusable()
            raise UnusableError(self._too_few(target)) from None
        self.chosen.append(number)
        return number

    def refuse_unusable(self) -> None:
        """Raises UnusableError where more of the rows that were read than allowed cannot be used."""
        _refuse_unusable(self.samples, self.walk, self.inputs.calibration.max_dropped, done=True)

    @property
    def packing(self) -> str:
        return packing_of(self.inputs.calibration, self.format)

    @cached_property
    def _end_token(self) -> int | None:
        return self.inputs.end_token() if self.packing == "concat" else None

    def pieces(self, number: int) -> list[Piece]:
        """What a sample brings into rows, after overflow and with its end token."""
        calibration, samples = self.inputs.calibration, self.samples
        return pieces_of(
            number,
            samples.lengths[number],
            samples.last_assistant[number],
            samples.last_token[number] == self._end_token,
            calibration.max_length,
            calibration.overflow,
            self.packing,
        )

    def row_tokens(self, number: int) -> int:
        return sum(map(len, self.pieces(number)))

    def gathered(self, target: Target, asked: Mapping[str, int]) -> Gathered:
        """What was chosen for the target; `asked`: what the recipe asks of the source, by unit."""
        return Gathered(self.entry, self.walk, self.format, self.samples, self.chosen, self.refused, target, asked)

    def _too_few(self, target: Target) -> str:
        reasons = dropped_summary([*self.samples.dropped, *self.refused])
        dropped = "; ".join(f"{entry['count']} {reason} (first: {entry['first']})" for reason, entry in reasons.items())
        reached = len(self.chosen) if target.samples is not None else sum(map(self.row_tokens, self.chosen))
        share = f"{target.unit}, too few for its share" if target.of_mix else f"of {target.amount} {target.unit}"
        return (
            f"source '{self.walk.name}' yields {reached} {share}:"
            f" {self.samples.next_position} rows were read"
            + (f", dropped: {dropped}" if dropped else "")
            + f". Give it more data, a smaller weight, or lower {target.field}."
        )


@contextmanager
def drawing(
    inputs: Inputs, entry: MixEntry, held_out: HeldOut | None = None, skip: int = 0
) -> Generator[Drawing, None, None]:
    """A mix entry to draw from, for the block; arguments and errors are those of `gather`."""
    walk = open_walk(
        entry, inputs.recipe_directory, seed=inputs.calibration.seed, held_out=held_out is not None, skip=skip
    )
    format = format_of(entry, walk)
    encoder = Encoder(
        inputs.calibration, format, inputs.tokenizer, inputs.template, inputs.vocabulary, entry.max_tokens
    )
    contents = None if held_out is None else held_out.contents
    directory = inputs.work / f"{entry.name}-{inputs.part_key(entry, contents, skip)[:12]}"
    refused: list[tuple[int, str, str]] = []
    with (
        opened(directory, inputs.progress) as samples,
        closing(_usable(samples, walk, encoder, held_out, refused)) as usable,
    ):
        next(usable)
        yield Drawing(inputs, entry, walk, format, samples, usable, refused)


def _usable(
    samples: Samples, walk: Walk, encoder: Encoder, held_out: HeldOut | None, refused: list[tuple[int, str, str]]
) -> Generator[int, tuple[int | None, int]]:
    """The numbers of the samples that may be used, first those that earlier runs left, then others, which are appended;
    ends where the source does. What may not be held out is added to `refused`.

    Begins with -1. Sent how many are missing at most (None: unknown), and how many are wanted altogether.
    """
    seen, contents = set(samples.hashes), held_out.contents if held_out else ()
    looked_at = 0
    missing, wanted = yield -1
    with closing(_blocks(walk, encoder, samples.next_position)) as blocks:
        next(blocks)
        while True:
            with samples.reader() as read:
                while looked_at < len(samples):
                    number, looked_at = looked_at, looked_at + 1
                    if held_out and (reason := _refusal(samples, number, read, held_out)):
                        position = samples.positions[number]
                        refused.append((position, reason, walk.rows.place(walk.number(position))))
                        continue
                    missing, wanted = yield number
            _refuse_unusable(samples, walk, encoder.calibration.max_dropped, done=False)
            if walk.length is None and len(refused) > MOST_REFUSED * wanted:
                return
            encoded = blocks.send(missing)
            if not encoded:
                return
            append(samples, encoded, seen, contents)


def _refuse_unusable(samples: Samples, walk: Walk, limit: Decimal, *, done: bool) -> None:
    """Raises UnusableError where more rows than allowed cannot be used; before all are read, where so many were read
    that it would hardly become better."""
    bad = [(reason, place) for _, reason, place in sorted(samples.dropped) if reason.startswith(UNUSABLE)]
    if len(bad) <= limit * samples.next_position or not (done or samples.next_position >= JUDGED_ROWS):
        return
    shown = "\n".join(f"  {place}: {reason.removeprefix(UNUSABLE)}" for reason, place in bad[:3])
    raise UnusableError(
        f"source '{walk.name}': {len(bad)} of {samples.next_position} rows cannot be used, but calibration.max_dropped"
        f" allows {limit:.2%}. The first of them:\n{shown}\nCorrect these rows, choose another `format`, or raise"
        " calibration.max_dropped."
    )


def _refusal(samples: Samples, number: int, read: Reader, held_out: HeldOut) -> str | None:
    ids, _ = read(number, 0, samples.lengths[number])
    return held_out.refusal(ids, samples.last_assistant[number])


def _blocks(walk: Walk, encoder: Encoder, start: int) -> Generator[list[Encoded], int | None, None]:
    """Encoded blocks from `start` on. Sent the number of samples still missing (None: unknown), it works ahead, but
    never reads further than if all were good; a block that turns out not to be needed is forgotten together with its
    error.

    Two blocks are in work at a time, so that one is rendered by the interpreter while the other is in the tokenizer.
    """
    waiting: deque[tuple[int, Future]] = deque()
    with ThreadPoolExecutor(1 if walk.order.startswith("stream") else 2) as threads:
        try:
            missing = yield []
            while True:
                ahead = sum(size for size, _ in waiting)
                while len(waiting) < 2 and (missing is None or ahead < missing):
                    stop = start + (BLOCK if missing is None else min(BLOCK, missing - ahead))
                    block = range(start, stop if walk.length is None else min(stop, walk.length))
                    if not block and waiting:
                        break
                    waiting.append((len(block), threads.submit(encoder.encode, walk, block)))
                    start, ahead = block.stop, ahead + len(block)
                    if not block:
                        break
                missing = yield waiting.popleft()[1].result()
        finally:
            encoder.close()  # before the threads are waited for: a template may be endless


def dropped_summary(dropped: Sequence[tuple[int, str, str]]) -> dict[str, dict[str, Any]]:
    """Reason to count and first place, in order of first appearance on the walk. Rows with the same fault, at whatever
    turn or token, count together."""
    dropped = [(position, _kind(reason), place) for position, reason, place in sorted(dropped)]
    counts = Counter(reason for _, reason, _ in dropped)
    first: dict[str, str] = {}
    for _, reason, place in dropped:
        first.setdefault(reason, place)
    return {reason: {"count": counts[reason], "first": first[reason]} for reason in first}


def _kind(reason: str) -> str:
    """A reason without what differs from row to row."""
    return re.sub(r"\b\d+\b", "N", re.split(r"\. |; | \(", reason)[0]) if reason.startswith(UNUSABLE) else reason
