"""Shards are written whole or not at all, hashed as they lie on the disk, and failures say what to do."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from reapkit.errors import StageFailed
from reapkit.progress import SILENT
from reapkit.surgery import write
from reapkit.surgery.cut import Cut, Shard, encode_header
from reapkit.surgery.write import require_space, write_shards

SIZE = 300_000


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    for name in ("a", "b"):
        (path / name).write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def out(tmp_path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def shard(number: int, shard: str = "a", ranges: tuple[tuple[int, int], ...] = ((100, 5000), (7000, 1),
                                                                                (200_000, 90_000))) -> Shard:
    cut = Cut(f"t{number}", "U8", (sum(length for _, length in ranges),), shard, ranges)
    return Shard(f"{number}.safetensors", encode_header([cut], {}), (cut,))


def written(source: Path, out: Path, shards: list[Shard]) -> dict[str, str]:
    done: dict[str, str] = {}
    with SILENT.task("write") as task:
        write_shards(source, out, shards, task, lambda shard, sha: done.update({shard.name: sha}))
    return done


def expected(source: Path, shard: Shard) -> bytes:
    data = {name: (source / name).read_bytes() for name in ("a", "b")}
    return shard.header + b"".join(data[cut.shard][begin:begin + length] for cut in shard.cuts for begin, length in cut.ranges)


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("piece", [997, 1 << 25])
def test_bytes_and_hashes_are_right(source, out, monkeypatch, by_kernel, piece):
    monkeypatch.setattr(write, "PIECE_BYTES", piece)
    monkeypatch.setattr(write, "HASH_BYTES", 1001)
    if not by_kernel:
        def refuse(*_):
            raise OSError(errno.EXDEV, "across disks")
        monkeypatch.setattr(os, "copy_file_range", refuse)
    shards = [shard(1), shard(2, "b"), shard(3), shard(4, "b", ((0, SIZE),))]
    hashes = written(source, out, shards)
    for one in shards:
        content = (out / one.name).read_bytes()
        assert content == expected(source, one) and hashes[one.name] == hashlib.sha256(content).hexdigest()
    assert sorted(path.name for path in out.iterdir()) == [one.name for one in shards]


def test_a_whole_shard_is_the_same_file(source, out):
    whole = Shard("1.safetensors", (source / "a").read_bytes()[:100], (Cut("x", "U8", (SIZE - 100,), "a",
                                                                           ((100, SIZE - 100),)),), "a")
    hashes = written(source, out, [whole])
    assert (out / "1.safetensors").read_bytes() == (source / "a").read_bytes()
    assert hashes == {"1.safetensors": hashlib.sha256((source / "a").read_bytes()).hexdigest()}


@pytest.mark.parametrize("code, words", [(errno.ENOSPC, "is full. Free space there, then run again"),
                                         (errno.EROFS, "is read-only"),
                                         (errno.EIO, "the disk reported a failure")])
def test_a_failing_disk_leaves_finished_shards_and_nothing_half_written(source, out, monkeypatch, code, words):
    copy, calls = os.copy_file_range, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) > 4:
            raise OSError(code, os.strerror(code))
        return copy(*arguments)

    monkeypatch.setattr(os, "copy_file_range", fail)
    done: dict[str, str] = {}
    with SILENT.task("write") as task, pytest.raises(StageFailed, match=words):
        write_shards(source, out, [shard(n) for n in range(1, 6)], task, lambda shard, sha: done.update({shard.name: sha}))
    assert sorted(path.name for path in out.iterdir()) == sorted(done)


def test_a_source_that_vanishes_or_shrinks_is_named(source, out):
    with pytest.raises(StageFailed, match="c vanished while .*source was read"):
        written(source, out, [shard(1, "c")])
    os.truncate(source / "a", 250_000)
    with pytest.raises(StageFailed, match="ends at byte 250000, before its last tensor: it changed while it was read"):
        written(source, out, [shard(1)])
    assert not list(out.iterdir())


def test_too_little_space_is_said_before_the_work(out):
    with pytest.raises(StageFailed, match=r"1000000000.0 GB are to be written, but .* GB are free"):
        require_space(out, 10**18)
