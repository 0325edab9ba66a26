"""Bytes wait on disk, make room when they are taken back, and leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reapkit.core.unnamed_file import Stretch, UnnamedFile
from tests.support.disks import filled, mounted


def taken(file: UnnamedFile, block: Stretch) -> bytes:
    place = bytearray(block.nbytes)
    file.take(block, memoryview(place))
    return bytes(place)


def test_blocks_come_back_as_they_were_put(tmp_path: Path) -> None:
    file = UnnamedFile(tmp_path / "deep" / "down")
    contents = [bytes([number]) * (1000 * number) for number in range(1, 6)]
    blocks = [file.put(memoryview(content)) for content in contents]
    assert file.held == 15_000 and not os.listdir(tmp_path / "deep" / "down")
    assert [taken(file, block) for block in reversed(blocks)] == contents[::-1]
    assert file.held == 0


def test_room_is_used_again_and_given_back(tmp_path: Path) -> None:
    file = UnnamedFile(tmp_path)
    first, second, other = (file.put(memoryview(bytes(size))) for size in (1000, 1000, 10))
    for _ in range(10):
        assert taken(file, first) == bytes(1000)
        first = file.put(memoryview(b"y" * 1000))
        assert taken(file, first) == b"y" * 1000
        first = file.put(memoryview(bytes(1000)))
    assert os.fstat(file._file.fileno()).st_size == 2010
    for block in (first, second, other):
        file.forget(block)
    assert file.held == 0 and os.fstat(file._file.fileno()).st_size == 0


def test_a_refusal_names_the_directory(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        file = UnnamedFile(disk)
        block = file.put(memoryview(b"x" * 1000))
        with filled(disk), pytest.raises(OSError, match="No space left on device") as refused:
            file.put(memoryview(bytes(10_000)))
        assert refused.value.filename == str(disk) and file.held == 1000
        assert taken(file, block) == b"x" * 1000
