"""The interface through which long work reports progress. The command line draws it; the default shows nothing."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    """One bar: `advance` by finished units, `note` what is being worked on."""

    def advance(self, units: float = 1) -> None: ...

    def note(self, text: str) -> None: ...


class Progress:
    """Silent by default; the command line's subclass draws bars on a terminal and prints plain lines elsewhere."""

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Generator[Task]:
        """A bar of `total` units that lives for the block."""
        yield SILENT_TASK

    def say(self, text: str) -> None:
        """A lasting line."""

    def warn(self, text: str) -> None:
        """A lasting line the user must see; the run's report repeats it."""


class _SilentTask:
    def advance(self, units: float = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


SILENT_TASK: Task = _SilentTask()
SILENT = Progress()
