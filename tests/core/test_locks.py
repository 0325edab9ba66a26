"""Locks exclude, also on file systems without flock, and end with the process that held them."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from reapkit.core import locks
from reapkit.core.locks import locked, unless_held

SPAWN = multiprocessing.get_context("spawn")
HOLD = (
    "import fcntl, sys, time; from pathlib import Path; from reapkit.core import locks\n"
    "def refuse(*_): raise OSError({errno}, 'no locks here')\n"
    "fcntl.flock = refuse; locks.BEAT_SECONDS = 0.1\n"
    "with locks.locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


@pytest.fixture(params=["flock", "ENOLCK", "ENOTSUP", "ENOSYS"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    without_flock(request.param, monkeypatch)
    return request.param


def without_flock(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOOK_SECONDS", 0.02)
    if kind != "flock":
        monkeypatch.setattr(fcntl, "flock", lambda *_: refuse(getattr(errno, kind)))


def refuse(number: int) -> None:
    raise OSError(number, os.strerror(number))


def count_up(path: Path, times: int, kind: str) -> None:
    without_flock(kind, pytest.MonkeyPatch())
    for _ in range(times):
        with locked(path / "lock"):
            number = int((path / "number").read_text())
            time.sleep(0.001)
            (path / "number").write_text(str(number + 1))


@contextmanager
def another_holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    code = HOLD.format(errno=errno.ENOLCK)
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_one_process_at_a_time(tmp_path: Path, kind: str) -> None:
    (tmp_path / "number").write_text("0")
    processes = [SPAWN.Process(target=count_up, args=(tmp_path, 20, kind)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert (tmp_path / "number").read_text() == "60" and {process.exitcode for process in processes} == {0}
    assert sorted(os.listdir(tmp_path)) == ["lock", "number"]


def test_whoever_waits_is_told_once(tmp_path: Path, kind: str) -> None:
    told: list[str] = []
    with locked(tmp_path / "lock", lambda: told.append("first")), unless_held(tmp_path / "lock") as free:
        assert not free and not told
    with locked(tmp_path / "lock"):
        process = SPAWN.Process(target=write_what_was_told, args=(tmp_path, kind))
        process.start()
        wait_for(tmp_path / "told")
    process.join(60)
    assert (tmp_path / "told").read_text() == "waiting, held"
    with unless_held(tmp_path / "lock") as free:
        assert free


def write_what_was_told(path: Path, kind: str) -> None:
    without_flock(kind, pytest.MonkeyPatch())
    with locked(path / "lock", lambda: (path / "told").write_text("waiting")):
        (path / "told").write_text((path / "told").read_text() + ", held")


def wait_for(file: Path) -> None:
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end, f"{file} did not appear"
        time.sleep(0.01)


def test_a_failure_inside_ends_the_lock(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match="inside"), locked(tmp_path / "lock"):
        raise ValueError("inside")
    assert os.listdir(tmp_path) == ["lock"]
    with unless_held(tmp_path / "lock") as free:
        assert free


def test_what_a_killed_process_held_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock("ENOLCK", monkeypatch)
    with another_holder(tmp_path / "lock") as holder:
        with unless_held(tmp_path / "lock") as free:
            assert not free
        holder.send_signal(signal.SIGSTOP)  # stopped is not gone, however long no beat comes
        monkeypatch.setattr(locks, "STALE_SECONDS", 0.0)
        with unless_held(tmp_path / "lock") as free:
            assert not free
        holder.kill()
        holder.wait()
        with locked(tmp_path / "lock"):
            assert sorted(os.listdir(tmp_path)) == ["lock", "lock.held"]


def test_a_process_that_got_the_number_of_a_dead_one_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_flock("ENOLCK", monkeypatch)
    held = tmp_path / "lock.held"
    with locked(tmp_path / "lock"):
        told: dict[str, Any] = json.loads(held.read_text())
    held.write_text(json.dumps(told | {"started": "1"}))
    with unless_held(tmp_path / "lock") as free:
        assert free


def test_a_holder_on_another_machine_is_gone_once_its_beats_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_flock("ENOLCK", monkeypatch)
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.5)
    elsewhere = SPAWN.Process(target=hold_elsewhere, args=(tmp_path / "lock", 1.2))
    elsewhere.start()
    wait_for(tmp_path / "lock.held")
    started = time.monotonic()
    with locked(tmp_path / "lock"):
        waited = time.monotonic() - started
    elsewhere.join(60)
    assert waited > 1.2, "beats kept it"
    assert sorted(os.listdir(tmp_path)) == ["lock"]


def hold_elsewhere(path: Path, seconds: float) -> None:
    """Beats for so long, then ends without letting go."""
    monkeypatch = pytest.MonkeyPatch()
    without_flock("ENOLCK", monkeypatch)
    monkeypatch.setattr(locks, "_machine", lambda: "another machine")
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.1)
    with locked(path):
        time.sleep(seconds)
        os._exit(0)


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1}', "[]"])
def test_a_file_that_names_no_holder_is_broken_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    without_flock("ENOLCK", monkeypatch)
    (tmp_path / "lock.held").write_text(content)
    with unless_held(tmp_path / "lock") as free:
        assert not free
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.1)
    with locked(tmp_path / "lock"):
        pass
    assert os.listdir(tmp_path) == ["lock"]


def test_what_was_created_since_is_not_broken(tmp_path: Path) -> None:
    held = locks._HeldFile(tmp_path / "lock.held", tmp_path / "lock.breaking")
    held.path.write_text("old")
    judged = held._state()
    held.path.unlink()
    held.path.write_text("new, of somebody else")
    held._remove(judged)
    assert held.path.read_text() == "new, of somebody else"


def test_other_refusals_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / "lock"):
        pass
    with pytest.raises(NotADirectoryError), locked(tmp_path / "lock" / "below"):
        pass
