"""What the machine refuses a command: a full disk, a closed pipe or terminal, an encoding, a permission. Torch-free."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

WAYS_OUT = {
    errno.ENOSPC: "Free some space, or choose a place on another disk",
    errno.EDQUOT: "Free some of your quota, or choose a place on another disk",
    errno.EROFS: "Choose a place that can be written to",
    errno.EACCES: "Ask for the permission, or choose another place",
    errno.EPERM: "Ask for the permission, or choose another place",
    errno.ENOENT: "Check the path, and make the folder that it lies in",
    errno.ENOTDIR: "A file stands where a folder is needed: choose another path",
    errno.EISDIR: "A folder stands where a file is needed: choose another path",
    errno.EEXIST: "Something is there already: choose another path",
    errno.ENOTEMPTY: "Something is there already: choose another path",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
}
"""What to do where the system refuses, by errno."""


def refused(error: OSError, where: str | None = None) -> str:
    """Where the system refused something, what it said, and what to do."""
    place = where or " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    way_out = WAYS_OUT.get(error.errno or 0, "Check the disk and the path")
    said = error.strerror or str(error) or type(error).__name__
    return f"{f'{place}: ' if place else ''}{said}. {way_out}, then run the same command again."


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
        errors="backslashreplace" if errors == "strict" else errors,
        line_buffering=at_once,
    )
    if stream:
        stream.flush()
    return text


def output_failure() -> OSError | None:
    """Why what was printed did not arrive; None where it did, or where its reader wanted no more (`| head`)."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Forgiving):
        return None
    sys.stdout.flush()
    return None if raw.failure is None or raw.failure.errno == errno.EPIPE else raw.failure
