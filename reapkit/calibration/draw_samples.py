"""Draws the samples of a source in its seeded order, tokenizes them block by block and keeps the usable ones until
there are enough."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from reapkit.calibration.encoder import Encoder, format_of, packing_of
from reapkit.calibration.formats import Format
from reapkit.calibration.inputs import Inputs
from reapkit.calibration.packing import pieces_of
from reapkit.calibration.sources import Walk, open_walk
from reapkit.calibration.token_journal import Encoded, Samples, append, opened
from reapkit.core.errors import UnusableError
from reapkit.core.progress import Task
from reapkit.recipe.schema import CalibrationSpec, MixEntry

BLOCK = 256
"""Samples that are tokenized together and journalled together."""


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
    """A source's samples: the first `used` of `samples`."""

    entry: MixEntry
    walk: Walk
    format: Format
    samples: Samples
    used: int
    target: Target
    shows_calls: bool


def gather(
    inputs: Inputs, entry: MixEntry, target: Target, held_out: Collection[str] | None = None, skip: int = 0
) -> Gathered:
    """Enough samples of a mix entry for the target; those that a killed run left are used first.

    `held_out`: contents that may not occur, which makes the samples a pack's; `skip`: rows of a stream that the
    calibration read. Raises UnusableError naming the source, and the row where one is at fault; where too few are left,
    with what was dropped and why.
    """
    walk = open_walk(
        entry, inputs.recipe_directory, seed=inputs.calibration.seed, held_out=held_out is not None, skip=skip
    )
    format = format_of(entry, walk)
    encoder = Encoder(inputs.calibration, format, inputs.tokenizer, inputs.template, inputs.vocabulary)
    end_token = inputs.end_token() if packing_of(inputs.calibration, format) == "concat" else None
    directory = inputs.work / f"{entry.name}-{inputs.part_key(entry, held_out, skip)[:12]}"
    with (
        opened(directory) as samples,
        inputs.progress.task(f"tokenize {entry.name}", target.amount, target.unit) as task,
    ):
        used = _fill(samples, walk, encoder, target, end_token, held_out or (), task)
    return Gathered(entry, walk, format, samples, used, target, encoder.shows_calls)


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
    held_out: Collection[str],
    task: Task,
) -> int:
    """Appends to `samples` until the target is met; returns how many of them are used (earlier runs may have left
    more)."""
    seen = set(samples.hashes)
    used = reached = 0
    wanted = target.amount
    packing = packing_of(encoder.calibration, encoder.format)
    with closing(_blocks(walk, encoder, samples.next_position)) as blocks:
        next(blocks)
        while True:
            while used < len(samples) and reached < wanted:
                step = (
                    1
                    if target.samples is not None
                    else _row_tokens(samples, used, encoder.calibration, packing, end_token)
                )
                used, reached = used + 1, reached + step
                task.advance(step)
            if reached >= wanted:
                return used
            encoded = blocks.send(wanted - reached if target.samples is not None else None)
            if not encoded:
                raise UnusableError(_too_few(samples, walk, target, reached))
            append(samples, encoded, seen, held_out)


def _blocks(walk: Walk, encoder: Encoder, start: int) -> Generator[list[Encoded], int | None, None]:
    """Encoded blocks from `start` on. Sent the number of samples still missing (None: unknown), it works ahead, but
    never reads further than if all were good; a block that turns out not to be needed is forgotten together with its
    error.

    Two blocks are in work at a time, so that one is rendered by the interpreter while the other is in the tokenizer.
    """
    waiting: deque[tuple[int, Future]] = deque()
    with ThreadPoolExecutor(1 if walk.order.startswith("stream") else 2) as threads:
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


def _too_few(samples: Samples, walk: Walk, target: Target, reached: int) -> str:
    reasons = dropped_summary(samples.dropped)
    dropped = "; ".join(f"{entry['count']} {reason} (first: {entry['first']})" for reason, entry in reasons.items())
    return (
        f"source '{walk.name}' yields {reached} of {target.amount} {target.unit}: {samples.next_position} rows were"
        " read"
        + (f", dropped: {dropped}" if dropped else "")
        + f". Give it more data, a smaller weight, or lower {target.field}."
    )


def dropped_summary(dropped: Sequence[tuple[int, str, str]]) -> dict[str, dict[str, Any]]:
    """Reason to count and first place, in order of first appearance."""
    counts = Counter(reason for _, reason, _ in dropped)
    first: dict[str, str] = {}
    for _, reason, place in dropped:
        first.setdefault(reason, place)
    return {reason: {"count": counts[reason], "first": first[reason]} for reason in first}
