"""A progress that remembers what was said."""

from __future__ import annotations

from reapkit.core.progress import SILENT, Progress


class Heard(Progress):
    """`said`: every line, `warned`: those that the user must see."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []
        self.task = SILENT.task

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.said.append(text)
        self.warned.append(text)
