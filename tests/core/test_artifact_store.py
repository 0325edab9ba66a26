"""The store: an artifact exists when its manifest does, and not a moment earlier."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

from reapkit.core.artifact_store import Store

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
