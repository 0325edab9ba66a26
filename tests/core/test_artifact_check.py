"""What is wrong with an artifact's files is noticed before they are used, and nothing is read without need."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from reapkit.core import payload_files
from reapkit.core.artifact_check import adopt, check, damage_of, glance
from reapkit.core.artifact_store import READ_WHOLE, Artifact, Damage, Store
from reapkit.core.payload_files import files_below, sha256_of
from tests.support.artifacts import KEY, finished, note_reads, without_list
from tests.support.damage import DAMAGES, append, delete, flip, flip_unseen, link, truncate

FILES = {"deep/config.json": b'{"small": 1}', "large.safetensors": bytes(range(256)) * 5000, "z": b"1"}
assert len(FILES["large.safetensors"]) > READ_WHOLE


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return note_reads(monkeypatch)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_what_is_as_it_was_written_is_sound(store: Store, read_files: list[str]) -> None:
    artifact = finished(store, files=FILES)
    read_files.clear()
    assert check(artifact) is None and sorted(read_files) == ["config.json", "z"]  # of the large one size and time
    read_files.clear()
    assert check(artifact, full=True) is None and len(read_files) == 3
    assert glance(artifact) is None and len(read_files) == 3


SEEN = {
    ("deep/config.json", flip): "has other bytes than were written (sha256 ",
    ("deep/config.json", flip_unseen): "has other bytes than were written (sha256 ",
    ("deep/config.json", truncate): "has 11 bytes, 12 were written",
    ("deep/config.json", delete): "is missing",
    ("deep/config.json", append): "has 13 bytes, 12 were written",
    ("deep/config.json", link): "is no file any more",
    ("large.safetensors", flip): "has other bytes than were written (sha256 ",
    ("large.safetensors", truncate): "has 1,279,999 bytes, 1,280,000 were written",
    ("large.safetensors", delete): "is missing",
    ("large.safetensors", append): "has 1,280,001 bytes, 1,280,000 were written",
    ("large.safetensors", link): "is no file any more",
}


@pytest.mark.parametrize(("name", "damage"), SEEN, ids=lambda each: getattr(each, "__name__", each))
def test_every_damage_is_noticed(store: Store, name: str, damage: Any) -> None:
    artifact = finished(store, files=FILES)
    damage(artifact.payload / name)
    found = damage_of(store, "prune", KEY)
    assert found is not None and found.file == f"payload/{name}" and not found.extras
    assert found.what.startswith(SEEN[name, damage])
    assert str(damage_of(store, "prune", KEY, full=True)) == str(found)


def test_a_large_file_that_changed_under_its_old_time_is_noticed_in_full_only(store: Store) -> None:
    artifact = finished(store, files=FILES)
    flip_unseen(artifact.payload / "large.safetensors")
    assert check(artifact) is None
    assert check(artifact, full=True) == Damage("payload/large.safetensors", check(artifact, full=True).what)


def test_a_large_file_that_was_only_touched_is_read_once(store: Store, read_files: list[str]) -> None:
    artifact = finished(store, files=FILES)
    os.utime(artifact.payload / "large.safetensors")
    read_files.clear()
    assert check(artifact) is None and "large.safetensors" in read_files
    read_files.clear()
    assert check(artifact) is None and "large.safetensors" not in read_files


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"large.safetensors": 3}', '{"large.safetensors": []}', '{"large.safetensors": [1' + "0" * 5000],
)
def test_a_damaged_cache_costs_a_read(store: Store, read_files: list[str], text: str) -> None:
    artifact = finished(store, files=FILES)
    (artifact.directory / "checked.json").write_text(text)
    read_files.clear()
    assert check(artifact) is None and "large.safetensors" in read_files
    flip_unseen(artifact.payload / "large.safetensors")
    (artifact.directory / "checked.json").write_text(text)
    assert check(artifact) is not None


def test_a_copied_store_is_read_once(store: Store, tmp_path: Path, read_files: list[str]) -> None:
    finished(store, files=FILES)
    copy = Store(tmp_path / "copy")
    copy.root.mkdir()
    shutil.copytree(store.directory("prune", KEY), copy.directory("prune", KEY))  # keeps times, not inodes
    read_files.clear()
    assert damage_of(copy, "prune", KEY) is None and "large.safetensors" in read_files


def test_a_store_that_cannot_be_written_is_checked_all_the_same(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = finished(store, files=FILES)
    os.utime(artifact.payload / "large.safetensors")

    def refused(*arguments: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("reapkit.core.stat_record.write_json", refused)
    assert check(artifact) is None
    flip(artifact.payload / "large.safetensors")
    assert check(artifact) is not None


def test_what_does_not_belong_is_named_and_hides_no_damage(store: Store) -> None:
    artifact = finished(store, files=FILES)
    (artifact.payload / "model-00002.safetensors").write_bytes(b"x")
    expected = ("payload/model-00002.safetensors",)
    assert check(artifact) == Damage(expected[0], "was not written by the stage", expected)
    (artifact.payload / "zz").symlink_to("/etc/hostname")
    assert str(check(artifact)) == "payload/model-00002.safetensors and 1 more were not written by it"
    (artifact.payload / "empty").mkdir()  # holds nothing that could be read
    flip(artifact.payload / "z")
    assert check(artifact).file == "payload/z" and not check(artifact).extras


def test_dropped_files_are_no_damage_and_lost_ones_are(store: Store) -> None:
    artifact = finished(store, files=FILES)
    artifact.drop_payload()
    assert damage_of(store, "prune", KEY, full=True) is None
    artifact = finished(store, files=FILES)
    shutil.rmtree(artifact.payload)
    assert damage_of(store, "prune", KEY) == Damage("payload", "is missing")


def test_unfinished_work_is_no_damage(store: Store) -> None:
    (store.begin("prune", KEY, resume=True) / "half").write_text("x")
    assert damage_of(store, "prune", KEY, full=True) is None


def test_a_file_that_the_disk_does_not_give_is_damaged(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = finished(store, files=FILES)

    def failing(file: Path, *others: Any) -> str:
        raise OSError(errno.EIO, "Input/output error", str(file))

    monkeypatch.setattr(payload_files, "_digest", failing)
    assert str(check(artifact)) == "payload/deep/config.json cannot be read (Input/output error)"


def test_a_file_that_this_user_may_not_read_is_not(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = finished(store, files=FILES)

    def refused(file: Path, *others: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(payload_files, "_digest", refused)
    with pytest.raises(PermissionError):
        check(artifact)


# ---------------------------------------------------------------------------------------------- earlier reapkits


def of_earlier_reapkit(store: Store) -> Artifact:
    without_list(finished(store, files=FILES))
    found = store.get("prune", KEY)
    assert found is not None and found.files is None and found.summary == {"tokens": 3}
    return found


def test_an_earlier_artifact_is_taken_as_it_is_and_checked_from_then_on(store: Store) -> None:
    artifact = of_earlier_reapkit(store)
    assert check(artifact, full=True) is None and adopt(artifact, lambda payload: {}) is None
    assert set(store.get("prune", KEY).files) == set(FILES) and damage_of(store, "prune", KEY, full=True) is None
    flip(artifact.payload / "z")
    assert damage_of(store, "prune", KEY).file == "payload/z"


def test_an_earlier_artifact_keeps_what_it_says_of_itself(store: Store) -> None:
    artifact = of_earlier_reapkit(store)
    hashes = {file.name: sha256 for file, sha256 in sha256_of([artifact.payload / "large.safetensors"])}
    flip_unseen(artifact.payload / "large.safetensors")
    assert adopt(artifact, lambda payload: hashes).file == "payload/large.safetensors"
    delete(artifact.payload / "large.safetensors")
    assert adopt(artifact, lambda payload: hashes) == Damage("payload/large.safetensors", "is missing")
    unreadable = Damage("payload/reapkit.json", "is missing or cannot be read")
    assert adopt(artifact, lambda payload: unreadable) == unreadable
    assert store.get("prune", KEY).files is None


# ---------------------------------------------------------------------------------------------- files and hashes


def test_hashes_come_in_the_order_asked_for(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(5)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * ((5 - number) << 20))
    assert [file for file, _ in sha256_of(files)] == files
    with pytest.raises(FileNotFoundError):
        list(sha256_of([tmp_path / "gone"]))


def test_links_are_seen_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/loop").symlink_to(tmp_path)
    (tmp_path / "deep/file").touch()
    assert list(files_below(tmp_path)) == ["deep/file", "deep/loop"]


def test_the_damages_are_damages(tmp_path: Path) -> None:
    for name, damage in DAMAGES.items():
        (file := tmp_path / name).write_bytes(b"content")
        before = file.stat()
        damage(file)
        assert not file.exists() or file.is_symlink() or file.read_bytes() != b"content"
        assert name != "flip_unseen" or file.stat().st_mtime_ns == before.st_mtime_ns
