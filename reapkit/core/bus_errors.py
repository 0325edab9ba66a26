"""Ends the process with a message where the kernel cannot supply a page of a mapped file (SIGBUS): a disk is full under
a file that is written, or a file that is read was cut short or its disk failed. Torch-free.

The signal comes in the middle of a memory access, in whatever thread and library, and cannot be answered by an
exception: all that is left is to say which file it was and to leave. Linux only; elsewhere the process dies of it.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

SA_SIGINFO = 0x4
ADDRESS_AT = 16
"""Where `siginfo_t` holds the address, on 64-bit Linux."""
SIGNALS_BYTES = 128
"""Of a `sigset_t`, in glibc and musl."""
MAPPING = re.compile(r"(?P<begin>[0-9a-f]+)-(?P<end>[0-9a-f]+)( \S+){4} *(?P<file>.*)")
"""A line of /proc/self/maps."""
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_kept: list[object] = []
_work: list[str] = []


class _Action(ctypes.Structure):
    _fields_ = (
        ("handler", _HANDLER),
        ("mask", ctypes.c_byte * SIGNALS_BYTES),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def listen(tell: Callable[[str | None, str | None], int]) -> None:
    """From now on such a fault ends the process with the code that `tell(work, file)` returns: what is `during` then,
    and the file's path, each None where it is not known."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return

    first = threading.Lock()

    def handle(number: int, info: int, context: int) -> None:
        while not first.acquire(blocking=False):  # another thread tells of its own fault, and ends us
            time.sleep(1)
        code = 1
        try:
            address = ctypes.c_uint64.from_address(info + ADDRESS_AT).value
            code = tell(_work[-1] if _work else None, mapped_file(address))
        finally:
            os._exit(code)

    action = _Action(_HANDLER(handle), flags=SA_SIGINFO)
    if ctypes.CDLL(None).sigaction(int(signal.SIGBUS), ctypes.byref(action), None) == 0:
        _kept[:] = [action]


@contextmanager
def during(work: str) -> Generator[None]:
    """Names the work of the block for whoever tells of a fault in it."""
    _work.append(work)
    try:
        yield
    finally:
        _work.pop()


def mapped_file(address: int) -> str | None:
    """The file that the process has mapped at this address, also one that is deleted; None where there is none."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        match = MAPPING.fullmatch(line)
        if match and int(match["begin"], 16) <= address < int(match["end"], 16):
            return match["file"].removesuffix(" (deleted)") or None
    return None
