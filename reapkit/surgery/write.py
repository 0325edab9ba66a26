"""Bytes from shards to shards at the disk's speed. Torch-free.

The kernel copies the payload (`copy_file_range`: no detour through this process, shared blocks where the file system can) while
the source is read ahead, a second thread hashes what was written and starts its way to the disk, and the next shard begins
before the last one is synced.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from reapkit.errors import StageFailed
from reapkit.progress import Task
from reapkit.surgery.cut import Run, Shard

PIECE_BYTES = 32 << 20  # between two pieces a signal is heard and the hash moves on
AHEAD_BYTES = 64 << 20
ADVICE_BYTES = 512 << 10  # the kernel reads ahead no more than this per advice on common disks
HASH_BYTES = 4 << 20
UNFINISHED = 2  # shards that are still being hashed and synced while the next is copied
NO_KERNEL_COPY = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


def write_shards(source: Path, out: Path, shards: Sequence[Shard], task: Task, finished: Callable[[Shard, str], None]) -> None:
    """Writes the shards, each whole or not at all (beside, synced, renamed), and reports each with its sha256 (hex) once it is
    safe.

    Raises StageFailed where the disk is full or read-only, or the source changed or vanished meanwhile; finished shards stay.
    """
    unfinished: deque[tuple[Shard, Future[str]]] = deque()

    def settle() -> None:
        shard, future = unfinished[0]
        sha = future.result()
        _partial(out, shard).replace(out / shard.name)
        _sync_directory(out)
        unfinished.popleft()
        finished(shard, sha)

    with explained(source, out), ThreadPoolExecutor(UNFINISHED, "hash") as pool:
        try:
            for shard in shards:
                task.note(shard.name)
                while len(unfinished) >= UNFINISHED:
                    settle()
                marks: queue.SimpleQueue[int | None] = queue.SimpleQueue()
                with _partial(out, shard).open("w+b", buffering=0) as stream:
                    unfinished.append((shard, pool.submit(_hash_behind, os.dup(stream.fileno()), marks)))
                    try:
                        _copy(source, stream.fileno(), shard, marks, task)
                    finally:
                        marks.put(None)
            while unfinished:
                settle()
        except BaseException:
            for shard, future in unfinished:
                future.exception()
                _partial(out, shard).unlink(missing_ok=True)
            raise


def write_file(out: Path, name: str, content: bytes) -> None:
    """A small file, whole or not at all."""
    target, partial = out / name, out / f".{name}.partial"
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(target)


def copy_file(source: Path, target: Path) -> None:
    """A file byte for byte, whole or not at all; links are followed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.copyfile(source, partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def require_space(out: Path, nbytes: int) -> None:
    """Raises StageFailed where the disk that holds `out` has less than `nbytes` free."""
    free = shutil.disk_usage(out).free
    if free < nbytes:
        raise StageFailed(f"{out}: {nbytes / 1e9:.1f} GB are to be written, but {free / 1e9:.1f} GB are free there. Free "
                          f"{(nbytes - free) / 1e9:.1f} GB or choose another output.directory, then run again.")


@contextmanager
def explained(source: Path, out: Path) -> Iterator[None]:
    """Turns the operating system's refusals into StageFailed with what to do; finished shards stay and are not written
    again."""
    try:
        yield
    except OSError as error:
        place = error.filename or out
        advice = {errno.ENOSPC: f"the disk of {out} is full. Free space there, then run again: finished shards are kept.",
                  errno.EDQUOT: f"the quota on the disk of {out} is used up. Free space there, then run again.",
                  errno.EROFS: f"{out} is read-only. Choose another output.directory.",
                  errno.EACCES: f"{place}: permission denied. Make it accessible, then run again.",
                  errno.ENOENT: f"{place} vanished while {source} was read. Restore it, then run again.",
                  errno.EIO: f"{place}: the disk reported a failure. Check it, then run again."}
        raise StageFailed(advice.get(error.errno, f"{place}: {error.strerror or error}. Finished shards are kept; run "
                                                  "again.")) from error


def _partial(out: Path, shard: Shard) -> Path:
    return out / f".{shard.name}.partial"


def _copy(source: Path, target: int, shard: Shard, marks: queue.SimpleQueue[int | None], task: Task) -> None:
    """Header and payload to `target`; `marks` receives how far the file is written."""
    if shard.whole:
        runs: Iterable[Run] = [(shard.whole, 0, shard.nbytes)]
        position = 0
    else:
        _preallocate(target, shard.nbytes)
        position = _write_all(target, memoryview(shard.header), 0)
        runs = shard.runs()
        task.advance(position)
    with ExitStack() as stack:
        opened: dict[str, int] = {}

        def descriptor(name: str) -> int:
            if name not in opened:
                opened[name] = stack.enter_context((source / name).open("rb", buffering=0)).fileno()
            return opened[name]

        for name, begin, length in _read_ahead(_pieces(runs), descriptor):
            _copy_range(descriptor(name), target, begin, position, length, source / name)
            position += length
            marks.put(position)
            task.advance(length)
    if position != shard.nbytes:
        raise StageFailed(f"{source}: gave {position} bytes for {shard.name} where {shard.nbytes} were planned. Please report "
                          "this.")


def _pieces(runs: Iterable[Run]) -> Iterator[Run]:
    for shard, begin, length in runs:
        for offset in range(0, length, PIECE_BYTES):
            yield shard, begin + offset, min(PIECE_BYTES, length - offset)


def _read_ahead(pieces: Iterable[Run], descriptor: Callable[[str], int]) -> Iterator[Run]:
    """The pieces, the kernel told of each some time before it is asked for."""
    waiting: deque[Run] = deque()
    ahead = 0
    for piece in pieces:
        name, begin, length = piece
        for offset in range(begin, begin + length, ADVICE_BYTES):
            os.posix_fadvise(descriptor(name), offset, min(ADVICE_BYTES, begin + length - offset), os.POSIX_FADV_WILLNEED)
        waiting.append(piece)
        ahead += length
        while ahead > AHEAD_BYTES:
            ahead -= waiting[0][2]
            yield waiting.popleft()
    yield from waiting


def _copy_range(source: int, target: int, begin: int, position: int, length: int, name: Path) -> None:
    by_kernel = True
    while length:
        try:
            if by_kernel:
                copied = os.copy_file_range(source, target, length, begin, position)
            else:
                piece = os.pread(source, min(length, HASH_BYTES), begin)
                copied = _write_all(target, memoryview(piece), position) - position
        except OSError as error:
            if not by_kernel or error.errno not in NO_KERNEL_COPY:
                raise
            by_kernel = False
            continue
        if not copied and by_kernel:
            by_kernel = False  # some file systems say so instead of refusing
            continue
        if not copied:
            raise StageFailed(f"{name}: ends at byte {begin}, before its last tensor: it changed while it was read. Download "
                              "it again, then run again.")
        begin, position, length = begin + copied, position + copied, length - copied


def _hash_behind(descriptor: int, marks: queue.SimpleQueue[int | None]) -> str:
    """sha256 (hex) of a file that is being written, following the marks; what was hashed starts towards the disk, the end is
    synced."""
    sha, position = hashlib.sha256(), 0
    buffer = memoryview(bytearray(HASH_BYTES))
    try:
        while (mark := marks.get()) is not None:
            begin = position
            while position < mark:
                got = os.preadv(descriptor, [buffer[:min(HASH_BYTES, mark - position)]], position)
                if not got:
                    raise StageFailed(f"the file that is being written ends at byte {position} instead of {mark}: something "
                                      "else changed it. Run again.")
                sha.update(buffer[:got])
                position += got
            # dirty pages are not dropped by this advice, they start on their way to the disk
            os.posix_fadvise(descriptor, begin, position - begin, os.POSIX_FADV_DONTNEED)
        os.fsync(descriptor)
        return sha.hexdigest()
    finally:
        os.close(descriptor)


def _preallocate(descriptor: int, nbytes: int) -> None:
    """Claims the space at once, so that a full disk shows before the work and the file lies in one piece."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(target: int, view: memoryview, position: int) -> int:
    """The position after the last byte."""
    while view:
        written = os.pwrite(target, view, position)
        view, position = view[written:], position + written
    return position
