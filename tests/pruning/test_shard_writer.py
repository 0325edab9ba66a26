"""Shards are written whole or not at all, hashed as they lie on the disk, and failures say what to do."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import threading
from pathlib import Path

import pytest

from reapkit.core.errors import StageFailed
from reapkit.core.progress import SILENT
from reapkit.pruning import shard_writer, write
from reapkit.pruning.byte_ranges import Cut, Shard, encode_header
from reapkit.pruning.write import require_space, write_shards

SIZE = 300_000


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    for name, size in (("a", SIZE), ("b", 5_000_000)):
        (path / name).write_bytes(os.urandom(size))
    return path


@pytest.fixture
def out(tmp_path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def shard(
    number: int, shard: str = "a", ranges: tuple[tuple[int, int], ...] = ((100, 5000), (7000, 1), (200_000, 90_000))
) -> Shard:
    cut = Cut(f"t{number}", "U8", (sum(length for _, length in ranges),), shard, ranges)
    return Shard(f"{number}.safetensors", encode_header([cut], {}), (cut,))


def written(source: Path, out: Path, shards: list[Shard]) -> dict[str, str]:
    done: dict[str, str] = {}
    with SILENT.task("write") as task:
        write_shards(source, out, shards, task, lambda shard, sha: done.update({shard.name: sha}))
    return done


def expected(source: Path, shard: Shard) -> bytes:
    data = {name: (source / name).read_bytes() for name in ("a", "b")}
    return shard.header + b"".join(
        data[cut.shard][begin : begin + length] for cut in shard.cuts for begin, length in cut.ranges
    )


def refuse(code: int, monkeypatch: pytest.MonkeyPatch, call: str, *, after: int = 0) -> None:
    """Lets `os.<call>` fail, once it was called so often."""
    original, calls = getattr(os, call), []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        return original(*arguments, **options)

    monkeypatch.setattr(os, call, failing)


def refuse_direct(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """A file system that does not write past the page cache: said when a file is opened, or when it is first
    written."""
    opening, writing = os.open, os.pwrite

    def is_direct(descriptor: int) -> bool:
        return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)

    def refusing_open(path, flags, *rest, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        return opening(path, flags, *rest, **options)

    def refusing_write(descriptor, *rest):
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return writing(descriptor, *rest)

    monkeypatch.setattr(os, *{"open": ("open", refusing_open), "write": ("pwrite", refusing_write)}[when])


@pytest.mark.parametrize("block", [mmap.PAGESIZE, 1 << 20])
@pytest.mark.parametrize("piece", [997, 1 << 25])
@pytest.mark.parametrize("direct", ["taken", "open", "write"])
def test_bytes_and_hashes_are_right(source, out, monkeypatch, block, piece, direct):
    monkeypatch.setattr(write, "PIECE_BYTES", piece)
    monkeypatch.setattr(shard_writer, "BLOCK_BYTES", block)
    monkeypatch.setattr(shard_writer, "SENT_BYTES", 3 * block)
    if direct != "taken":
        refuse_direct(monkeypatch, direct)
    size = (source / "b").stat().st_size
    shards = [shard(1), shard(2, "b"), shard(3), shard(4, "b", ((0, size),)), shard(5, "b", ((size - 1, 1),))]
    hashes = written(source, out, shards)
    for one in shards:
        content = (out / one.name).read_bytes()
        assert content == expected(source, one) and hashes[one.name] == hashlib.sha256(content).hexdigest()
    assert sorted(path.name for path in out.iterdir()) == [one.name for one in shards]


@pytest.mark.parametrize("after", [None, 0, 2])
def test_a_whole_shard_is_the_same_file(source, out, monkeypatch, after):
    """By the kernel, without it, and with one that gives up in the middle."""
    monkeypatch.setattr(write, "PIECE_BYTES", 100_001)
    monkeypatch.setattr(shard_writer, "BLOCK_BYTES", mmap.PAGESIZE)
    if after is not None:
        refuse(errno.EXDEV, monkeypatch, "copy_file_range", after=after)
    whole = Shard(
        "1.safetensors",
        (source / "a").read_bytes()[:100],
        (Cut("x", "U8", (SIZE - 100,), "a", ((100, SIZE - 100),)),),
        "a",
    )
    hashes = written(source, out, [whole])
    assert (out / "1.safetensors").read_bytes() == (source / "a").read_bytes()
    assert hashes == {"1.safetensors": hashlib.sha256((source / "a").read_bytes()).hexdigest()}


@pytest.mark.parametrize("call, after", [("pwrite", 2), ("preadv", 7), ("posix_fallocate", 2), ("fsync", 3)])
@pytest.mark.parametrize(
    "code, words",
    [
        (errno.ENOSPC, "is full. Free space there, then run again"),
        (errno.EROFS, "is read-only"),
        (errno.EIO, "the disk reported a failure"),
    ],
)
def test_a_failing_disk_leaves_finished_shards_and_nothing_half_written(
    source, out, monkeypatch, call, after, code, words
):
    refuse(code, monkeypatch, call, after=after)
    done, shards = {}, {one.name: one for one in map(shard, range(1, 12))}
    with SILENT.task("write") as task, pytest.raises(StageFailed, match=words):
        write_shards(source, out, list(shards.values()), task, lambda shard, sha: done.update({shard.name: sha}))
    left = {path.name: path.read_bytes() for path in out.iterdir()}
    assert (
        done.keys() <= left.keys() and len(left) - len(done) <= 1
    )  # one may have its name but not yet a safe directory
    assert left == {name: expected(source, shards[name]) for name in left}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("write", "hash"))]


def test_a_source_that_vanishes_or_shrinks_is_named(source, out):
    with pytest.raises(StageFailed, match=r"c vanished while .*source was read"):
        written(source, out, [shard(1, "c")])
    os.truncate(source / "a", 250_000)
    with pytest.raises(StageFailed, match="ends at byte 250000, before its last tensor: it changed while it was read"):
        written(source, out, [shard(1)])
    assert not list(out.iterdir())


def test_too_little_space_is_said_before_the_work(out):
    with pytest.raises(StageFailed, match=r"1000000000.0 GB must be written, but .* GB are free"):
        require_space(out, 10**18)
