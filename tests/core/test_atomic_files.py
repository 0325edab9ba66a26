"""A file is whole or not there, whatever stops its writer, and as open to others as the umask says."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from reapkit.core import atomic_files
from reapkit.core.atomic_files import (
    copy_file,
    making,
    remove_unfinished,
    replacing,
    reserve,
    write_at,
    write_bytes,
    write_json,
    write_text,
)
from reapkit.core.mapped_safetensors import create_tensors
from reapkit.evaluation.outputs import hidden_file
from tests.support.disks import filled, mounted


def refused(code: int, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def failing(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, failing)


def test_text_json_and_copies_have_the_bytes_that_were_given(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "down" / "text", "a\r\né\n")
    assert (tmp_path / "deep" / "down" / "text").read_bytes() == b"a\r\n\xc3\xa9\n"
    write_text(tmp_path / "name", json.dumps({"é": "\udcff"}, ensure_ascii=False))
    assert (tmp_path / "name").read_bytes() == b'{"\xc3\xa9": "\\udcff"}'
    assert json.loads((tmp_path / "name").read_text()) == {"é": "\udcff"}
    write_json(tmp_path / "json", {"é": [1, None]})
    assert (tmp_path / "json").read_bytes() == b'{\n "\\u00e9": [\n  1,\n  null\n ]\n}\n'
    (tmp_path / "link").symlink_to("json")
    copy_file(tmp_path / "link", tmp_path / "copy")
    assert not (tmp_path / "copy").is_symlink() and json.loads((tmp_path / "copy").read_text()) == {"é": [1, None]}


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors by itself makes files that nobody else may read."""
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "tensors") as partial:
            save_file({"a": np.arange(3)}, partial)
        write_text(tmp_path / "text", "")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {mode}
    assert load_file(tmp_path / "tensors")["a"].tolist() == [0, 1, 2]


def test_file_and_directory_are_synced_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    sync, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), sync(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (steps.append("renamed"), rename(self, to)))
    write_text(tmp_path / "text", "x")
    assert steps[0].parent == tmp_path and atomic_files.UNFINISHED.fullmatch(steps[0].name)
    assert steps[1:] == ["renamed", tmp_path]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_refusing_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    write_text(tmp_path / "text", "old")
    refused(code, monkeypatch, "fsync")
    with pytest.raises(OSError) as refusal:
        write_text(tmp_path / "text", "new")
    assert refusal.value.errno == code
    assert [file.name for file in tmp_path.iterdir()] == ["text"] and (tmp_path / "text").read_text() == "old"


def test_a_file_system_that_cannot_sync_directories_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    write_text(tmp_path / "text", "x")
    assert (tmp_path / "text").read_text() == "x"


def test_what_safetensors_says_of_the_disk_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as refusal, replacing(tmp_path / "tensors"):
        save_file({"a": np.arange(3)}, tmp_path / "not there" / "tensors")
    assert refusal.value.filename == str(tmp_path / "tensors") and not list(tmp_path.iterdir())


def test_a_value_that_json_cannot_say_leaves_what_was_there(tmp_path: Path) -> None:
    write_json(tmp_path / "json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "json", {1, 2})
    assert (tmp_path / "json").read_text() == "1\n"


def test_what_a_killed_writer_left_is_recognised(tmp_path: Path) -> None:
    killed = (
        "import os, signal, sys; from pathlib import Path; from reapkit.core.atomic_files import replacing\n"
        "with replacing(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", killed, str(tmp_path / "sub" / "text")], timeout=60)
    assert done.returncode == -signal.SIGKILL and len(list((tmp_path / "sub").iterdir())) == 1
    write_bytes(tmp_path / "sub" / ".mine.partial", b"of somebody else")
    remove_unfinished(tmp_path)
    assert [file.name for file in (tmp_path / "sub").iterdir()] == [".mine.partial"]


def test_a_link_stays_and_what_it_points_at_is_written(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for name, target in (("link", "other/text"), ("second", "link")):
        (tmp_path / name).symlink_to(target)
    write_text(tmp_path / "second", "first")
    write_text(tmp_path / "second", "later")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "second").is_symlink()
    assert not (tmp_path / "other/text").is_symlink() and (tmp_path / "other/text").read_text() == "later"
    assert sorted(os.listdir(tmp_path)) == ["link", "other", "second"] and os.listdir(tmp_path / "other") == ["text"]


def test_links_that_lead_back_to_themselves_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError) as refusal:
        write_text(tmp_path / "a", "text")
    assert refusal.value.errno == errno.ELOOP and sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_write_in_pieces_is_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, place: write(file, content[:3], place))
    with (tmp_path / "file").open("wb") as file:
        write_at(file.fileno(), np.arange(5, dtype="<i4").data, 4)
    assert (tmp_path / "file").read_bytes() == bytes(4) + np.arange(5, dtype="<i4").tobytes()


@pytest.mark.parametrize("code", [None, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_room_is_reserved_and_what_is_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    if code is not None:  # a file system that cannot
        refused(code, monkeypatch, "posix_fallocate")
    reserve(tmp_path / "file", 1000)
    (tmp_path / "file").write_bytes(b"x" * 2000)
    reserve(tmp_path / "file", 1000)
    assert (tmp_path / "file").read_bytes() == b"x" * 2000
    reserve(tmp_path / "file", 3000)
    assert (tmp_path / "file").read_bytes() == b"x" * 2000 + bytes(1000)


def test_a_map_of_a_reserved_file_can_be_written_or_the_disk_says_so_before(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        shapes = {"a": ("int64", 6000)}
        create_tensors(disk / "fits", shapes)["a"][:] = 1
        with filled(disk), pytest.raises(OSError, match="No space left on device") as refusal:
            create_tensors(disk / "too large", shapes)["a"][:] = 1  # without room: SIGBUS
        assert refusal.value.filename == str(disk / "too large")
        with filled(disk), pytest.raises(OSError, match="No space left on device"):
            hidden_file(disk / "hidden", 1000, 64, torch.float32).zero_()


def test_a_directory_is_there_with_all_its_files_or_not_at_all(tmp_path: Path) -> None:
    with making(tmp_path / "deep" / "made") as directory:
        write_text(directory / "first", "1")
        write_text(directory / "in" / "second", "2")
        assert not (tmp_path / "deep" / "made").exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "first", "in", "made", "second"]
    with pytest.raises(ValueError, match="no"), making(tmp_path / "failed") as directory:
        write_text(directory / "first", "1")
        raise ValueError("no")
    with mounted(tmp_path / "disk", "size=64k") as disk, filled(disk):
        with pytest.raises(OSError, match="No space left on device") as refusal, making(disk / "made") as directory:
            write_text(directory / "first", "1" * 10_000)
        assert refusal.value.filename == str(disk / "made") and os.listdir(disk) == [".filler"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(OSError), making(tmp_path / "mine") as directory:
        write_text(directory / "file", "other")
    assert (tmp_path / "mine" / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["deep", "disk", "mine"]
