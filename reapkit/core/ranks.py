"""Coordinates the processes of one run under torchrun: rank 0 runs the recipe, the other ranks help when asked, and all
end with the same exit code. Torch-free until they join.

What ranks compute goes through files that they all see. torchrun's own key-value store carries the rest: who does what,
who is alive, how it ended. Nobody waits inside a collective of torch.distributed: it would time out while rank 0 works
alone for hours, and Python hears no signal in it. torchrun's agent ends the ranks of a machine where one died; who it
was, one message, one exit code and the other machines are left to us.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from reapkit.core.errors import ReapkitError, RecipeError, RejectedByGates, StageFailed, UnusableError
from reapkit.core.shared_keys import Keys, LostContact, torchrun_keys

BEAT_SECONDS = 2.0
STALE_SECONDS = 60.0  # of another machine's rank without a beat; on this machine its process is looked up
QUIET_SECONDS = 3 * BEAT_SECONDS  # the same where something is known to have ended
SEEING_SECONDS = 60.0  # network file systems show a new file late, up to the time that they keep attributes
LEAVING_SECONDS = 25.0  # torchrun kills what has not ended 30 s after its SIGTERM
INTERRUPTED = 130


class Alone:
    """A run of one process: everything is its own work, and nobody is waited for."""

    rank, world, local_rank, local_world = 0, 1, 0, 1

    def begin(self, job: dict[str, Any]) -> None:
        """Asks the other ranks to help with `job`."""

    def share(self, directory: Path) -> None:
        """Makes sure that all ranks see `directory`. Raises UnusableError naming the machine that does not."""

    def agreed(self, name: str, make: Callable[[], Any]) -> Any:
        """Rank 0's `make()`, on every rank; a JSON value."""
        return make()

    def same(self, name: str, facts: dict[str, Any]) -> None:
        """Raises UnusableError where a rank's `facts` are not rank 0's."""

    def claims(self, name: str, count: int) -> Iterator[int]:
        """Each of 0 … count - 1 for exactly one rank, whoever comes first."""
        return iter(range(count))

    def add(self, name: str, amount: int) -> int:
        """The sum of what all ranks added so far."""
        return amount

    def meet(self, name: str, directory: Path | None = None, waiting: Callable[[], None] = lambda: None) -> None:
        """Returns once all ranks came here; then what they wrote to `directory` can be seen. `waiting()` is called
        meanwhile."""


class Team(Alone):
    """This process among those that torchrun started; `join()` makes it."""

    def __init__(self, keys: Keys, rank: int, world: int):
        self.keys, self.rank, self.world = keys, rank, world
        self.local_rank, self.local_world, self.node = (
            int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        )
        self.trouble: ReapkitError | None = None
        self._job, self._helping = 0, False
        self._heard_at: dict[int, tuple[int, float]] = {}
        self._main, self._stop = threading.get_ident(), threading.Event()
        self.keys.put(f"who/{rank}", {"host": socket.gethostname(), "node": self.node, "pid": os.getpid()})
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watcher.start()

    # ------------------------------------------------------------------------------------------ working together

    def begin(self, job: dict[str, Any]) -> None:
        self._job += 1
        self.keys.put(f"job/{self._job}", job)

    def jobs(self) -> Iterator[dict[str, Any]]:
        """What rank 0 asks for, until it ends the run."""
        while self.outcome() is None:
            if self.keys.has(f"job/{self._job + 1}"):
                self._job += 1
                job = self.keys.get(f"job/{self._job}")
                if "see" in job:
                    self._see(Path(job["see"]))
                else:
                    self._helping = True
                    yield job
                    self._helping = False
            else:
                time.sleep(0.2)

    def share(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        file = directory.resolve() / f".ranks-{uuid4().hex}"
        file.write_text("")
        try:
            self.begin({"see": str(file)})
            self.meet("seen")
        finally:
            file.unlink(missing_ok=True)

    def _see(self, file: Path) -> None:
        deadline = time.monotonic() + SEEING_SECONDS
        while not _listed(file):
            if time.monotonic() > deadline:
                raise UnusableError(
                    f"runtime.store: {self._name(self.rank)} does not see the same {file.parent} as {self._name(0)}."
                    " Ranks share their work through this directory. Put it on a file system that all nodes mount at"
                    " the same path (--set runtime.store=DIR)."
                )
            time.sleep(0.5)
        self.meet("seen")

    def agreed(self, name: str, make: Callable[[], Any]) -> Any:
        key = f"{self._job}/agreed/{name}"
        if self.rank == 0:
            self.keys.put(key, make())
        self._wait([key])
        return self.keys.get(key)

    def same(self, name: str, facts: dict[str, Any]) -> None:
        theirs, mine = self.agreed(name, lambda: facts), json.loads(json.dumps(facts))
        if different := [key for key in theirs if theirs[key] != mine.get(key)]:
            found = ", ".join(f"{key} {mine.get(key)} instead of {theirs[key]}" for key in different)
            raise UnusableError(
                f"{self._name(self.rank)} differs from {self._name(0)}: {found}. Results would depend on which rank"
                " computed them. Give all ranks the same devices and the same environment."
            )

    def claims(self, name: str, count: int) -> Iterator[int]:
        while (number := self.keys.add(f"{self._job}/claims/{name}", 1) - 1) < count:
            yield number

    def add(self, name: str, amount: int) -> int:
        return self.keys.add(f"{self._job}/sum/{name}", amount)

    def meet(self, name: str, directory: Path | None = None, waiting: Callable[[], None] = lambda: None) -> None:
        self.keys.put(f"{self._job}/met/{name}/{self.rank}", True)
        self._wait([f"{self._job}/met/{name}/{rank}" for rank in range(self.world)], waiting)
        if directory is not None:
            os.listdir(directory)  # a network file system forgets what it believed to be missing

    def _wait(self, keys: list[str], waiting: Callable[[], None] = lambda: None) -> None:
        pause = 0.005
        while not self.keys.has(*keys):
            waiting()
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)

    # ------------------------------------------------------------------------------------------ ending together

    def conclude(self, code: int) -> None:
        """Rank 0: ends the run with `code` on every rank, and waits until those that are alive have heard it."""
        try:
            self.keys.put("outcome", code)
            deadline = time.monotonic() + LEAVING_SECONDS
            others = list(range(1, self.world))
            while others and time.monotonic() < deadline:
                dead = self._dead(others)
                others = [rank for rank in others if not self.keys.has(f"left/{rank}") and rank not in dead]
                time.sleep(0.05)
        except LostContact:
            pass  # the keys are gone with torchrun: nobody is left to hear it
        self._stop_watching()

    def leave(self) -> None:
        """Other ranks: the last word before the process ends."""
        self._stop_watching()
        with suppress(LostContact):
            self.keys.put(f"left/{self.rank}", True)

    def outcome(self) -> int | None:
        """The code that rank 0 ended the run with, if it did."""
        return self.keys.get("outcome") if self.keys.has("outcome") else None

    def fail(self, code: int, text: str) -> None:
        """Other ranks: tells rank 0 why this one cannot go on."""
        with suppress(LostContact):
            self.keys.put(
                f"failed/{self.rank}", {"code": code, "text": f"{self._name(self.rank)}: {text}" if text else ""}
            )

    def heard(self) -> int | None:
        """Other ranks: rank 0's last word, which comes soon; None, with `trouble` set, where it cannot come any
        more."""
        deadline = time.monotonic() + LEAVING_SECONDS
        try:
            while time.monotonic() < deadline:
                if (code := self.outcome()) is not None:
                    return code
                if self._dead([0], quickly=True) and self.outcome() is None:
                    self.trouble = self._died(0)
                    return None
                time.sleep(0.1)
        except LostContact:
            self.trouble = LostContact()
        return None

    def cause(self) -> ReapkitError | None:
        """Rank 0: what interrupted it, if that was another rank's failure or death; None where it was the user."""
        if self.trouble is None:
            try:
                self.trouble = self._look(quickly=True)
            except LostContact:
                self.trouble = LostContact()
        return self.trouble

    def speaks(self) -> bool:
        """Whether this rank tells the user: the first that is alive."""
        try:
            return len(self._dead(range(self.rank), quickly=True)) == self.rank
        except LostContact:
            return self.rank == 0 or self.local_rank == 0

    # ------------------------------------------------------------------------------------------ who is alive

    def _watch(self) -> None:
        """Beats, and interrupts the main thread once going on has become pointless."""
        beats, ends = 0, 0
        while not self._stop.wait(BEAT_SECONDS):
            beats += 1
            try:
                self.keys.put(f"beat/{self.rank}", beats)
                ended = self.rank > 0 and self.outcome() is not None
                ends += ended and self._helping  # twice in a row: who has done its share leaves by itself
                found = None if ended else self._look()
            except LostContact:
                found = LostContact()
            if self._stop.is_set():
                return
            if found or ends > 1:
                self.trouble = found
                signal.pthread_kill(self._main, signal.SIGTERM)
                return

    def _stop_watching(self) -> None:
        """A thread that is inside the store's client when Python ends would take the process down with SIGABRT."""
        self._stop.set()
        self._watcher.join(LEAVING_SECONDS / 2)

    def _look(self, quickly: bool = False) -> ReapkitError | None:
        others = list(range(1, self.world)) if self.rank == 0 else [0]
        failures = [self.keys.get(f"failed/{rank}") for rank in others if self.keys.has(f"failed/{rank}")]
        failures.sort(key=lambda failure: failure["code"] == INTERRUPTED)
        if failures and failures[0]["code"] != INTERRUPTED:
            return _error(**failures[0])
        dead = self._dead(others, quickly or bool(failures))  # torchrun interrupts the living when one died
        return self._died(dead[0]) if dead else _error(**failures[0]) if failures else None

    def _dead(self, ranks: Sequence[int], quickly: bool = False) -> list[int]:
        """By their process on this machine, elsewhere by their beats: none for a minute, or, `quickly`, for three
        beats, which are waited for."""
        who = {rank: self.keys.get(f"who/{rank}") for rank in ranks if self.keys.has(f"who/{rank}")}
        who = {rank: facts for rank, facts in who.items() if not self.keys.has(f"left/{rank}")}
        near = [rank for rank in who if who[rank]["node"] == self.node]
        gone = [rank for rank in near if not _runs(who[rank]["pid"])]
        heard = {rank: self._last_beat(rank) for rank in who if rank not in near}
        asked, limit = time.monotonic(), QUIET_SECONDS if quickly else STALE_SECONDS
        while quickly and any(last <= asked and time.monotonic() - last <= limit for last in heard.values()):
            time.sleep(0.2)
            heard = {rank: self._last_beat(rank) for rank in heard if not self.keys.has(f"left/{rank}")}
        return gone + [rank for rank, last in heard.items() if time.monotonic() - last > limit]

    def _last_beat(self, rank: int) -> float:
        """When a beat of that rank was last new to this one; now, where it never asked before."""
        beat = self.keys.get(f"beat/{rank}") if self.keys.has(f"beat/{rank}") else 0
        if self._heard_at.get(rank, (None,))[0] != beat:
            self._heard_at[rank] = (beat, time.monotonic())
        return self._heard_at[rank][1]

    def _died(self, rank: int) -> StageFailed:
        return StageFailed(
            f"{self._name(rank)} stopped without an error message (killed, out of memory, or its machine failed), so"
            " the run ends. Finished work is kept; run the same command again to resume, with any number of ranks."
        )

    def _name(self, rank: int) -> str:
        who = self.keys.get(f"who/{rank}") if self.keys.has(f"who/{rank}") else None
        return f"rank {rank}" + (f" ({who['host']}, process {who['pid']})" if who else "")


ALONE = Alone()
_joined: Alone = ALONE


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def join() -> Team:
    """The ranks that torchrun started together; from now on `current()` on this process."""
    global _joined
    keys, rank, world = torchrun_keys()
    _joined = Team(keys, rank, world)
    return _joined


def current() -> Alone:
    """The joined team, or `ALONE`."""
    return _joined


def _error(code: int, text: str) -> ReapkitError:
    """Another rank's failure, raised here with its exit code."""
    kinds = {kind.exit_code: kind for kind in (RecipeError, UnusableError, StageFailed, RejectedByGates)}
    error = kinds.get(code, ReapkitError)(text)
    error.exit_code = code
    return error


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _listed(file: Path) -> bool:
    try:
        return file.name in os.listdir(
            file.parent
        )  # listing asks the server anew where a look-up may be answered from memory
    except OSError:
        return False
