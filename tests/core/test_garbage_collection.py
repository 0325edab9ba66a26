"""What no run uses goes; what one uses, works on, could resume, or has links to, stays."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from reapkit.core.artifact_store import Artifact, Store
from reapkit.core.errors import UnusableError
from reapkit.core.garbage_collection import MEASURING, collect, register, release_measurements
from tests.support.command import command


def made(store: Store, stage: str, letter: str, size: int = 1000) -> Artifact:
    key = letter * 64
    (store.begin(stage, key, resume=False) / "data").write_bytes(b"x" * size)
    return store.finish(stage, key, {"summary": {}})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs" / ".store")


def names(store: Store) -> set[str]:
    return {path.name for path in store.root.iterdir() if path.is_dir() and path.name != "runs"}


def test_only_what_no_run_uses_is_removed(store: Store, tmp_path: Path) -> None:
    for stage, letter in (("observe", "a"), ("select", "b"), ("select", "c"), ("prune", "d"), ("report", "e")):
        made(store, stage, letter)
    register(store, tmp_path / "here", {"observe": f"observe-{'a' * 12}", "select": f"select-{'b' * 12}"})
    register(store, tmp_path / "here", {"select": f"select-{'c' * 12}"})  # the run decided anew
    (tmp_path / "moved").mkdir()
    os.link(store.root / f"prune-{'d' * 12}" / "payload" / "data", tmp_path / "moved" / "data")
    beside = store.root.parent / "beside" / "run.json"
    beside.parent.mkdir()
    beside.write_text(json.dumps({"stages": {"report": {"artifact": f"report-{'e' * 12}"}}}))
    before = names(store)
    seen = collect(store, dry_run=True)
    assert names(store) == before and [(each.artifact, each.nbytes > 1000) for each in seen.removed] == [
        (f"select-{'b' * 12}", True)
    ]
    assert collect(store) == seen and before - names(store) == {f"select-{'b' * 12}"}
    assert seen.kept == {
        "a run uses it": [f"observe-{'a' * 12}", f"report-{'e' * 12}", f"select-{'c' * 12}"],
        "its files are linked from elsewhere": [f"prune-{'d' * 12}"],
    }
    shutil.rmtree(tmp_path / "here")
    shutil.rmtree(tmp_path / "moved")
    assert {each.artifact for each in collect(store).removed} == {
        f"observe-{'a' * 12}",
        f"select-{'c' * 12}",
        f"prune-{'d' * 12}",
    }
    assert not list((store.root / "runs").glob("*.json"))


def test_measurements_stay_with_what_was_made_of_them(store: Store, tmp_path: Path) -> None:
    for letter in "abc":
        made(store, "signals", letter)
    used, entered, neither = (f"signals-{letter * 12}" for letter in "abc")
    key = "e" * 64
    store.begin("evaluate", key, resume=False)
    store.finish("evaluate", key, {"summary": {}, "measurements": [used]})
    register(store, tmp_path / "run", {"evaluate": f"evaluate-{'e' * 12}", f"{MEASURING}{entered}": entered})
    assert [each.artifact for each in collect(store).removed] == [neither]
    release_measurements(store, tmp_path / "run")
    assert [each.artifact for each in collect(store).removed] == [entered]
    register(store, tmp_path / "run", {"evaluate": f"evaluate-{'f' * 12}"})  # judged anew
    assert {each.artifact for each in collect(store).removed} == {used, f"evaluate-{'e' * 12}"}


def test_work_in_progress_and_partial_work_stay(store: Store) -> None:
    made(store, "select", "a")
    store.begin("observe", "b" * 64, resume=True)
    with store.locked("select", "a" * 64):
        assert collect(store, unfinished=True, dry_run=True).kept == {"in progress": [f"select-{'a' * 12}"]}
        assert collect(store).kept == {
            "in progress": [f"select-{'a' * 12}"],
            "unfinished, can be resumed": [f"observe-{'b' * 12}"],
        }
    (store.root / "samples").mkdir()
    assert {each.artifact for each in collect(store, unfinished=True).removed} == {
        f"observe-{'b' * 12}",
        f"select-{'a' * 12}",
    }
    assert names(store) == {"samples"}


def test_nothing_goes_where_a_run_cannot_be_read(store: Store) -> None:
    made(store, "select", "a")
    damaged = store.root.parent / "one" / "run.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    with pytest.raises(
        UnusableError, match=r"this list of the artifacts that a run uses cannot be read .* Nothing was removed"
    ):
        collect(store)
    assert names(store) == {f"select-{'a' * 12}"}


def test_the_command_says_what_it_frees(store: Store) -> None:
    made(store, "select", "a", 2_000_000)
    done = command("gc", "--store", store.root, "--dry-run")
    assert done.code == 0 and "1 artifact, 2 MB would be freed; kept: none" in done.stdout
    done = command("gc", "--store", store.root, "--json")
    assert done.code == 0
    found = done.json()
    assert (
        [each["artifact"] for each in found["removed"]] == [f"select-{'a' * 12}"]
        and found["bytes"] > 2_000_000
        and not names(store)
    )
    done = command("gc", "--store", store.root / "nowhere")
    assert done.code == 3
    assert "found no artifact store. Give the runtime.store of your recipes with --store." in done.stderr
