"""Shows progress: bars on a terminal, plain lines elsewhere. Bars and notes go to stderr, results to stdout.

Every step of work passes here, so here a request to stop is looked at once more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from reapkit.cli.global_flags import given
from reapkit.core import stop_requests
from reapkit.core.progress import Progress, Task

PLAIN_SECONDS = 10.0  # between two plain lines of the same task


def make_progress() -> Progress:
    """Bars where stderr is a terminal, lines elsewhere; with --quiet warnings alone."""
    console = Console(stderr=True, highlight=False)
    if given().quiet:
        return Warnings()
    return Bars(console) if console.is_terminal else Lines()


class Bars(Progress):
    """A transient bar per task, a lasting line per finished stage."""

    def __init__(self, console: Console):
        self.console = console

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        stop_requests.check()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
        )
        with RichProgress(*columns, console=self.console, transient=True) as bars:
            yield _Bar(bars, bars.add_task(title, total=total), title)

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False)


class _Bar:
    def __init__(self, bars: RichProgress, task: TaskID, title: str):
        self.bars, self.task, self.title = bars, task, title

    def advance(self, units: float = 1) -> None:
        stop_requests.check()
        self.bars.advance(self.task, units)

    def note(self, text: str) -> None:
        self.bars.update(self.task, description=f"{self.title}: {text}")


class Lines(Progress):
    """Plain lines for logs: at most one per task and ten seconds."""

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        stop_requests.check()
        yield _Line(title, total, unit)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)


class Warnings(Lines):
    """No steps, no remarks."""

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        stop_requests.check()
        yield _Silent()

    def say(self, text: str) -> None:
        stop_requests.check()


class _Silent:
    def advance(self, units: float = 1) -> None:
        stop_requests.check()

    def note(self, text: str) -> None:
        """Nothing is shown."""


class _Line:
    def __init__(self, title: str, total: float | None, unit: str):
        self.title, self.total, self.unit, self.done, self.noted = title, total, unit, 0.0, ""
        self.last = time.monotonic()

    def advance(self, units: float = 1) -> None:
        stop_requests.check()
        self.done += units
        if time.monotonic() - self.last >= PLAIN_SECONDS:
            self.last = time.monotonic()
            total = f"/{self.total:,.0f}" if self.total else ""
            print(
                f"  {self.title}{self.noted}: {self.done:,.0f}{total} {self.unit}".rstrip(), file=sys.stderr, flush=True
            )

    def note(self, text: str) -> None:
        self.noted = f" ({text})"
