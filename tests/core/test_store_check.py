"""A whole store is read: what is damaged is named and set aside, what nobody can judge now is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from reapkit.core.artifact_store import Artifact, Damage, Store
from reapkit.core.errors import UnusableError
from reapkit.core.store_check import check_store
from tests.support.artifacts import KEY, finished, without_list
from tests.support.damage import flip, flip_unseen

LARGE = bytes(2 << 20)


def sealed(payload: Path) -> dict[str, str] | Damage:
    return {}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def made(store: Store, *stages: str) -> list[Artifact]:
    return [finished(store, stage, {"large": LARGE, "small": b"1"}) for stage in stages]


def test_every_byte_is_read(store: Store) -> None:
    select, prune = made(store, "select", "prune")
    found = check_store(store, sealed)
    assert (found.sound, found.nbytes, found.damaged, found.not_read) == (2, 2 * (len(LARGE) + 1), [], {})
    flip_unseen(prune.payload / "large")
    for dry_run in (True, False):
        found = check_store(store, sealed, dry_run=dry_run)
        assert found.sound == 1
        [damaged] = found.damaged
        assert damaged.artifact == prune.directory.name and damaged.damage.startswith("payload/large has other bytes")
        assert damaged.kept_as == f"{prune.directory.name}.damaged-1"
        assert prune.directory.exists() == dry_run
    found = check_store(store, sealed)
    assert found.sound == 1 and found.damaged == [] and found.not_read == {"damaged, set aside": [damaged.kept_as]}
    assert store.get("select", KEY) == select


def test_damaged_manifests_and_exchanged_artifacts_are_found(store: Store) -> None:
    select, prune = made(store, "select", "prune")
    flip(select.directory / "manifest.json")
    prune.directory.rename(store.directory("quantize", KEY))
    assert [(each.artifact, each.damage) for each in check_store(store, sealed).damaged] == [
        (store.directory("quantize", KEY).name, f"manifest.json is that of prune-{KEY[:12]}"),
        (select.directory.name, "manifest.json cannot be used (its bytes are not those that were written)"),
    ]
    assert list(store.artifacts()) == []


def test_only_what_does_not_belong_is_moved(store: Store) -> None:
    [prune] = made(store, "prune")
    (prune.payload / "extra").touch()
    found = check_store(store, sealed)
    assert [each.damage for each in found.damaged] == ["payload/extra was not written by the stage"]
    assert check_store(store, sealed).sound == 1


def test_unfinished_dropped_and_busy_artifacts_are_left_alone(store: Store) -> None:
    observe, prune = made(store, "observe", "prune")
    prune.drop_payload()
    (store.begin("select", KEY, resume=True) / "half").touch()
    flip(observe.payload / "small")
    with store.locked("observe", KEY):
        found = check_store(store, sealed)
    assert (
        found.sound == 0
        and found.damaged == []
        and found.not_read
        == {
            "in progress": [observe.directory.name],
            "its files were dropped": [prune.directory.name],
            "unfinished, can be resumed": [store.directory("select", KEY).name],
        }
    )
    assert (store.directory("select", KEY) / "payload/half").exists()


def test_earlier_artifacts_are_listed(store: Store) -> None:
    select, prune = made(store, "select", "prune")
    without_list(select)
    without_list(prune)
    assert check_store(store, sealed, dry_run=True).sound == 2 and store.get("select", KEY).files is None
    wrong = Damage("payload/reapkit.json", "is missing or cannot be read")
    found = check_store(store, lambda payload: wrong if "prune" in payload.parent.name else {})
    assert found.sound == 1 and [each.damage for each in found.damaged] == [str(wrong)]
    assert set(store.get("select", KEY).files) == {"large", "small"}


def test_there_must_be_a_store(tmp_path: Path) -> None:
    with pytest.raises(UnusableError, match=r"nowhere: found no artifact store\. Give the runtime\.store"):
        check_store(Store(tmp_path / "nowhere"), sealed)
