"""Shards are read in place and told by their sha256; whatever differs from what was observed is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reapkit.checkpoint.shard_reader import ShardHashes, ShardReader, confirm_unchanged, record_of
from reapkit.core.errors import UnusableError
from reapkit.core.hashing import digest_file
from reapkit.core.safetensors_header import TensorInfo


def shard(tmp_path: Path, content: bytes = b"0123456789") -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path


def observed(tmp_path: Path) -> Path:
    record = record_of(tmp_path / "store", "0123456789abcdef")
    with ShardHashes(tmp_path, record) as hashes:
        hashes.begin(["model.safetensors"])
        hashes.begin(["model.safetensors"])
        assert hashes.keep() == {"model.safetensors": digest_file(tmp_path / "model.safetensors")}
    return record


def test_bytes_are_read_from_their_place(tmp_path: Path):
    shard(tmp_path)
    place = bytearray(4)
    with ShardReader(tmp_path) as reader:
        reader.announce([TensorInfo("a", "U8", (4,), "model.safetensors", 3, 7)])
        reader.read_into("model.safetensors", 3, memoryview(place))
        assert bytes(place) == b"3456"
        with pytest.raises(UnusableError, match=r"the file ends before its tensors do\. Download it again\."):
            reader.read_into("model.safetensors", 8, memoryview(place))
        with pytest.raises(UnusableError, match=r"other\.safetensors: the shard is missing"):
            reader.read_into("other.safetensors", 0, memoryview(place))


def test_readers_that_share_facts_see_the_same_file(tmp_path: Path):
    path, facts = shard(tmp_path), {}
    with ShardReader(tmp_path, facts) as reader:
        reader.read_into(path.name, 0, memoryview(bytearray(2)))
    os.utime(path, ns=(1, 1))
    with ShardReader(tmp_path, facts) as reader, pytest.raises(UnusableError, match="changed while it was being read"):
        reader.read_into(path.name, 0, memoryview(bytearray(2)))


def test_touched_but_equal_is_accepted(tmp_path: Path):
    path = shard(tmp_path)
    record = observed(tmp_path)
    os.utime(path, ns=(1, 1))
    confirm_unchanged(tmp_path, record)
    observed(tmp_path)


def test_other_bytes_are_refused_by_the_next_reader(tmp_path: Path):
    path = shard(tmp_path)
    record, facts = observed(tmp_path), path.stat()
    path.write_bytes(b"0123456780")
    with pytest.raises(UnusableError, match="differs from what was observed") as caught:
        confirm_unchanged(tmp_path, record)
    assert caught.value.exit_code == 3
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    confirm_unchanged(tmp_path, record)  # size and mtime are what other stages look at
    with pytest.raises(UnusableError, match="differs from what was observed"):  # another observation reads it all
        observed(tmp_path)


def test_a_hub_blob_must_hold_what_its_name_says(tmp_path: Path):
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"not that")
    (tmp_path / "model.safetensors").symlink_to(blob)
    with pytest.raises(UnusableError, match="the hub says 000000000000"):
        observed(tmp_path)


def test_without_a_record_there_is_nothing_to_confirm(tmp_path: Path):
    path = shard(tmp_path)
    record = observed(tmp_path)
    path.unlink()
    with pytest.raises(UnusableError, match=r"model\.safetensors: the shard is missing\. Download it again\."):
        confirm_unchanged(tmp_path, record)
    record.unlink()  # as of an observation made elsewhere
    assert confirm_unchanged(tmp_path, record) is None and not record.exists()
