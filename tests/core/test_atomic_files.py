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
from safetensors.numpy import load_file, save_file

from reapkit.core import atomic_files
from reapkit.core.atomic_files import copy_file, remove_unfinished, replacing, write_bytes, write_json, write_text


def refused(code: int, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def failing(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, failing)


def test_text_json_and_copies_have_the_bytes_that_were_given(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "down" / "text", "a\r\né\n")
    assert (tmp_path / "deep" / "down" / "text").read_bytes() == b"a\r\n\xc3\xa9\n"
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
