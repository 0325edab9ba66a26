"""Takes the flags that every command has, wherever on the line they stand. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass

HELP = (
    "Everywhere: --quiet (errors, warnings and results only), --verbose (and what libraries say), --debug"
    " (tracebacks), --version."
)


@dataclass(frozen=True)
class GlobalFlags:
    """How much is said, and in which form an error is told."""

    debug: bool = False
    quiet: bool = False
    verbose: bool = False
    version: bool = False
    as_json: bool = False


_given: ContextVar[GlobalFlags | None] = ContextVar("given", default=None)


def give(flags: GlobalFlags) -> None:
    """Sets the flags of the command that runs."""
    _given.set(flags)


def given() -> GlobalFlags:
    """The flags of the command that runs; outside of commands none."""
    return _given.get() or GlobalFlags()


def taken(arguments: Sequence[str]) -> tuple[GlobalFlags, list[str]]:
    """The flags, and the arguments without them; whatever follows `--` is left alone."""
    before = list(arguments[: arguments.index("--")]) if "--" in arguments else list(arguments)
    names = {"--debug": "debug", "--quiet": "quiet", "-q": "quiet", "--verbose": "verbose", "-v": "verbose"}
    names |= {"--version": "version"}
    found = {names[argument]: True for argument in before if argument in names}
    rest = [argument for argument in before if argument not in names] + list(arguments[len(before) :])
    return GlobalFlags(**found, as_json="--json" in before), rest
