"""Writes a file from start to end, and hashes and syncs it in the background. Torch-free.

Blocks of an aligned ring are filled, then hashed by one thread and written by others at the same time, past the page
cache where the file system can: the bytes are touched three times in all (read, hashed, written), and take no memory
from what is being read.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import queue
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from errno import EINVAL, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import Any, NamedTuple

from reapkit.core.errors import StageFailed

BLOCK_BYTES = 8 << 20
BLOCKS = 8  # of the ring, which all files that are open at once share
WRITERS = (
    3  # writes under way at once; of 1 to 16 MB and 1 to 4 at once, these sizes wrote fastest on a solid-state disk
)
FILES = 2  # files being hashed and synced at once
ALIGNMENT = mmap.PAGESIZE  # of addresses, offsets and lengths that go past the page cache
SENT_BYTES = 32 << 20  # through the page cache, this much is sent to the disk at a time
DIRECT = getattr(os, "O_DIRECT", 0)


class Block(NamedTuple):
    """Bytes of the file: `nbytes` of `memory`, and the write that brings them to their place."""

    memory: memoryview
    nbytes: int
    write: Future[None]


class Machinery:
    """The ring and the threads; a context manager that ends all files and waits for them."""

    def __enter__(self) -> Machinery:
        self.files: list[ShardFile] = []
        self.free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        ring = memoryview(
            mmap.mmap(-1, BLOCKS * BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        )  # page-aligned
        for number in range(BLOCKS):
            self.free.put(ring[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])
        with ExitStack() as stack:
            self.writers = stack.enter_context(ThreadPoolExecutor(WRITERS, "write"))
            self.hashers = stack.enter_context(ThreadPoolExecutor(FILES, "hash"))  # waits for writers, so it ends first
            self._threads = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        for file in self.files:
            file.end()  # again, or because it was interrupted before its own block began
        self._threads.__exit__(*exception)


class ShardFile:
    """The new file at `path`, to be given `nbytes` in order; `sha256` (hex) is there once all are on the disk.

    A context manager; at its end nothing more is given, while hashing and writing go on. `sha256` raises OSError where
    the disk refuses.
    """

    def __init__(self, path: Path, nbytes: int, machinery: Machinery, *, direct: bool):
        self.position = 0
        self._nbytes, self._machinery = nbytes, machinery
        self._block: memoryview | None = None
        self._given: queue.SimpleQueue[Block | int | None] = queue.SimpleQueue()
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
        try:
            self.descriptor, self._direct = (
                os.open(path, flags | (DIRECT if direct else 0), 0o666),
                bool(direct and DIRECT),
            )
        except OSError as error:
            if error.errno != EINVAL or not direct:
                raise
            self.descriptor, self._direct = os.open(path, flags, 0o666), False
        machinery.files.append(self)
        self.sha256: Future[str] = machinery.hashers.submit(self._hash_behind)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._seal()
        self.end()

    def end(self) -> None:
        """Nothing more is given."""
        self._given.put(None)

    def preallocate(self) -> None:
        """Claims the space at once, so that a full disk shows before the work, and the file lies in one piece."""
        try:
            os.posix_fallocate(self.descriptor, 0, self._nbytes)
        except OSError as error:
            if error.errno not in (EOPNOTSUPP, EINVAL, ENOSYS):
                raise

    def write(self, data: bytes) -> None:
        """The next bytes of the file, uint8 [bytes] in the host's memory."""
        left = memoryview(data)
        while left:
            room = self._room(len(left))
            room[:] = left[: len(room)]
            self._filled(len(room))
            left = left[len(room) :]

    def copy(self, source: int, begin: int, length: int, name: Path) -> None:
        """Gives `length` bytes of another file from `begin` on. Raises StageFailed naming it where it ends before."""
        while length:
            got = os.preadv(source, [self._room(length)], begin)
            if not got:
                raise StageFailed(
                    f"{name}: the file ends at byte {begin}, before its last tensor: it changed while it was read."
                    " Download it again, then run again."
                )
            self._filled(got)
            begin, length = begin + got, length - got

    def skip(self, nbytes: int) -> None:
        """The next `nbytes` bytes of the file were written by other means, to `descriptor`; they are hashed as they lie
        there."""
        self._seal()
        self.position += nbytes
        self._given.put(self.position)

    def _room(self, length: int) -> memoryview:
        """Where the next bytes go: at most `length`, up to the next block of the file."""
        if self._block is None:
            self._block, self._begin = self._machinery.free.get(), self.position
        begin = self.position - self._begin
        return self._block[begin : begin + min(length, BLOCK_BYTES - self.position % BLOCK_BYTES)]

    def _filled(self, nbytes: int) -> None:
        self.position += nbytes
        if self.position % BLOCK_BYTES == 0:
            self._seal()

    def _seal(self) -> None:
        if self._block is not None:
            block, nbytes, self._block = self._block, self.position - self._begin, None
            self._given.put(
                Block(block, nbytes, self._machinery.writers.submit(self._write, block, self._begin, nbytes))
            )

    def _write(self, block: memoryview, begin: int, nbytes: int) -> None:
        """Past the page cache whole pages only: what the last one has too much is cut off at the end."""
        direct, done = self._direct, 0
        end = -(-nbytes // ALIGNMENT) * ALIGNMENT if direct else nbytes
        while done < nbytes:
            try:
                done += os.pwrite(self.descriptor, block[done:end], begin + done)
            except OSError as error:
                if error.errno != EINVAL or not direct:
                    raise
                fcntl.fcntl(self.descriptor, fcntl.F_SETFL, fcntl.fcntl(self.descriptor, fcntl.F_GETFL) & ~DIRECT)
                self._direct = direct = False  # a file system with other demands
                end = nbytes

    def _hash_behind(self) -> str:
        sha, position, sent, failure = hashlib.sha256(), 0, 0, None
        try:
            while (given := self._given.get()) is not None:
                try:
                    if isinstance(given, int):
                        self._hash_written(sha, position, given)
                        position = given
                    else:
                        sha.update(given.memory[: given.nbytes])
                        position += given.nbytes
                        given.write.result()
                    if not self._direct and position - sent >= SENT_BYTES:
                        # dirty pages are not dropped by this advice, they start on their way to the disk
                        os.posix_fadvise(self.descriptor, sent, position - sent, os.POSIX_FADV_DONTNEED)
                        sent = position
                except (OSError, StageFailed) as error:  # told at the end: until then the blocks must come back
                    failure = failure or error
                if not isinstance(given, int):
                    self._machinery.free.put(given.memory)
            if failure:
                raise failure
            os.ftruncate(self.descriptor, position)
            os.fsync(self.descriptor)
            return sha.hexdigest()
        finally:
            os.close(self.descriptor)

    def _hash_written(self, sha: hashlib._Hash, begin: int, end: int) -> None:
        buffer = memoryview(bytearray(BLOCK_BYTES))
        while begin < end:
            got = os.preadv(self.descriptor, [buffer[: min(BLOCK_BYTES, end - begin)]], begin)
            if not got:
                raise StageFailed(
                    f"the file that is being written ends at byte {begin} instead of {end}: something else changed it. "
                    "Run again."
                )
            sha.update(buffer[:got])
            begin += got
