"""The store: an artifact exists when its manifest does, and not a moment earlier."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from reapkit.core.artifact_store import Store, link_or_copy
from tests.support.disks import filled, mounted

KEY = "a" * 64


def test_unfinished_work_is_no_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path)
    payload = store.begin("observe", KEY, resume=False)
    (payload / "half").write_text("x")
    assert store.get("observe", KEY) is None
    store.finish("observe", KEY, {"summary": {"tokens": 3}})
    artifact = store.get("observe", KEY)
    assert artifact.summary == {"tokens": 3} and (artifact.payload / "half").read_text() == "x"


def test_begin_clears_or_resumes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.begin("observe", KEY, resume=False) / "half").write_text("x")
    assert (store.begin("observe", KEY, resume=True) / "half").exists()
    assert not (store.begin("observe", KEY, resume=False) / "half").exists()


def test_keys_that_share_their_first_letters_are_told_apart(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.begin("select", KEY, resume=False)
    store.finish("select", KEY, {"summary": {}})
    assert store.get("select", KEY[:12] + "b" * 52) is None


def test_a_dropped_payload_leaves_the_manifest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.begin("prune", KEY, resume=False)
    artifact = store.finish("prune", KEY, {"summary": {"bytes": 1}})
    artifact.drop_payload()
    again = store.get("prune", KEY)
    assert again.summary == {"bytes": 1} and not again.has_payload


def test_a_cut_manifest_is_no_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.begin("prune", KEY, resume=False)
    store.finish("prune", KEY, {"summary": {}})
    manifest = store.directory("prune", KEY) / "manifest.json"
    manifest.write_text(manifest.read_text()[:10])
    assert store.get("prune", KEY) is None


def _hold(root: Path, order: str, seconds: float) -> None:
    with Store(root).locked("observe", KEY):
        with (root / "order").open("a") as log:
            log.write(f"{order}+")
        time.sleep(seconds)
        with (root / "order").open("a") as log:
            log.write(f"{order}-")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    processes = [
        multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path, name, 0.2)) for name in "ab"
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert (tmp_path / "order").read_text() in ("a+a-b+b-", "b+b-a+a-")


@pytest.mark.parametrize("code", [None, errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP])
def test_a_link_or_where_there_can_be_none_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(code, "no links here")

    if code is not None:
        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "shard").write_bytes(b"weights")
    for _ in range(2):  # the second takes the place of the first
        link_or_copy(tmp_path / "shard", tmp_path / "published")
    assert (tmp_path / "published").samefile(tmp_path / "shard") == (code is None)
    assert (tmp_path / "published").read_bytes() == b"weights"
    assert sorted(os.listdir(tmp_path)) == ["published", "shard"]


def test_a_copy_that_finds_no_room_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(bytes(50_000))
    with mounted(tmp_path / "disk", "size=64k") as disk:
        link_or_copy(tmp_path / "shard", disk / "published")
        with filled(disk), pytest.raises(OSError, match="No space left on device"):
            link_or_copy(tmp_path / "shard", disk / "again")
        assert os.listdir(disk) == ["published"]
