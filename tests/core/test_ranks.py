"""Who is alive on other machines is told by beats: the silent are dead, the slow and those that left are not."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest
from torch.distributed import HashStore

from reapkit.core import ranks
from reapkit.core.ranks import Team
from reapkit.core.shared_keys import Keys

BEAT = 0.1


@pytest.fixture
def teams(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Team]]:
    """Three ranks, each on a machine of its own; none of them is looked up as a process."""
    for name, seconds in (("BEAT_SECONDS", BEAT), ("QUIET_SECONDS", 10 * BEAT)):
        monkeypatch.setattr(ranks, name, seconds)
    monkeypatch.setattr(ranks, "_runs", lambda pid: pytest.fail("a process of another machine was looked up"))
    keys, made = Keys(HashStore()), []
    for rank in range(3):
        for name, value in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1), ("GROUP_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        made.append(Team(keys, rank, 3))
    yield made
    for team in made:
        team.leave()


def test_only_the_silent_are_dead(teams: list[Team]) -> None:
    assert teams[0]._dead([1, 2], quickly=True) == []
    teams[1]._stop.set()  # its machine is gone
    began = time.monotonic()
    assert teams[0]._dead([1, 2], quickly=True) == [1]
    assert time.monotonic() - began > 5 * BEAT
    assert teams[0]._dead([1, 2]) == [], "a minute has not passed"


def test_who_never_looked_before_waits_as_well(teams: list[Team]) -> None:
    teams[0]._stop.set()
    time.sleep(3 * BEAT)
    assert teams[2]._dead([0, 1], quickly=True) == [0]


def test_who_left_is_not_dead(teams: list[Team]) -> None:
    teams[1].leave()
    assert teams[0]._dead([1], quickly=True) == []


def test_nobody_watches_any_more_once_a_rank_has_ended(teams: list[Team], monkeypatch: pytest.MonkeyPatch) -> None:
    inside, put = threading.Event(), teams[1].keys.put

    def slow(key: str, value: object) -> None:
        if threading.current_thread() is teams[1]._watcher:
            inside.set()
            time.sleep(5 * BEAT)
        put(key, value)

    monkeypatch.setattr(teams[1].keys, "put", slow)
    assert inside.wait(100 * BEAT)
    teams[1].leave()
    assert not teams[1]._watcher.is_alive()
    for rank in (2, 1):
        teams[0].keys.put(f"left/{rank}", True)
    teams[0].conclude(0)
    assert not teams[0]._watcher.is_alive()


def test_a_minute_without_a_beat_ends_the_run_of_rank_0(teams: list[Team], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = threading.Event()
    monkeypatch.setattr(signal, "pthread_kill", lambda thread, number: interrupted.set())
    teams[2]._stop.set()
    assert teams[0]._dead([2]) == [] and not interrupted.wait(2 * BEAT)
    monkeypatch.setattr(ranks, "STALE_SECONDS", 4 * BEAT)
    assert interrupted.wait(100 * BEAT)
    assert "rank 2 (" in str(teams[0].cause()) and "stopped without an error message" in str(teams[0].cause())


def test_a_failure_is_told_with_its_code_and_an_interrupt_only_where_nothing_else_happened(teams: list[Team]) -> None:
    teams[2].fail(ranks.INTERRUPTED, "")
    teams[1].fail(4, "ran out of memory.")
    found = teams[0].cause()
    assert found.exit_code == 4 and "rank 1 (" in str(found) and str(found).endswith("ran out of memory.")
