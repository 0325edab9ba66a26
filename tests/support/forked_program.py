"""Python modules that reapkit starts as programs, forked off a process that has everything imported: tests that are not
about the program itself are spared its imports.

Only a process that has never computed with several threads may be forked: a child that waits for threads of its parent
waits for ever.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from reapkit.core.programs import Ended, run_program

if TYPE_CHECKING:
    from tests.support.forked import Forks

MODULES = ("reapkit.evaluation.proofs",)


def is_forked(command: Sequence[str | os.PathLike[str]]) -> bool:
    """Whether the command is `python -m` one of MODULES."""
    parts = [os.fspath(part) for part in command]
    return parts[:2] == [sys.executable, "-m"] and parts[2] in MODULES


def run_in(forks: Forks, command: Sequence[str | os.PathLike[str]], environment: Mapping[str, str] | None) -> Ended:
    """A command for which `is_forked` holds, as a fork of the process behind `forks`."""
    module, *arguments = [os.fspath(part) for part in command[2:]]
    before = (
        "import runpy, sys, traceback\n"
        f"sys.argv = {[module, *arguments]!r}\n"
        f"try:\n    runpy.run_module({module!r}, run_name='__main__')\n"
        "except Exception:\n    traceback.print_exc()\n    raise SystemExit(1)\n"
        "raise SystemExit(0)"
    )
    ended = forks.run(directory=Path.cwd(), before=before, **dict(environment or {}))
    return Ended(ended.code, ended.stdout, ended.stderr)


def run_or_fork(
    command: Sequence[str | os.PathLike[str]],
    *,
    environment: Mapping[str, str] | None = None,
    directory: str | Path | None = None,
) -> Ended:
    """As `run_program`; a command for which `is_forked` holds runs in a fork of this process."""
    if not is_forked(command):
        return run_program(command, environment=environment, directory=directory)
    with TemporaryDirectory(prefix="forked-") as scratch:
        outputs = [Path(scratch) / name for name in ("stdout", "stderr")]
        pid = os.fork()
        if not pid:
            _run([os.fspath(part) for part in command[2:]], outputs, environment, directory)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return Ended(code, *(file.read_text(encoding="utf-8", errors="replace") for file in outputs))


def _run(
    arguments: Sequence[str],
    outputs: Sequence[Path],
    environment: Mapping[str, str] | None,
    directory: str | Path | None,
) -> None:
    code = 1
    try:
        for descriptor, file in enumerate(outputs, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        if environment is not None:
            os.environ.update(environment)
        if directory is not None:
            os.chdir(directory)
        sys.argv = list(arguments)
        try:
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=False)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
