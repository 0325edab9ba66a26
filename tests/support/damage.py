"""What disks, people and programs do to files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def flip(file: Path, *, keep_times: bool = False, at: int | None = None) -> None:
    """One bit of the byte in the middle, or at `at`, is another; with `keep_times` nothing but the bytes tells."""
    before = file.stat()
    file.chmod(0o644)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    with file.open("r+b") as stream:  # the same inode, which a run's directory may share
        stream.write(content)
    if keep_times:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_unseen(file: Path) -> None:
    """A flipped bit under the size, time and inode that the file had."""
    flip(file, keep_times=True)


def truncate(file: Path) -> None:
    """The last byte is gone."""
    file.chmod(0o644)
    os.truncate(file, file.stat().st_size - 1)


def delete(file: Path) -> None:
    """The file is gone."""
    file.unlink()


def append(file: Path) -> None:
    """One byte more."""
    file.chmod(0o644)
    with file.open("ab") as stream:
        stream.write(b"\n")


def link(file: Path) -> None:
    """The same bytes, elsewhere, behind a symbolic link."""
    elsewhere = file.rename(file.with_name(f"{file.name}.elsewhere"))
    file.symlink_to(elsewhere)


DAMAGES: dict[str, Callable[[Path], None]] = {
    each.__name__: each for each in (flip, flip_unseen, truncate, delete, append, link)
}
