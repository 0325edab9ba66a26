"""What the machine refuses: a full disk, a missing permission, no memory, no network. Found in whatever error tells of
it, and told with place and way out. Torch-free.

Libraries hide a refusal: those in other languages have errors of their own that end in "(os error 28)", others wrap it
in an error about their own work. A damaged file counts as one, too. What is left over is a defect.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reapkit.core.errors import ReapkitError

NETWORK_FAILED, PACKAGE_MISSING, CUT_SHORT, NOWHERE = -1, -2, -3, -4
"""Numbers of ours for what is no number of the system's."""
WAYS_OUT = {
    errno.ENOSPC: "Free some space, or choose a place on another disk",
    errno.EDQUOT: "Free some of your quota, or choose a place on another disk",
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f), or choose a place on another disk",
    errno.EROFS: "Choose a place that can be written to",
    errno.EACCES: "Ask for the permission, or choose another place",
    errno.EPERM: "Ask for the permission, or choose another place",
    errno.ENOENT: "Check the path, and make the folder that it lies in",
    errno.ENOTDIR: "A file stands where a folder is needed: choose another path",
    errno.EISDIR: "A folder stands where a file is needed: choose another path",
    errno.EEXIST: "Something is there already: choose another path",
    errno.ENOTEMPTY: "Something is there already: choose another path",
    errno.ELOOP: "Links lead back to themselves: choose another path",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
    errno.ENFILE: "Raise the machine's limit of open files (fs.file-max)",
    errno.EAGAIN: "Raise the limit of processes and threads (ulimit -u), or end some of them",
    errno.ENOMEM: "Free some memory, or lower runtime.batch_tokens",
    errno.EBADF: "Leave it open",
    errno.EIO: "The disk reported a failure: check it",
    errno.ESTALE: "The network file system lost the file: mount it again",
    NETWORK_FAILED: "Check the network",
    PACKAGE_MISSING: "Install reapkit and the packages it needs again (pip install)",
    NOWHERE: "Set TMPDIR to a folder that can be written to",
    CUT_SHORT: "Free some space on its disk",
}
"""What to do where the system refuses, by number."""
HIDDEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}
"""What no program expects: an error that came up while one of these was dealt with tells of it."""
WORDS = {
    r"\(os error (\d+)\)": None,
    r"\[Errno (\d+)\]": None,
    r"inline_container\.cc:\d+\] \. unexpected pos|PytorchStreamWriter failed|\d+ requested and \d+ written": CUT_SHORT,
    "can't start new thread": errno.EAGAIN,
    "can't allocate memory": errno.ENOMEM,
    "[Oo]ut of memory": errno.ENOMEM,
} | {re.escape(os.strerror(number)): number for number in sorted(HIDDEN)}
"""How libraries put it in words; None: the number stands there."""
NETWORK = ("httpx", "httpcore", "requests", "urllib3")
"""Libraries whose own errors are those of the network."""


@dataclass(frozen=True)
class SystemRefusal:
    """What was refused: the system's number for it, or one of ours, what was said, and the files that it was about."""

    number: int
    said: str
    files: tuple[str, ...] = ()

    def told(self, where: str | None = None, way_out: str | None = None) -> str:
        """Where the system refused something, what it said, and what to do. `where` and `way_out` where they are known
        better."""
        place = where or " -> ".join(self.files)
        way_out = way_out or WAYS_OUT.get(self.number, "Check the disk and the path")
        return f"{f'{place}: ' if place else ''}{self.said}. {way_out}, then run the same command again."


def refusal_in(error: BaseException) -> SystemRefusal | None:
    """The refusal that an error is, was caused by, or tells of in words; None for our own errors and for defects."""
    if isinstance(error, ReapkitError):
        return None
    for number, each in enumerate(_chain(error)):
        found = _refusal(each)
        if found is not None and (number == 0 or found.number in HIDDEN or each is error.__cause__):
            return found
    return None


def hub_cache_refusal(error: BaseException) -> str | None:
    """What the machine refused while something went into the hub's cache, behind whatever error tells of it; None where
    it is about something else, such as the network."""
    refusal = refusal_in(error)
    if refusal is None or refusal.number not in HIDDEN:
        return None
    full = refusal.number in (errno.ENOSPC, errno.EDQUOT)
    return refusal.told(way_out="Free some space, or set HF_HOME to a folder on another disk" if full else None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and what was being dealt with then."""
    each: BaseException | None = error
    seen: set[int] = set()
    while each is not None and id(each) not in seen:
        yield each
        seen.add(id(each))
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _refusal(error: BaseException) -> SystemRefusal | None:
    if isinstance(error, OSError) and error.errno:
        if "temporary directory" in str(error.strerror):  # Python's own words
            return SystemRefusal(NOWHERE, str(error.strerror))
        files = tuple(os.fsdecode(name) for name in (error.filename, error.filename2) if _is_name(name))
        return SystemRefusal(error.errno, error.strerror or os.strerror(error.errno), files)
    if isinstance(error, MemoryError):
        return SystemRefusal(errno.ENOMEM, "the machine's memory does not suffice")
    text = str(error)
    for pattern, number in WORDS.items():
        if match := re.search(pattern, text):
            number = int(match[1]) if number is None else number
            said = "a file could not be written as a whole" if number == CUT_SHORT else os.strerror(number)
            return SystemRefusal(number, said, tuple(_files_in(text)))
    if type(error).__module__.partition(".")[0] in NETWORK:
        return SystemRefusal(NETWORK_FAILED, f"{type(error).__name__}: {text}".rstrip(": ."))
    if isinstance(error, ImportError) and not (error.name or "").startswith("reapkit."):
        return SystemRefusal(PACKAGE_MISSING, f"a package cannot be imported: {text}".rstrip("."))
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        return SystemRefusal(0, text.rstrip(".") or type(error).__name__)
    return None


def _is_name(name: object) -> bool:
    return isinstance(name, str | bytes | os.PathLike)


def _files_in(text: str) -> Iterator[str]:
    """Paths that an error's words hold and that are there, or lie in a folder that is."""
    for word in re.findall(r"/[^\s'\",;:()]+", text):
        if Path(word).parent.is_dir() and len(Path(word).parts) > 2:
            yield word
            return
