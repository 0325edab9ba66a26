"""The command line as a user meets it, run in the tests' own process."""

from __future__ import annotations

import gc
import io
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import pytest

from reapkit.cli.main import main


@dataclass(frozen=True)
class Finished:
    """How a command ended, and what it printed."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """The one JSON document that `--json` prints. Raises ValueError where stdout holds anything else."""
        return json.loads(self.stdout)


def command(*arguments: object) -> Finished:
    """`reapkit ARGUMENTS`: through the public entry point, with its handling of errors and its exit codes."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with _settings_kept(), redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return Finished(ended.value.code, stdout.getvalue(), stderr.getvalue())


@contextmanager
def _settings_kept() -> Iterator[None]:
    """The command sets signal handlers and the garbage collector's threshold for its whole process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    thresholds = gc.get_threshold()
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        for number, handler in handlers.items():
            signal.signal(number, handler)
