"""Draws the samples of a mix whose weights share out something else than what it is measured in: scored tokens of a
number of samples, for instance."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from math import lcm

import numpy as np

from reapkit.calibration.draw_samples import Drawing, Gathered, Target, drawing
from reapkit.calibration.inputs import Inputs
from reapkit.calibration.packing import largest_remainder
from reapkit.calibration.token_journal import Reader
from reapkit.core.errors import Problem, RecipeError


def gather_balanced(inputs: Inputs) -> list[Gathered]:
    """Samples of the mix until it has what the calibration asks for, shared out by `calibration.balance`.

    The next sample is always one of the source that has least for its weight. So a source has at most what its weight
    gives it beside any other source, and one sample more. The order depends on the samples alone: it is the same after
    a kill. Raises UnusableError as `gather`, RecipeError naming
    the sources of which nothing would be read.
    """
    calibration = inputs.calibration
    unit, asked = calibration.asked
    weights = [entry.weight for entry in calibration.mix]
    costs = _costs(weights)
    with ExitStack() as stack:
        sources = [stack.enter_context(drawing(inputs, entry)) for entry in calibration.mix]
        task = stack.enter_context(inputs.progress.task("tokenize the mix", asked, unit))
        counters = [_Counter(source, calibration.shared_out) for source in sources]
        for counter in counters:
            stack.callback(counter.close)
        field = f"calibration.{unit}"
        wanted = Target(**{unit: asked}, field=field, of_mix=True)
        reached = last = 0
        while reached < asked:
            last = min(range(len(sources)), key=lambda i: (counters[i].amount * costs[i], len(sources[i].chosen), i))
            number = sources[last].next(asked - reached if unit == "samples" else None, wanted)
            tokens = counters[last].add(number)
            step = 1 if unit == "samples" else tokens
            reached += step
            task.advance(step)
        for source in sources:
            source.refuse_unusable()
        if without := [source.entry.name for source in sources if not source.chosen]:
            raise RecipeError(
                [Problem(field, f"{asked}, but {', '.join(without)} would get none of them. Choose more.")]
            )
        too_many = reached - asked  # tokens of the last sample
        targets = [
            Target(samples=len(source.chosen), field=field)
            if unit == "samples"
            else Target(tokens=counter.tokens - (too_many if place == last else 0), field=field)
            for place, (source, counter) in enumerate(zip(sources, counters, strict=True))
        ]
        shares = largest_remainder(sum(counter.amount for counter in counters), weights)
        return [
            source.gathered(target, {calibration.shared_out: share})
            for source, target, share in zip(sources, targets, shares, strict=True)
        ]


def _costs(weights: Sequence) -> list[int]:
    """Whole numbers in inverse proportion to the weights: sources whose amounts times these are equal are balanced."""
    exact = [Fraction(weight) for weight in weights]
    common = lcm(*(weight.numerator for weight in exact))
    inverse = [Fraction(common) / weight for weight in exact]
    return [int(value * lcm(*(each.denominator for each in inverse))) for value in inverse]


class _Counter:
    """Counts what a source's chosen samples bring into its rows: samples, tokens, scored tokens."""

    def __init__(self, source: Drawing, balance: str):
        self.source, self.balance = source, balance
        self.amount = self.tokens = 0
        self._files, self._read, self._readable = ExitStack(), None, 0

    def close(self) -> None:
        self._files.close()

    def _reader(self, number: int) -> Reader:
        """Reads the samples up to `number` and perhaps further."""
        if self._read is None or number >= self._readable:
            self._files.close()
            self._read = self._files.enter_context(self.source.samples.reader())
            self._readable = len(self.source.samples)
        return self._read

    def add(self, number: int) -> int:
        """Counts a sample; returns its tokens in rows."""
        tokens = self.source.row_tokens(number)
        if self.balance == "samples":
            self.amount += 1
        elif self.balance == "tokens" or self.source.inputs.calibration.score == "all":
            self.amount += tokens
        else:
            self.amount += self._scored(number)
        self.tokens += tokens
        return tokens

    def _scored(self, number: int) -> int:
        """Positions that predict an assistant token in the rows that the sample will be in. Nothing predicts the first
        token of a piece, nor that of a row which `concat` begins within one."""
        length, scored, place = self.source.inputs.calibration.max_length, 0, self.tokens
        read = self._reader(number)
        for piece in self.source.pieces(number):
            marks = read(number, piece.start, piece.stop)[1]
            predicted = np.ones(len(marks), bool)
            predicted[:1] = False
            if self.source.packing == "concat":
                predicted[-place % length :: length] = False
            scored += int(marks[predicted].sum())
            place += len(piece)
        return scored
