"""Locks between processes: the kernel's where the file system has them, else a file that its holder keeps fresh.
Torch-free.

    NAME.lock           locked by flock
    NAME.lock.held      on file systems without flock: there while somebody holds the lock, and who that is
    NAME.lock.breaking  there while somebody removes the lock of a process that is gone

A holder on this machine is gone when its process is. One elsewhere renews its file every few seconds, and is gone when
that has stopped for minutes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import IO
from uuid import uuid4

NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
"""What file systems without locks answer."""
BEAT_SECONDS = 10.0
STALE_SECONDS = 180.0
"""Without a beat; network file systems show a new time up to a minute late."""
LOOK_SECONDS = 0.5


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Generator[None]:
    """Holds the lock at `path` for the block; `waiting()` is called once if another process has it.

    Raises OSError where `path` cannot be written.
    """
    with _attempt(path) as holding:
        if holding:
            yield
            return
    if waiting:
        waiting()
    with _attempt(path, patiently=True):
        yield


@contextmanager
def unless_held(path: Path) -> Generator[bool]:
    """True, and then locked for the block; False at once where another process has the lock."""
    with _attempt(path) as holding:
        yield holding


@contextmanager
def _attempt(path: Path, patiently: bool = False) -> Generator[bool]:
    with path.open("a") as file:
        by_kernel = _flock(file, patiently)
        if by_kernel is not None:
            yield by_kernel
            return
    with _HeldFile(Path(f"{path}.held"), Path(f"{path}.breaking")).holding(patiently) as holding:
        yield holding


def _flock(file: IO[str], patiently: bool) -> bool | None:
    """Whether the kernel gave the lock, which ends with the file; None where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if patiently else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_FLOCK:
            return None
        raise
    return True


@dataclass(frozen=True)
class _Holder:
    """Who holds a lock: a process of one machine, and the time that this machine started it at."""

    machine: str
    pid: int
    started: str
    token: str

    @classmethod
    def me(cls) -> _Holder:
        return cls(_machine(), os.getpid(), _started(os.getpid()) or "", uuid4().hex)

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended; False where it may run on another machine."""
        return self.machine == _machine() and _started(self.pid) != self.started


_State = tuple[_Holder | None, int, int] | None
"""Of a held file: who holds it, its inode and the time of its last beat; None where there is none."""


@dataclass(eq=False)
class _HeldFile:
    """A lock that is a file: whoever creates it has the lock. `guard` is held while a stale one is removed."""

    path: Path
    guard: Path | None = None
    _seen: tuple[_State, float] | None = field(default=None, init=False)

    @contextmanager
    def holding(self, patiently: bool = False) -> Generator[bool]:
        me = _Holder.me()
        while not self._create(me):
            if not self._break() and not patiently:
                yield False
                return
            time.sleep(LOOK_SECONDS if patiently else 0)
        done = threading.Event()
        threading.Thread(target=self._beat, args=(me, done), daemon=True, name="lock").start()
        try:
            yield True
        finally:
            done.set()
            if self._holder() == me:
                self.path.unlink(missing_ok=True)

    def _create(self, me: _Holder) -> bool:
        try:
            file = self.path.open("x", encoding="utf-8")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(json.dumps(asdict(me)))
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _beat(self, me: _Holder, done: threading.Event) -> None:
        while not done.wait(BEAT_SECONDS) and self._holder() == me:
            with suppress(OSError):
                os.utime(self.path)

    def _holder(self) -> _Holder | None:
        """None for a file that is gone, or not written yet."""
        try:
            return _Holder(**json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _state(self) -> _State:
        try:
            facts = self.path.stat()
        except OSError:
            return None
        return self._holder(), facts.st_ino, facts.st_mtime_ns

    def _is_stale(self, state: _State) -> bool:
        if state is None:
            return False
        if state[0] is not None and state[0].machine == _machine():
            return state[0].is_gone
        if self._seen is None or self._seen[0] != state:
            self._seen = (state, time.monotonic())
        return time.monotonic() - self._seen[1] > STALE_SECONDS

    def _break(self) -> bool:
        """Whether the file is gone, or its holder was and it went with him.

        One process at a time removes it, and looks again first: what goes is never a file that was created since.
        """
        state = self._state()
        if state is None:
            return True
        if not self._is_stale(state):
            return False
        if self.guard is None:
            self._remove(state)
            return True
        with _HeldFile(self.guard).holding() as alone:
            if alone:
                self._remove(state)
            return alone

    def _remove(self, judged: _State) -> None:
        if self._state() == judged:
            self.path.unlink(missing_ok=True)


@cache
def _machine() -> str:
    """What tells process numbers apart: the host, its last start, and the namespace that numbers processes."""
    parts = [socket.gethostname()]
    try:
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:  # not Linux
        parts.append(str(os.getuid()))
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When the process of this machine started, "" where that is not known, None where there is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return None if after_name[0] == "Z" else after_name[19]
