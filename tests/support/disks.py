"""Small file systems of their own, mounted for a test."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SMALLEST = 4096


@contextmanager
def mounted(directory: Path, *options: str, kind: str = "tmpfs") -> Iterator[Path]:
    """A tmpfs at `directory`, which is made, for the block. Skips the test where this machine lets nobody mount."""
    import pytest  # here: the processes that fill disks do without

    directory.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", kind, *(["-o", ",".join(options)] if options else []), kind, str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def remount(directory: Path, *options: str) -> None:
    """Other options for a mounted file system: `ro`, `rw`, another `size=`."""
    subprocess.run(["mount", "-o", ",".join(("remount", *options)), str(directory)], check=True)


def fill(directory: Path, left: int = 0) -> Path:
    """The file that takes all but `left` bytes of the file system at `directory`."""
    filler = directory / ".filler"
    with filler.open("wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(SMALLEST))
        file.truncate(max(0, file.tell() - -(-left // SMALLEST) * SMALLEST))
    return filler


@contextmanager
def filled(directory: Path, left: int = 0) -> Iterator[None]:
    """For the block, all but `left` bytes of the file system at `directory` are taken."""
    filler = fill(directory, left)
    try:
        yield
    finally:
        filler.unlink()
