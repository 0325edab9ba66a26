"""Copies byte ranges from shards to shards at the disk's speed. Torch-free.

The payload is read ahead, and hashed and written behind; the next shard begins before the last one is synced. Shards
that do not change are left to the kernel (`copy_file_range`: shared blocks where the file system can).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from reapkit.core.atomic_files import sync
from reapkit.core.errors import StageFailed
from reapkit.core.formatting import gigabytes
from reapkit.core.progress import Task
from reapkit.core.refusals import WAYS_OUT
from reapkit.pruning.byte_ranges import Run, Shard
from reapkit.pruning.shard_writer import FILES, Machinery, ShardFile

PIECE_BYTES = 32 << 20  # what is announced, and counted as progress, at once
AHEAD_BYTES = 64 << 20
ADVICE_BYTES = 512 << 10  # the kernel reads ahead no more than this per advice on common disks
NO_KERNEL_COPY = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


def write_shards(
    source: Path, out: Path, shards: Sequence[Shard], task: Task, finished: Callable[[Shard, str], None]
) -> None:
    """Writes the shards, each whole or not at all (beside, synced, renamed), and reports each with its sha256 (hex)
    once it is safe.

    Raises StageFailed where the disk is full or read-only, or the source changed or vanished meanwhile; finished shards
    stay.
    """
    unfinished: deque[tuple[Shard, ShardFile]] = deque()

    def settle() -> None:
        shard, file = unfinished[0]
        sha = file.sha256.result()
        _partial(out, shard).replace(out / shard.name)
        sync(out)
        unfinished.popleft()
        finished(shard, sha)

    with explained(source, out), Machinery() as machinery:
        try:
            for shard in shards:
                task.note(shard.name)
                while len(unfinished) >= FILES:
                    settle()
                with ShardFile(_partial(out, shard), shard.nbytes, machinery, direct=not shard.whole) as file:
                    unfinished.append((shard, file))
                    _copy(source, file, shard, task)
            while unfinished:
                settle()
        except BaseException:
            for shard, file in unfinished:
                file.sha256.exception()
                _partial(out, shard).unlink(missing_ok=True)
            raise


def require_space(out: Path, nbytes: int) -> None:
    """Raises StageFailed where the disk that holds `out` has less than `nbytes` free."""
    free = shutil.disk_usage(out).free
    if free < nbytes:
        raise StageFailed(
            f"{out}: {gigabytes(nbytes)} must be written, but {gigabytes(free)} are free there. Free "
            f"{gigabytes(nbytes - free)} or choose another output.directory, then run again."
        )


@contextmanager
def explained(source: Path, out: Path) -> Iterator[None]:
    """Turns the operating system's refusals into StageFailed with what to do; finished shards stay and are not written
    again."""
    try:
        yield
    except OSError as error:
        place = error.filename or out
        advice: dict[int | None, str] = {
            errno.ENOSPC: f"the disk of {out} is full. Free space there, then run again: finished shards are kept.",
            errno.EDQUOT: f"the quota on the disk of {out} is used up. Free space there, then run again.",
            errno.EROFS: f"{out} is read-only. Choose another output.directory.",
            errno.EACCES: f"{place}: permission denied. Make it accessible, then run again.",
            errno.ENOENT: f"{place} vanished while {source} was read. Restore it, then run again.",
            errno.EIO: f"{place}: the disk reported a failure. Check it, then run again.",
        }
        otherwise = f"{place}: {error.strerror or error}. {WAYS_OUT.get(error.errno or 0, 'Check the disk')}, then run"
        raise StageFailed(advice.get(error.errno, f"{otherwise} again: finished shards are kept.")) from error


def _partial(out: Path, shard: Shard) -> Path:
    return out / f".{shard.name}.partial"


def _copy(source: Path, file: ShardFile, shard: Shard, task: Task) -> None:
    """Gives the file its header and payload."""
    by_kernel = bool(shard.whole)
    if shard.whole:
        runs: Iterable[Run] = [(shard.whole, 0, shard.nbytes)]
    else:
        file.preallocate()
        file.write(shard.header)
        runs = shard.runs()
        task.advance(file.position)
    with ExitStack() as stack:
        opened: dict[str, int] = {}

        def descriptor(name: str) -> int:
            if name not in opened:
                opened[name] = stack.enter_context((source / name).open("rb", buffering=0)).fileno()
            return opened[name]

        for name, begin, length in _read_ahead(_pieces(runs), descriptor):
            copied = (
                _copy_in_kernel(descriptor(name), file.descriptor, begin, file.position, length) if by_kernel else 0
            )
            if copied:
                file.skip(copied)
            by_kernel = copied == length
            file.copy(descriptor(name), begin + copied, length - copied, source / name)
            task.advance(length)
    if file.position != shard.nbytes:
        raise StageFailed(
            f"{source}: gave {file.position} bytes for {shard.name} where {shard.nbytes} were planned. Please report "
            "this."
        )


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
            os.posix_fadvise(
                descriptor(name), offset, min(ADVICE_BYTES, begin + length - offset), os.POSIX_FADV_WILLNEED
            )
        waiting.append(piece)
        ahead += length
        while ahead > AHEAD_BYTES:
            ahead -= waiting[0][2]
            yield waiting.popleft()
    yield from waiting


def _copy_in_kernel(source: int, target: int, begin: int, position: int, length: int) -> int:
    """How many bytes it copied: all, or fewer where the file systems cannot."""
    done = 0
    while done < length:
        try:
            copied = os.copy_file_range(source, target, length - done, begin + done, position + done)
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
            break
        if not copied:  # some file systems say so instead of refusing
            break
        done += copied
    return done
