"""Chat templates, which come with a model and may loop or grow without end, rendered in a process of their own.

The process is a fork, so that it costs nothing to start, and renders row after row. The kernel ends it when a row takes
too long, whether Python or a library's C code is at work then; `close` ends it at once.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from reapkit.calibration.clock import CLOCK, strftime_on

RENDER_SECONDS = 20.0
"""What one rendering may take; those of ordinary templates take a thousandth of a second."""
RENDER_BYTES = 2 << 30
"""Memory that the process may take beyond what it starts with."""
PARENT_SECONDS = 2.0
"""How often an idle process looks whether anybody is still there."""
LONGEST_MESSAGE = 2000


class TemplateRefused(Exception):
    """The template raised an error, whose kind and text this one's says."""


class TemplateStopped(ValueError):
    """The template was ended from outside."""


class TemplateProcess:
    """Renders one row at a time; starts its process when first needed, and again after one was ended."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._closed = False

    def render(self, template: str, date: str | None = None, **arguments: Any) -> Any:
        """What `render_jinja_template` gives for one conversation on a date (YYYY-MM-DD), the same each time.

        Raises TemplateRefused where the template raises an error, TemplateStopped where it takes too long or the
        process was ended.
        """
        process, connection = self._started()
        try:
            connection.send((template, date, arguments))
            done, answer = connection.recv()
        except (EOFError, OSError):
            process.join()
            self._end()
            raise TemplateStopped(_why(process.exitcode)) from None
        if not done:
            raise TemplateRefused(answer)
        return answer

    def close(self) -> None:
        """Ends the process whatever it is at; a rendering in another thread raises TemplateStopped. For good."""
        self._closed = True
        if (process := self._process) is not None:  # another thread may forget it meanwhile
            process.kill()

    def _started(self) -> tuple[BaseProcess, Connection]:
        if self._closed:
            raise TemplateStopped("rendering was stopped")
        if self._process is None or self._connection is None:
            context = multiprocessing.get_context("fork")
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, ours, os.getpid()), daemon=True)
            try:
                process.start()
            except OSError:  # the system gives no more processes
                ours.close()
                raise
            finally:
                theirs.close()
            self._process, self._connection = process, ours
            if self._closed:  # meanwhile, in another thread
                self._process.kill()
        return self._process, self._connection

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


def _why(code: int | None) -> str:
    if code == -signal.SIGALRM:
        return (
            f"the chat template did not end within {RENDER_SECONDS:g} seconds. Correct it, or give another one as"
            " calibration.chat_template"
        )
    return f"the process that renders the chat template was ended (code {code}). Run again"


def _serve(connection: Connection, theirs: Connection, parent: int) -> None:
    """Answers requests until the other side is gone."""
    theirs.close()
    for number, action in (
        (signal.SIGINT, signal.SIG_IGN),  # the terminal sends it to all; who started us decides
        (signal.SIGHUP, signal.SIG_IGN),
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGALRM, signal.SIG_DFL),
    ):
        signal.signal(number, action)
    _limit_memory()
    while True:
        while not connection.poll(PARENT_SECONDS):
            if os.getppid() != parent:
                os._exit(0)
        try:
            template, date, arguments = connection.recv()
        except EOFError:
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS)
        answer = _answer(template, date, arguments)
        connection.send(answer)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(template: str, date: str | None, arguments: dict[str, Any]) -> tuple[bool, Any]:
    from transformers.utils.chat_template_utils import render_jinja_template

    if date is not None:
        arguments = {**arguments, CLOCK: strftime_on(date)}  # shadows transformers' own
    random.seed(0)  # Jinja's filter `random` and its `lipsum` draw from here
    try:
        return True, render_jinja_template(chat_template=template, **arguments)
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"[:LONGEST_MESSAGE]


def _limit_memory() -> None:
    """A string that would fill the machine is a MemoryError of the template's, where the system can say so."""
    try:
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = taken + RENDER_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    except (OSError, ValueError):
        return
