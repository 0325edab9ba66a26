"""What a run published is known again by content, wherever it was copied to; what was changed is told."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from reapkit.core.as_written import require_as_written
from reapkit.core.errors import UnusableError
from reapkit.core.run_record import RECORD, changed_file, read_record
from tests.support.damage import append, delete, flip, flip_unseen, truncate

LARGE = bytes(range(256)) * 5000


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory with a selection and a trace, both in its record."""
    root, record = tmp_path / "run", {}
    for name, content in (("selection/selection.json", b"{}"), ("observation/trace.safetensors", LARGE)):
        file = root / name
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        facts = {"size": len(content), "mtime_ns": file.stat().st_mtime_ns}
        record[name] = {"source": "", **facts, "sha256": hashlib.sha256(content).hexdigest()}
    (root / RECORD).write_text(json.dumps({"format": 1, "files": record}))
    return root


CHANGES = {
    flip: "has other bytes than were written (sha256 ",
    flip_unseen: "has other bytes than were written (sha256 ",
    truncate: "has 1 bytes, 2 were written",
    append: "has 3 bytes, 2 were written",
    delete: "is missing",
}


@pytest.mark.parametrize("damage", CHANGES, ids=lambda each: each.__name__)
def test_a_changed_file_is_told(run: Path, damage: object) -> None:
    assert changed_file(run) is None and changed_file(run, full=True) is None
    damage(run / "selection/selection.json")
    assert changed_file(run).startswith(f"selection/selection.json {CHANGES[damage]}")
    assert changed_file(run, "selection") == changed_file(run) and changed_file(run, "observation") is None


def test_a_large_file_is_read_where_its_time_is_another(run: Path) -> None:
    trace = run / "observation/trace.safetensors"
    flip_unseen(trace)
    assert changed_file(run) is None and changed_file(run, full=True).startswith("observation/trace.safetensors has")
    trace.touch()
    assert changed_file(run).startswith("observation/trace.safetensors has other bytes")


def test_a_copy_is_what_it_was_copied_from(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy", copy_function=shutil.copyfile)
    assert changed_file(tmp_path / "copy") is None
    require_as_written(tmp_path / "copy/observation")


def test_a_record_without_hashes_is_one_of_sizes_and_times(run: Path) -> None:
    record = json.loads((run / RECORD).read_text())
    for facts in record["files"].values():
        del facts["sha256"]
    (run / RECORD).write_text(json.dumps(record))
    assert changed_file(run, full=True) is None
    (run / "selection/selection.json").touch()
    assert changed_file(run) == "selection/selection.json was changed after it was written"


def test_what_the_user_put_beside_it_is_the_users(run: Path, tmp_path: Path) -> None:
    (run / "selection/notes.txt").write_text("mine")
    require_as_written(run)
    require_as_written(tmp_path)
    flip(run / "selection/selection.json")
    require_as_written(run / "observation")
    with pytest.raises(UnusableError, match=r"run: selection/selection\.json has other bytes than were written"):
        require_as_written(run / "selection/selection.json")


@pytest.mark.parametrize(
    "facts",
    [
        [],
        {"source": "", "size": 1},
        {"source": "", "size": "1", "mtime_ns": 1},
        {"source": "", "size": True, "mtime_ns": 1},
        {"source": 1, "size": 1, "mtime_ns": 1},
        {"source": "", "size": 1, "mtime_ns": 1, "sha256": None},
        {"source": "", "size": 10**60, "mtime_ns": 1},
        {"source": "", "size": float("nan"), "mtime_ns": 1},
    ],
    ids=str,
)
def test_a_hostile_record_is_refused(run: Path, facts: object) -> None:
    (run / RECORD).write_text(json.dumps({"files": {"a": facts}}))
    with pytest.raises(UnusableError, match="the record of what runs wrote there cannot be read"):
        read_record(run)
