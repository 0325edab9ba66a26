"""The files below a directory, and the sha256 of many of them at once. Torch-free."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reapkit.core.progress import SILENT, Progress

THREADS = 4
"""sha256 takes 1 to 2 GB/s of one core; a fast disk gives more."""
PIECE_BYTES = 1 << 20
WORTH_THREADS = 8 << 20
"""Bytes from which threads, and a bar, are worth their start."""
LEFT_BY_NFS = ".nfs"
"""What the name begins with that a network file system gives a file which was removed while it was open."""


def files_below(directory: Path) -> dict[str, os.stat_result]:
    """Everything below `directory` that is no directory, by its path in it ("deep/name"), sorted, with what the system
    says of it; links are not followed.

    Raises OSError where a directory cannot be listed.
    """
    return dict(sorted(_walked(directory, "")))


def is_file(facts: os.stat_result) -> bool:
    """Whether it is a regular file, and no link, pipe or device."""
    return stat.S_ISREG(facts.st_mode)


def _walked(directory: Path, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _walked(Path(entry.path), f"{name}/")
            elif not entry.name.startswith(LEFT_BY_NFS):
                yield name, entry.stat(follow_symlinks=False)


def sha256_of(files: Iterable[Path], progress: Progress = SILENT, title: str = "sha256") -> Iterator[tuple[Path, str]]:
    """Each file with its sha256 (hex), in the order given, read once by several threads.

    Raises OSError that names a file which cannot be read; those before it have been given.
    """
    wanted = [(file, file.stat().st_size) for file in files]
    if (total := sum(nbytes for _, nbytes in wanted)) < WORTH_THREADS:
        yield from ((file, _digest(file)) for file, _ in wanted)
        return
    stop = threading.Event()
    with (
        progress.task(title, total, "B") as task,
        ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), thread_name_prefix="sha256") as pool,
    ):
        pending = [(file, nbytes, pool.submit(_digest, file, stop)) for file, nbytes in wanted]
        try:
            for file, nbytes, future in pending:
                task.note(file.name)
                yield file, future.result()
                task.advance(nbytes)
        finally:
            stop.set()


def _digest(file: Path, stop: threading.Event | None = None) -> str:
    """As `digest_file`; ends at once, with a hash that nobody may use, when it is told to stop."""
    sha, buffer = hashlib.sha256(), bytearray(PIECE_BYTES)
    try:
        with file.open("rb", buffering=0) as stream:
            while not (stop and stop.is_set()) and (count := stream.readinto(buffer)):
                sha.update(memoryview(buffer)[:count])
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    return sha.hexdigest()
