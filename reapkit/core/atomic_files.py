"""Writes files atomically: to a temporary file in the same directory, synced, then renamed. Torch-free."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from reapkit.core.refusals import refusal_in

UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
"""Matches the temporary files that a killed writer left behind."""
CANNOT_RESERVE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Error numbers of systems that cannot reserve space."""
SYNC_REFUSED = (errno.EINVAL, errno.ENOTSUP)
"""Error numbers of file systems that cannot sync a directory; these keep renames in order by themselves."""


@contextmanager
def replacing(target: Path) -> Generator[Path, None, None]:
    """A path beside `target` to write to: at the block's end it takes the place of `target`, unless the block failed.

    The file is synced before it is renamed, and its directory afterwards: once the block is left, the file outlives a
    power cut. It has the mode that the umask gives new files, whoever wrote it. Directories above it are made. Where
    `target` is a link, what it points at is replaced, and the link stays. Raises OSError naming `target` where the disk
    refuses (full, read-only), also where safetensors hides that in an error of its own.
    """
    if target.is_symlink():
        target = _end_of_links(target)
    if target.is_char_device() or target.is_fifo():
        yield from _passed_on(target)
        return
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid4().hex[:8]}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        sync(partial)
        partial.replace(target)
    except BaseException as error:
        with suppress(OSError):  # of a disk that is read-only now
            partial.unlink()
        if isinstance(error, SafetensorError) or (isinstance(error, OSError) and _is_about(error, partial)):
            _raise_about(target, error)
        raise
    sync(target.parent)


@contextmanager
def making(target: Path) -> Generator[Path, None, None]:
    """A directory beside `target` to fill: at the block's end it gets the name `target`, which must not exist, unless
    the block failed; then nothing is left of it. Raises OSError where the disk refuses."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid4().hex[:8]}.partial")
    try:
        partial.mkdir()
        yield partial
        partial.rename(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and _named(error).startswith(str(partial)):
            _raise_about(target, error)
        raise
    sync(target.parent)


@contextmanager
def naming(path: Path) -> Generator[None]:
    """Gives an error of the block that names no file, as those of writes and of safetensors are, the name `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not (isinstance(error, OSError) and _named(error)):
            _raise_about(path, error)
        raise


def _is_about(error: OSError, partial: Path) -> bool:
    """Whether the error names no file, or the one that nobody knows."""
    return _named(error) in ("", str(partial)) or error.filename2 == str(partial) or error.filename2 == partial


def _named(error: OSError) -> str:
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""


def _raise_about(path: Path, error: Exception) -> None:
    """The same error as one about `path`, where it has a number."""
    refusal = refusal_in(error)
    if refusal is not None and refusal.number:
        raise OSError(refusal.number, refusal.said, str(path)) from error


def _end_of_links(link: Path) -> Path:
    end = Path(os.path.realpath(link))
    if end.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(link))
    return end


def _passed_on(target: Path) -> Generator[Path, None, None]:
    """What takes bytes and is no file (/dev/null, a pipe) keeps its place: it is written to, never replaced."""
    with tempfile.TemporaryDirectory(prefix="reapkit-") as scratch:
        partial = Path(scratch) / target.name
        partial.touch()
        yield partial
        try:
            target.write_bytes(partial.read_bytes())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(target)) from error


def write_bytes(target: Path, content: bytes) -> None:
    """Raises OSError where the disk refuses; then what was there before is still there."""
    with replacing(target) as partial:
        partial.write_bytes(content)


def write_text(target: Path, text: str) -> None:
    """UTF-8, line ends as they are in `text`; bytes of file names that are no UTF-8 as JSON says them, \\udcff."""
    write_bytes(target, text.encode(errors="backslashreplace"))


def write_json(target: Path, value: Any) -> None:
    """`value` as JSON, one level per space of indentation. Raises TypeError for what JSON cannot say."""
    write_text(target, json.dumps(value, indent=1) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """A file byte for byte; links are followed."""
    with replacing(target) as partial:
        shutil.copyfile(source, partial)


def write_at(descriptor: int, content: bytes | memoryview, place: int) -> None:
    """All of `content` at byte `place` of an open file. Raises OSError where the disk refuses the whole or a part."""
    rest = memoryview(content).cast("B")
    while rest:
        written = os.pwrite(descriptor, rest, place)
        rest, place = rest[written:], place + written


def reserve(path: Path, nbytes: int) -> None:
    """Makes room for the file's first `nbytes` on its disk, so that writing to a map of it cannot fail for want of
    space; what it holds stays. Raises OSError naming the file where there is no room.
    """
    with naming(path), path.open("ab") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            if error.errno not in CANNOT_RESERVE:
                raise
            os.truncate(path, max(nbytes, path.stat().st_size))


def remove_unfinished(directory: Path) -> None:
    """Removes what killed writers left below `directory`, where nobody writes now."""
    for file in directory.rglob(".*.partial"):
        if UNFINISHED.fullmatch(file.name):
            file.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Returns once a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in SYNC_REFUSED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
