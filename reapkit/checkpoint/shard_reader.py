"""Reads the bytes of a checkpoint's shards without mapping files, and computes their sha256. Torch-free.

Guaranteed: every read of one `ShardReader` sees files of the size and mtime that they had when the checkpoint was
opened by it; the hashes of `ShardHashes` are of those same files, taken whole by threads of their own while observe
first reads them, and kept beside the store's artifacts by the model's identity. A later observation hashes again and
compares; other stages compare size and mtime, and hash again only what was touched. What differs raises UnusableError
(exit 3). Not seen: bytes that change under the same size and mtime after they were observed, until the next
observation.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from reapkit.core.atomic_files import write_json
from reapkit.core.errors import UnusableError
from reapkit.core.hashing import digest_file
from reapkit.core.json_text import parse_json
from reapkit.core.safetensors_header import TensorInfo

READ_BYTES = 1 << 30  # the kernel stops a single read at 2 GiB
HEX_LETTERS = 64
NICE = 15  # of 19: a twenty-fifth of a normal thread's share
HASHING_THREADS = 4  # sha256 takes 1 to 2 GB/s of one core; a fast disk gives more


class ShardReader:
    """Open shards of one directory; a context manager. Threads may share it."""

    def __init__(self, directory: Path, facts: dict[str, tuple[int, int]] | None = None):
        """`facts`: size and mtime by shard, as first seen; shared by the readers that must all see the same files."""
        self._directory, self._facts = directory, {} if facts is None else facts
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._open.values():
            os.close(file)

    def announce(self, tensors: Iterable[TensorInfo]) -> None:
        """Tells the kernel which tensors will be read next, in any order, so that a disk works ahead; reads nothing."""
        for shard, begin, end in _runs(tensors):
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file(shard), begin, end - begin, os.POSIX_FADV_WILLNEED)

    def read_into(self, shard: str, begin: int, place: memoryview) -> None:
        """Fills `place`, uint8 [bytes] and writable, with the shard's bytes from `begin` on, an offset in the file.

        Raises UnusableError where the shard ends before `place` is full.
        """
        file, done = self._file(shard), 0
        while done < len(place):
            count = os.preadv(file, [place[done : done + READ_BYTES]], begin + done)
            if not count:
                raise UnusableError(
                    f"{self._directory / shard}: the file ends before its tensors do. Download it again."
                )
            done += count

    def _file(self, shard: str) -> int:
        with self._lock:
            if shard not in self._open:
                path = self._directory / shard
                try:
                    self._open[shard] = os.open(path, os.O_RDONLY)
                except FileNotFoundError:
                    raise UnusableError(f"{path}: the shard is missing. Download it again.") from None
                now = _facts(os.fstat(self._open[shard]))
                if self._facts.setdefault(shard, now) != now:
                    raise _changed(path)
            return self._open[shard]


@dataclass(frozen=True)
class HashedShard:
    """What a shard was when it was hashed."""

    nbytes: int
    mtime_ns: int
    sha256: str


@dataclass(eq=False)
class ShardHashes:
    """sha256 of shards, each taken in the background from the moment it is `begin`-ed; a context manager.

    `record`: the file that keeps them, one per model. Nothing is hashed before the reader gets there, so that a disk
    reads a shard once: what one of the two reads, the other finds in the page cache.
    """

    directory: Path
    record: Path
    _pending: dict[str, Future[HashedShard]] = field(default_factory=dict)

    def __enter__(self) -> ShardHashes:
        threads = min(HASHING_THREADS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="shard-hashes", initializer=_stand_back)
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=exception[0] is None, cancel_futures=True)

    def begin(self, shards: Iterable[str]) -> None:
        """Hashes those that are not under way yet, in this order."""
        for shard in shards:
            if shard not in self._pending:
                self._pending[shard] = self._pool.submit(_hashed, self.directory / shard)

    def keep(self) -> dict[str, str]:
        """Waits, compares with the record and completes it; sha256 by shard. Raises UnusableError where a shard differs
        from what an earlier observation of this model read.
        """
        known = _load(self.record)
        for shard, future in self._pending.items():
            found = future.result()
            if shard in known and known[shard].sha256 != found.sha256:
                raise _differs(self.directory / shard, self.record)
            known[shard] = found
        _save(self.record, known)
        return {shard: facts.sha256 for shard, facts in sorted(known.items())}


def confirm_unchanged(directory: Path, record: Path) -> None:
    """The shards are still those that observe read: same size and mtime, or, where they were touched, same sha256.

    Raises UnusableError otherwise. Without a record (an observation made elsewhere) there is nothing to confirm.
    """
    for shard, then in _load(record).items():
        path = directory / shard
        if not path.is_file():
            raise UnusableError(f"{path}: the shard is missing. Download it again.")
        if _facts(path.stat()) != (then.nbytes, then.mtime_ns) and _hashed(path).sha256 != then.sha256:
            raise _differs(path, record)


def record_of(store: Path, identity: str) -> Path:
    """Where the hashes of a model are kept."""
    return store / "shards" / f"{identity[:12]}.json"


def _stand_back() -> None:
    """This thread yields to the reader and to the forward where cores are few."""
    if sys.platform == "linux":  # elsewhere a thread has no niceness of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


def _hashed(path: Path) -> HashedShard:
    """Raises UnusableError where the file changes meanwhile, or is a hub cache's blob that does not hold what its name
    says."""
    before = _facts(path.stat())
    sha256 = digest_file(path)
    if _facts(path.stat()) != before:
        raise _changed(path)
    blob = path.resolve()
    if blob.parent.name == "blobs" and len(blob.name) == HEX_LETTERS and blob.name != sha256:
        raise UnusableError(
            f"{path}: its bytes have sha256 {sha256[:12]}…, the hub says {blob.name[:12]}…. Delete {blob} and download"
            " it again."
        )
    return HashedShard(*before, sha256)


def _facts(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _runs(tensors: Iterable[TensorInfo]) -> list[tuple[str, int, int]]:
    """Neighbouring tensors as one range."""
    runs: list[tuple[str, int, int]] = []
    for tensor in sorted(tensors, key=lambda tensor: (tensor.shard, tensor.begin)):
        if runs and runs[-1][0] == tensor.shard and runs[-1][2] == tensor.begin:
            runs[-1] = (tensor.shard, runs[-1][1], tensor.end)
        else:
            runs.append((tensor.shard, tensor.begin, tensor.end))
    return runs


def _load(record: Path) -> dict[str, HashedShard]:
    try:
        return {shard: HashedShard(**facts) for shard, facts in parse_json(record.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError):
        raise UnusableError(
            f"{record}: the file is not a record of shards' hashes. Delete it; the next observation writes it again."
        ) from None


def _save(record: Path, shards: Mapping[str, HashedShard]) -> None:
    write_json(record, {shard: vars(facts) for shard, facts in sorted(shards.items())})


def _changed(path: Path) -> UnusableError:
    return UnusableError(
        f"{path}: the file changed while it was being read (size or mtime). Leave the model alone during a run, and"
        " run again."
    )


def _differs(path: Path, record: Path) -> UnusableError:
    return UnusableError(
        f"{path}: the file differs from what was observed (sha256 in {record}), though the model is called the"
        f" same. Restore the file, or delete {record} and observe into another runtime.store."
    )
