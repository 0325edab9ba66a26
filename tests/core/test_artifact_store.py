"""The store: an artifact exists when its manifest does, and not a moment earlier; its manifest says what it holds."""

from __future__ import annotations

import errno
import hashlib
import math
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from reapkit.core.artifact_manifest import HEX_LETTERS, manifest_text, read_manifest_text
from reapkit.core.artifact_store import Artifact, Damage, Store, link_or_copy, undisturbed
from reapkit.core.errors import StageFailed
from tests.support.artifacts import KEY, finished, note_reads
from tests.support.damage import flip
from tests.support.disks import filled, mounted


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return note_reads(monkeypatch)


def test_unfinished_work_is_no_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path)
    payload = store.begin("observe", KEY, resume=False)
    (payload / "half").write_text("x")
    assert store.get("observe", KEY) is None and store.find("observe", KEY) is None
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
    assert store.find("select", KEY[:12] + "b" * 52) is None


def test_a_dropped_payload_leaves_the_manifest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.begin("prune", KEY, resume=False)
    artifact = store.finish("prune", KEY, {"summary": {"bytes": 1}})
    artifact.drop_payload()
    again = store.get("prune", KEY)
    assert again.summary == {"bytes": 1} and not again.has_payload and again.was_dropped
    store.begin("prune", KEY, resume=True)
    assert not store.finish("prune", KEY, {"summary": {}}).was_dropped


# ---------------------------------------------------------------------------------------------- what the manifest says


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    artifact = finished(Store(tmp_path), files={"deep/er/one": b"1", "two": b"", ".three": b"333"})
    assert {name: (facts.nbytes, facts.sha256) for name, facts in artifact.files.items()} == {
        name: (len(content), hashlib.sha256(content).hexdigest())
        for name, content in ((".three", b"333"), ("deep/er/one", b"1"), ("two", b""))
    }
    assert Store(tmp_path).get("prune", KEY) == artifact


def test_what_was_hashed_while_it_was_written_is_not_read_again(tmp_path: Path, read_files: list[str]) -> None:
    known = {"a.safetensors": hashlib.sha256(b"weights").hexdigest()}
    artifact = finished(Store(tmp_path), files={"a.safetensors": b"weights", "b.json": b"{}"}, hashes=known)
    assert read_files == ["b.json"] and artifact.files["a.safetensors"].sha256 == known["a.safetensors"]


def test_large_files_are_read_once_by_several_threads(tmp_path: Path, read_files: list[str]) -> None:
    content = {f"{number}.safetensors": bytes([number]) * (3 << 20) for number in range(6)}
    artifact = finished(Store(tmp_path), files=content)
    assert sorted(read_files) == sorted(content)
    assert {name: facts.sha256 for name, facts in artifact.files.items()} == {
        name: hashlib.sha256(each).hexdigest() for name, each in content.items()
    }


def test_a_payload_holds_files_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.begin("prune", KEY, resume=False) / "link").symlink_to("/etc/hostname")
    with pytest.raises(StageFailed, match=r"payload/link: a link, pipe or device, which no artifact can hold"):
        store.finish("prune", KEY, {"summary": {}})
    assert store.get("prune", KEY) is None


def test_what_a_network_file_system_leaves_is_no_file_of_the_payload(tmp_path: Path) -> None:
    assert list(finished(Store(tmp_path), files={"one": b"1", ".nfs000000001": b"gone"}).files) == ["one"]


def test_a_number_that_is_none_becomes_null(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.begin("verify", KEY, resume=False)
    made = store.finish("verify", KEY, {"summary": {"rows": [{"kl": math.nan, "perplexity": math.inf}]}})
    assert made.summary == {"rows": [{"kl": None, "perplexity": math.inf}]} and store.get("verify", KEY) == made


# ---------------------------------------------------------------------------------------------- damaged manifests


def test_each_flipped_bit_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    manifest = finished(store, files={"one": b"1"}).directory / "manifest.json"
    content = manifest.read_bytes()
    for place in range(len(content)):
        manifest.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        assert isinstance(store.find("prune", KEY), Damage), content[place - 20 : place + 20]
        assert store.get("prune", KEY) is None


@pytest.mark.parametrize("length", [0, 1, 10, -1])
def test_a_cut_manifest_is_no_artifact(tmp_path: Path, length: int) -> None:
    store = Store(tmp_path)
    manifest = finished(store).directory / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:length])
    assert isinstance(store.find("prune", KEY), Damage) and store.get("prune", KEY) is None


def test_a_manifest_that_grew_is_no_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with (finished(store).directory / "manifest.json").open("a") as stream:
        stream.write("\n")
    expected = Damage("manifest.json", "cannot be used (its bytes are not those that were written)")
    assert store.find("prune", KEY) == expected


def test_a_manifest_that_was_lost_is_told_from_unfinished_work(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (finished(store, files={"one": b"1"}).directory / "manifest.json").unlink()
    assert store.find("prune", KEY) == Damage("manifest.json", "is missing") and store.get("prune", KEY) is None
    store.begin("prune", KEY, resume=True)
    assert store.find("prune", KEY) is None


def test_an_artifact_that_another_run_finishes_meanwhile_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    manifest, aside = finished(store, files={"one": b"1"}).directory / "manifest.json", tmp_path / "aside"
    manifest.rename(aside)
    read = Path.read_bytes

    def finished_after_the_look(path: Path) -> bytes:
        try:
            return read(path)
        finally:
            if path == manifest and aside.exists():
                aside.rename(manifest)

    monkeypatch.setattr(Path, "read_bytes", finished_after_the_look)
    assert isinstance(store.find("prune", KEY), Artifact)


def test_an_artifact_that_another_run_takes_away_meanwhile_is_looked_for_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = finished(store, files={"one": b"1"})

    def look() -> Artifact | Damage | None:
        found = store.find("prune", KEY)
        if isinstance(found, Artifact):
            store.set_aside(artifact.directory)
            return Damage("payload/one", "is missing")
        return found

    assert undisturbed(artifact.directory, look) is None


def test_another_stages_manifest_is_noticed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    finished(store).directory.rename(store.directory("select", KEY))
    assert store.find("select", KEY) == Damage("manifest.json", "is that of prune")


GOOD = {"stage": "prune", "key": KEY, "summary": {}, "files": {"one": {"nbytes": 1, "sha256": "0" * HEX_LETTERS}}}
HOSTILE = {
    "no object": "[1]",
    "not JSON": "{",
    "not text": b"\xff\xfe{}",
    "thousands of digits": '{"stage": "prune", "key": "a", "summary": {"tokens": ' + "9" * 5000 + "}}",
    "too large a number": '{"stage": "prune", "key": "a", "summary": {"tokens": 1e999}}',
    "NaN": '{"stage": "prune", "key": "a", "summary": {"tokens": NaN}}',
    "too deep": '{"stage": "prune", "key": "a", "summary": ' + '{"a":' * 50_000 + "1" + "}" * 50_001,
    "no summary": '{"stage": "prune", "key": "a"}',
    "no stage": manifest_text({"key": KEY, "summary": {}}),
    "summary": manifest_text(GOOD | {"summary": [1]}),
    "stage": manifest_text(GOOD | {"stage": 3}),
    "seconds": manifest_text(GOOD | {"seconds": "long"}),
    "negative seconds": manifest_text(GOOD | {"seconds": -1}),
    "warnings": manifest_text(GOOD | {"warnings": {"a": 1}}),
    "inputs": manifest_text(GOOD | {"inputs": {"select": 3}}),
    "files": manifest_text(GOOD | {"files": ["one"]}),
    "a file of another kind": manifest_text(GOOD | {"files": {"one": 3}}),
    "a negative size": manifest_text(GOOD | {"files": {"one": {"nbytes": -1, "sha256": "0" * HEX_LETTERS}}}),
    "a size beyond any disk": manifest_text(GOOD | {"files": {"one": {"nbytes": 10**30, "sha256": "0" * HEX_LETTERS}}}),
    "a truth for a size": manifest_text(GOOD | {"files": {"one": {"nbytes": True, "sha256": "0" * HEX_LETTERS}}}),
    "a short hash": manifest_text(GOOD | {"files": {"one": {"nbytes": 1, "sha256": "0"}}}),
    "a file elsewhere": manifest_text(GOOD | {"files": {"../one": {"nbytes": 1, "sha256": "0" * HEX_LETTERS}}}),
    "an absolute file": manifest_text(GOOD | {"files": {"/one": {"nbytes": 1, "sha256": "0" * HEX_LETTERS}}}),
    "a list without the hash of the text": manifest_text(GOOD).replace("sha256", "sha257", 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests_are_refused(tmp_path: Path, name: str) -> None:
    assert read_manifest_text(manifest_text(GOOD).encode())["files"] == GOOD["files"]
    store, text = Store(tmp_path), HOSTILE[name]
    manifest = finished(store).directory / "manifest.json"
    manifest.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = store.find("prune", KEY)
    assert isinstance(found, Damage) and found.what.startswith("cannot be used (") and len(found.what) < 120


# ---------------------------------------------------------------------------------------------- set aside


def test_damaged_artifacts_are_kept_side_by_side(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in (1, 2):
        artifact = finished(store, files={"one": b"1"})
        flip(artifact.payload / "one")
        assert store.set_aside(artifact.directory).name == f"prune-{KEY[:12]}.damaged-{number}"
        assert store.find("prune", KEY) is None
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.damaged-*/payload/one"))] == [b"0", b"0"]


def test_files_that_do_not_belong_are_moved_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = finished(store, files={"deep/one": b"1"})
    (artifact.payload / "deep/two").write_bytes(b"2")
    kept = store.set_aside(artifact.directory, ("payload/deep/two",))
    assert (kept / "payload/deep/two").read_bytes() == b"2" and store.get("prune", KEY) == artifact
    assert [path.name for path in (artifact.payload / "deep").iterdir()] == ["one"]


# ---------------------------------------------------------------------------------------------- locks


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
