"""Remembers a request to stop (Ctrl-C, SIGTERM from Slurm, SIGHUP of a closed terminal), so that the run stops even
if a library swallows the exception."""

from __future__ import annotations

import signal
import threading
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_asked = threading.Event()


def listen() -> None:
    """From now on the signals raise KeyboardInterrupt where the main thread is, and at each `check` until `ignore`."""
    _asked.clear()
    for number in SIGNALS:
        if (
            signal.getsignal(number) != signal.SIG_IGN
        ):  # nohup, or a shell's background job: whoever started us wants it ignored
            signal.signal(number, _ask)


def check() -> None:
    """Raises KeyboardInterrupt in the main thread if a signal has come; for places that long work passes often."""
    if _asked.is_set() and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


def ignore() -> None:
    """We are leaving already: further signals change nothing."""
    _asked.clear()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _ask(signum: int, frame: Any) -> None:
    _asked.set()
    raise KeyboardInterrupt
