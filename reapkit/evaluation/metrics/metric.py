"""Defines a metric as one record: how it is measured, which direction is better, and where people read it.
Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from reapkit.core.formatting import count, decimal, human_bytes, narrow_percent, percent

View = Literal["gates", "final", "narrow", "distances", "summary"]
"""Where a metric is shown, beside evaluation.json, which holds all.

gates: recipes may limit it, and candidates are drawn against its limit. final: the rows of verify.json, and the tables
of base and result on page and card. narrow: tables for a terminal of 80 columns. distances: source by source, with
intervals, on page and card and between runs. summary: the rows of `inspect --json` of an evaluation.
"""

Better = Literal["lower", "higher", "nearer"]
"""In which direction a metric is better; `nearer` where it should stay as the base's."""


@dataclass(frozen=True)
class Metric:
    """`{"value", "interval"}` of one name in an evaluation, and how people read it.

    `title`: in a sentence; `label`: heads a column; `meaning`: of a change, for who does not know the name. `kind`:
    measured on held-out rows, on continuations of prompts, or with a clock. `unit`: a share is in [0, 1] and shown in
    percent; `digits`: decimals shown. `same_as_base`: its value where nothing was lost.
    """

    name: str
    title: str
    label: str
    meaning: str
    better: Better
    kind: Literal["distribution", "generation", "throughput"] = "distribution"
    unit: Literal["", "nats", "share", "tokens/s", "bytes"] = ""
    digits: int = 3
    same_as_base: float | None = None
    views: frozenset[View] = frozenset()

    @property
    def heading(self) -> str:
        """The title with a capital letter."""
        return self.title[0].upper() + self.title[1:]

    @property
    def is_share(self) -> bool:
        return self.unit == "share"

    def show(self, value: float | None) -> str:
        """A value on a page: `94.5 %`, `0.0350`, `1,204 tokens/s`; `–` for none."""
        if value is None or not math.isfinite(value):
            return "–"
        if self.unit == "tokens/s":
            return f"{count(round(value))} tokens/s"
        if self.unit == "bytes":
            return human_bytes(round(value))
        return percent(value, self.digits) if self.is_share else f"{value:.{self.digits}f}"

    def show_plain(self, value: float | None) -> str:
        """A value in a terminal's table: `94.5%`, `0.0350`; `-` for none."""
        return narrow_percent(value, self.digits) if self.is_share else decimal(value, self.digits)
