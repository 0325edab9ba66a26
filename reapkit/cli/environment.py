"""The standard streams of a command, which end no work: closed, full, broken, or of an encoding that lacks characters.
Torch-free."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

from reapkit.core.refusals import SystemRefusal, refusal_in

ESCAPED = "reapkit.escaped"
"""How characters are written that a stream's encoding lacks: bytes of file names that are none as they are, others as
\\xe4."""


def _escaped(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return b"".join(map(_bytes_of, lacking)), error.end


def _bytes_of(character: str) -> bytes:
    byte = ord(character) - 0xDC00  # as the surrogateescape of file names has it
    return bytes([byte]) if 0x80 <= byte <= 0xFF else character.encode("ascii", "backslashreplace")


codecs.register_error(ESCAPED, _escaped)


class _Forgiving(io.FileIO):
    """A standard stream whose failures are remembered and end no work: what a command does matters more than who
    reads."""

    failure: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            return memoryview(data).nbytes


def spell_every_name() -> None:
    """Starts the process anew, in Python's UTF-8 mode, where the locale cannot spell every file's name: the names in
    recipes are UTF-8 in any locale. Standard streams keep the locale's encoding."""
    if sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8":
        return
    encoding = sys.stdout.encoding if sys.stdout else "ascii"
    environment = {"PYTHONIOENCODING": encoding, **os.environ, "PYTHONUTF8": "1"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def steady_streams() -> None:
    """Standard output and error become streams that never raise: not where they are closed, full or broken pipes, and
    not for characters that their encoding lacks."""
    while (
        descriptor := os.open(os.devnull, os.O_RDWR)
    ) <= 2:  # closed by whoever started us: no file may get its place
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout, sys.stderr = _steady(sys.stdout, 1), _steady(sys.stderr, 2)


def _steady(stream: TextIO | None, descriptor: int) -> TextIO:
    encoding, errors = (stream.encoding, stream.errors) if stream else ("utf-8", "strict")
    raw = _Forgiving(descriptor, "w", closefd=False)
    at_once = descriptor == 2 or raw.isatty()
    text = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=encoding,
        errors=ESCAPED if errors in ("strict", "surrogateescape") else errors,
        line_buffering=at_once,
    )
    if stream:
        stream.flush()
    return text


def output_failure() -> SystemRefusal | None:
    """Why what was printed did not arrive; None where it did, or where its reader wanted no more (`| head`)."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Forgiving):
        return None
    sys.stdout.flush()
    return None if raw.failure is None or raw.failure.errno == errno.EPIPE else refusal_in(raw.failure)
