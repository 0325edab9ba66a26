"""Defines every error that reapkit raises on purpose, each with the exit code of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self


class ReapkitError(Exception):
    """Something a user can act on; `exit_code` is what the command ends with. Anything else that escapes is a
    defect."""

    exit_code = 1
    facts: Mapping[str, Any] = MappingProxyType({})  # what --json says beside the text

    def with_facts(self, **facts: Any) -> Self:
        """The same error, with facts for machines."""
        self.facts = {**self.facts, **facts}
        return self


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: where, at which path, what was found, what is allowed and what to do."""

    path: str
    message: str
    file: str | None = None
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        if self.file and self.file.startswith("--set "):  # what was written on the command line is its own place
            return (
                f"{self.file}: {self.message}"
                if self.path in self.file
                else f"{self.file}: {self.path}: {self.message}"
            )
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        return " ".join(part for part in (place, f"{self.path}: {self.message}" if self.path else self.message) if part)


class RecipeError(ReapkitError):
    """The recipe or the command line is wrong; carries every problem found, not only the first."""

    exit_code = 2
    partial: Any = None  # the recipe without its broken parts, for checks that can still be made
    stand_ins: frozenset[str] = frozenset()  # the sections of `partial` that are not the user's

    def __init__(self, problems: Sequence[Problem] | str):
        self.problems = [Problem("", problems)] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class UnusableError(ReapkitError):
    """The checkpoint, a dataset or the environment cannot be used."""

    exit_code = 3


class StageFailed(ReapkitError):
    """A stage failed after its inputs had been accepted; running again resumes."""

    exit_code = 4


class RejectedByGates(ReapkitError):
    """The candidate did not pass the gates; nothing was published."""

    exit_code = 5
