"""Runs another program to its end, and says how that was. Torch-free."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CAUSES = {
    signal.SIGBUS: "a file that it had mapped was cut short, or a disk is full",
    signal.SIGKILL: "somebody, or the kernel for want of memory",
    signal.SIGXFSZ: "the limit of a file's size (ulimit -f)",
    signal.SIGXCPU: "the limit of processor time (ulimit -t)",
}
"""What is behind the signals that end programs which have no defect."""


@dataclass(frozen=True)
class Ended:
    """A program that has ended, and what it printed."""

    code: int
    stdout: str
    stderr: str

    @property
    def how(self) -> str:
        """How it ended, as the end of a sentence."""
        return how_it_ended(self.code)


def how_it_ended(code: int) -> str:
    """What a program's exit code says, as the end of a sentence; below 0 it is the signal that ended the program."""
    if code >= 0:
        return f"ended with code {code}"
    known = {int(each): each for each in signal.Signals}.get(-code)
    cause = f" ({CAUSES[known]})" if known is not None and known in CAUSES else ""
    return f"was ended by {known.name if known else f'signal {-code}'}{cause}"


def run_program(
    command: Sequence[str | os.PathLike[str]],
    *,
    environment: Mapping[str, str] | None = None,
    directory: str | Path | None = None,
) -> Ended:
    """The program run to its end, its input closed; what it prints is read as UTF-8 whatever the locale. Raises OSError
    where it cannot be started."""
    done = subprocess.run(
        [os.fspath(part) for part in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=None if environment is None else dict(environment),
        cwd=directory,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)
