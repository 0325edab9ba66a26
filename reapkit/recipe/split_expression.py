"""Reads the expressions that name a dataset's split or parts of it: `train`, `train[:1000]`, `train[10%:20%]`,
`train+test`. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BOUND = r"\s*(?:(-?\d+)\s*(%)?)?\s*"
_PART = re.compile(rf"\s*(\w+(?:[.-]\w+)*)\s*(?:\[{_BOUND}:{_BOUND}\])?\s*(?:\((closest|pct1_dropremainder)\))?\s*")


@dataclass(frozen=True)
class SplitPart:
    """A split's rows from `start` to before `stop`, or (`percent`) per cents of them; negative ones from the end."""

    name: str
    start: int | None = None
    stop: int | None = None
    percent: bool = False
    drop_remainder: bool = False

    @property
    def whole(self) -> bool:
        return self.start is None and self.stop is None

    @property
    def needs_total(self) -> bool:
        """Whether only the number of rows tells where the part lies."""
        return self.percent or (self.start or 0) < 0 or (self.stop or 0) < 0

    def rows(self, total: int) -> range:
        """The numbers of the part's rows, of `total` in the split; as `datasets` counts them: per cents go to the
        nearest row, or (`pct1_dropremainder`) are whole hundredths."""
        start, stop = self._row(self.start, total, 0), self._row(self.stop, total, total)
        return range(start, max(start, stop))

    def _row(self, bound: int | None, total: int, default: int) -> int:
        if bound is None:
            return default
        if self.percent:
            bound = bound * (total // 100) if self.drop_remainder else round(bound * total / 100)
        return min(max(bound + total if bound < 0 else bound, 0), total)


def split_parts(text: str) -> tuple[SplitPart, ...]:
    """The parts of a split expression, in order. Raises ValueError for what is none."""
    return tuple(_part(part, text) for part in text.split("+"))


def _part(text: str, whole: str) -> SplitPart:
    found = _PART.fullmatch(text)
    if found is None:
        raise ValueError(
            f"which is no split{'' if text == whole else f' at {text!r}'}. Write a split's name, a part of it such as"
            " train[:1000] or train[10%:20%], or a sum such as train+test"
        )
    name, start, start_unit, stop, stop_unit, rounding = found.groups()
    percent = bool(start_unit or stop_unit)  # one sign stands for both
    first, last = (None if bound is None else int(bound) for bound in (start, stop))
    if percent and max(abs(first or 0), abs(last or 0)) > 100:
        raise ValueError("which asks for more than 100 %")
    return SplitPart(name, first, last, percent, rounding == "pct1_dropremainder")
