"""Draws the samples of a source in its seeded order, tokenizes them block by block and keeps the usable ones until
there are enough."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from reapkit.calibration.encoder import UNUSABLE, Encoder, format_of, packing_of
from reapkit.calibration.formats import Format
from reapkit.calibration.held_out import HeldOut
from reapkit.calibration.inputs import Inputs
from reapkit.calibration.packing import pieces_of
from reapkit.calibration.sources import Walk, open_walk
from reapkit.calibration.token_journal import Encoded, Reader, Samples, append, opened
from reapkit.core.errors import UnusableError
from reapkit.core.progress import Task
from reapkit.recipe.schema import CalibrationSpec, MixEntry

BLOCK = 256
"""Samples that are tokenized together and journalled together."""
JUDGED_ROWS = 1024
"""Rows after which a source with too many unusable ones is given up."""
MOST_REFUSED = 64
"""Samples of an endless source that may be refused for each that is wanted, before it counts as too small."""


@dataclass(frozen=True)
class Target:
    """When a source has enough: so many samples, or so many tokens in its rows; and which field of the recipe says
    so."""

    samples: int | None = None
    tokens: int | None = None
    field: str = "calibration.samples"

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
    """

    entry: MixEntry
    walk: Walk
    format: Format
    samples: Samples
    chosen: Sequence[int]
    refused: Sequence[tuple[int, str, str]]
    target: Target


def gather(inputs: Inputs, entry: MixEntry, target: Target, held_out: HeldOut | None = None, skip: int = 0) -> Gathered:
    """Enough samples of a mix entry for the target; those that a killed run left are used first.

    `held_out`: what may not occur, which makes the samples a pack's; `skip`: rows of a stream that the calibration
    read. Raises UnusableError naming the source, and the row where one is at fault; where too few are left,
    with what was dropped and why.
    """
    walk = open_walk(
        entry, inputs.recipe_directory, seed=inputs.calibration.seed, held_out=held_out is not None, skip=skip
    )
    format = format_of(entry, walk)
    encoder = Encoder(inputs.calibration, format, inputs.tokenizer, inputs.template, inputs.vocabulary)
    end_token = inputs.end_token() if packing_of(inputs.calibration, format) == "concat" else None
    contents = None if held_out is None else held_out.contents
    directory = inputs.work / f"{entry.name}-{inputs.part_key(entry, contents, skip)[:12]}"
    with (
        opened(directory, inputs.progress) as samples,
        inputs.progress.task(f"tokenize {entry.name}", target.amount, target.unit) as task,
    ):
        chosen, refused = _fill(samples, walk, encoder, target, end_token, held_out, task)
    return Gathered(entry, walk, format, samples, chosen, refused, target)


def _row_tokens(
    samples: Samples, number: int, calibration: CalibrationSpec, packing: str, end_token: int | None
) -> int:
    """Tokens that a sample brings into rows, after overflow and with its end token."""
    pieces = pieces_of(
        number,
        samples.lengths[number],
        samples.last_assistant[number],
        samples.last_token[number] == end_token,
        calibration.max_length,
        calibration.overflow,
        packing,
    )
    return sum(map(len, pieces))


def _fill(
    samples: Samples,
    walk: Walk,
    encoder: Encoder,
    target: Target,
    end_token: int | None,
    held_out: HeldOut | None,
    task: Task,
) -> tuple[list[int], list[tuple[int, str, str]]]:
    """Appends to `samples` until the target is met; returns the numbers of those that are used (earlier runs may have
    left more), and what was refused among them."""
    seen, contents = set(samples.hashes), held_out.contents if held_out else ()
    chosen: list[int] = []
    refused: list[tuple[int, str, str]] = []
    looked_at = reached = 0
    wanted = target.amount
    packing = packing_of(encoder.calibration, encoder.format)
    with closing(_blocks(walk, encoder, samples.next_position)) as blocks:
        next(blocks)
        while True:
            with samples.reader() as read:
                while looked_at < len(samples) and reached < wanted:
                    number, looked_at = looked_at, looked_at + 1
                    if held_out and (reason := _refusal(samples, number, read, held_out)):
                        position = samples.positions[number]
                        refused.append((position, reason, walk.rows.place(walk.number(position))))
                        continue
                    step = (
                        1
                        if target.samples is not None
                        else _row_tokens(samples, number, encoder.calibration, packing, end_token)
                    )
                    chosen.append(number)
                    reached += step
                    task.advance(step)
            _refuse_unusable(samples, walk, encoder.calibration.max_dropped, done=reached >= wanted)
            if reached >= wanted:
                return chosen, refused
            if walk.length is None and len(refused) > MOST_REFUSED * wanted:
                raise UnusableError(_too_few(samples, refused, walk, target, reached))
            encoded = blocks.send(wanted - reached if target.samples is not None else None)
            if not encoded:
                _refuse_unusable(samples, walk, encoder.calibration.max_dropped, done=True)
                raise UnusableError(_too_few(samples, refused, walk, target, reached))
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


def _too_few(
    samples: Samples, refused: Sequence[tuple[int, str, str]], walk: Walk, target: Target, reached: int
) -> str:
    reasons = dropped_summary([*samples.dropped, *refused])
    dropped = "; ".join(f"{entry['count']} {reason} (first: {entry['first']})" for reason, entry in reasons.items())
    return (
        f"source '{walk.name}' yields {reached} of {target.amount} {target.unit}: {samples.next_position} rows were"
        " read"
        + (f", dropped: {dropped}" if dropped else "")
        + f". Give it more data, a smaller weight, or lower {target.field}."
    )


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
