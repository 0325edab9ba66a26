"""Keeps every measurement as an artifact of its own: found by what it measures, checked before it is used, made under
its lock. Torch-free."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from reapkit.core.artifact_store import Artifact, Store
from reapkit.core.formatting import plural
from reapkit.core.garbage_collection import MEASURING, register
from reapkit.core.measurements import Measure, Measurements
from reapkit.core.progress import Progress
from reapkit.pipeline.damaged import SoundPlans
from reapkit.planning.lock import versions

T = TypeVar("T")


class KeptMeasurements(Measurements):
    """The measurements that one execution of a stage uses, in the store of its plan.

    Each is entered for the run in directory `run` before it is relied on; the stage's manifest names those that it was
    made of (`used`), so that they stay as long as it does. Nobody waits for a lock of signals or continuations while
    he holds one of hidden states: where both are held, those of the hidden states are taken last.
    """

    keeps = True

    def __init__(self, store: Store, run: Path, sound: SoundPlans, progress: Progress):
        self._store, self._run, self._sound, self._progress = store, run, sound, progress
        self.used: set[str] = set()
        self.made: list[str] = []
        self._making: set[str] = set()

    def __str__(self) -> str:
        """How much of what was used is new."""
        there = len(self.used) - len(self.made)
        if not self.made:
            return f"nothing was measured: {plural(there, 'measurement')} were there"
        return f"{plural(len(self.made), 'measurement')} made, {there} were there"

    def find(self, measure: Measure, load: Callable[[Path], T]) -> T | None:
        found = self._found(measure)
        return None if found is None else load(found.payload)

    def get(
        self,
        measure: Measure,
        make: Callable[[Path | None], T],
        save: Callable[[T, Path], None],
        load: Callable[[Path], T],
    ) -> T:
        found = self._found(measure)
        if found is None:
            with (
                self._not_within_itself(measure),
                self._store.locked(measure.kind, measure.key, lambda: self._wait(measure)),
            ):
                found = self._there(measure) or self._made(measure, make, save)  # by whoever held the lock
        return load(found.payload)

    @contextmanager
    def _not_within_itself(self, measure: Measure) -> Generator[None]:
        """A measure that is made of itself would wait for its own lock without end."""
        assert measure.key not in self._making, f"{measure.title} is measured while it is being measured"
        self._making.add(measure.key)
        try:
            yield
        finally:
            self._making.discard(measure.key)

    def _found(self, measure: Measure) -> Artifact | None:
        name = self._store.directory(measure.kind, measure.key).name
        if name not in self.used:
            register(self._store, self._run, {f"{MEASURING}{name}": name})
            self._sound.set_aside_damaged(self._store, measure.kind, measure.key)
        return self._there(measure)

    def _there(self, measure: Measure) -> Artifact | None:
        found = self._store.get(measure.kind, measure.key)
        if found is None or not found.has_payload:
            return None
        self.used.add(found.directory.name)
        return found

    def _made(self, measure: Measure, make: Callable[[Path | None], T], save: Callable[[T, Path], None]) -> Artifact:
        started = time.time()
        payload = self._store.begin(measure.kind, measure.key, resume=False)
        work = payload.parent / "work"
        work.mkdir(exist_ok=True)
        save(make(work), payload)
        facts = {
            "spec": measure.spec,
            "inputs": {},
            "summary": {"title": measure.title},
            "seconds": round(time.time() - started, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": versions(),
            "warnings": [],
        }
        made = self._store.finish(measure.kind, measure.key, facts, progress=self._progress)
        shutil.rmtree(work, ignore_errors=True)
        self.used.add(made.directory.name)
        self.made.append(measure.title)
        return made

    def _wait(self, measure: Measure) -> None:
        self._progress.say(f"{measure.title}: another run is measuring this; waiting")
