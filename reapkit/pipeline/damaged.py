"""Looks at artifacts before a run reads or publishes them; a damaged one is set aside, and so made again. Torch-free.

Of several ranks only rank 0 walks, and so only it looks: the others read what it tells them to.
"""

from __future__ import annotations

from collections import Counter

from reapkit.core.artifact_check import adopt, damage_of
from reapkit.core.artifact_store import Artifact, Damage, Store, damaged_name
from reapkit.core.errors import StageFailed, UnusableError
from reapkit.core.progress import SILENT, Progress
from reapkit.planning.plan import Plan
from reapkit.planning.stage_definitions import Stage
from reapkit.pruning.manifest import sealed_shards

MOST_LOOKS = 3
"""How often one artifact may turn out to be damaged in one run: more says that the disk keeps nothing."""


class SoundPlans:
    """Keeps a run's plan to artifacts that are as they were written; `full`: the first look at each reads every
    byte."""

    def __init__(self, *, full: bool = False, progress: Progress = SILENT):
        self._full, self._progress = full, progress
        self._seen: set[str] = set()
        self._damaged: Counter[str] = Counter()

    def of(self, plan: Plan, until: str | None) -> Plan:
        """The plan itself where all artifacts that the end of stage `until` needs are sound, else one made anew.

        Raises UnusableError where a damaged one cannot be set aside, StageFailed where one is damaged again and again.
        """
        names = plan.leading_to(until)
        changed = [self._changed(plan.store, stage) for stage in plan.stages if stage.name in names]
        return self.of(plan.anew(), until) if any(changed) else plan

    def _changed(self, store: Store, stage: Stage) -> bool:
        """Whether the artifact is another than the plan found: set aside, or its files listed."""
        if stage.key is None:
            return False
        if stage.artifact is not None and stage.artifact.files is None and stage.artifact.has_payload:
            return self._listed(store, stage, stage.key)
        return self.set_aside_damaged(store, stage.name, stage.key)

    def set_aside_damaged(self, store: Store, stage: str, key: str) -> bool:
        """Looks at one artifact, of a stage or a measurement; whether it was damaged, and so is no longer there.

        Raises as `of`.
        """
        name = store.directory(stage, key).name
        full = self._full and name not in self._seen
        self._seen.add(name)
        if damage_of(store, stage, key, full=full, progress=self._progress) is None:
            return False
        try:
            with store.locked(stage, key, lambda: self._wait(stage)):
                damage = damage_of(store, stage, key, full=full, progress=self._progress)
                return self._set_aside(store, stage, key, damage)  # None by now: another process dealt with it
        except OSError as error:
            raise UnusableError(
                f"{store.root / name}: the artifact is damaged, and cannot be set aside ({error.strerror}). Make the"
                " store writable, or choose another runtime.store."
            ) from None

    def _listed(self, store: Store, stage: Stage, key: str) -> bool:
        """An artifact of an earlier reapkit gets the list of its files; in a store that is read-only it has none."""
        try:
            with store.locked(stage.name, key, lambda: self._wait(stage.name)):
                found = store.find(stage.name, key)
                if not isinstance(found, Artifact) or found.files is not None or not found.has_payload:
                    return True
                damage = adopt(found, sealed_shards, self._progress)
                if damage is None:
                    self._progress.say(
                        f"{stage.name}: {found.directory.name} is from an earlier reapkit; its files were hashed, and"
                        " will be checked from now on"
                    )
                return self._set_aside(store, stage.name, key, damage)
        except OSError:
            return False

    def _set_aside(self, store: Store, stage: str, key: str, damage: Damage | None) -> bool:
        if damage is None:
            return True
        directory = store.directory(stage, key)
        kept = damaged_name(directory).name
        self._damaged[directory.name] += 1
        if self._damaged[directory.name] > MOST_LOOKS:
            raise StageFailed(
                f"{directory}: damaged again and again ({damage}), though it was made anew each time. The disk or the"
                " memory of this machine does not keep what is written. Choose another runtime.store, or machine."
            )
        self._progress.warn(
            f"{stage}: {directory.name} is damaged: {damage}. "
            + (f"What does not belong there was moved to {kept}." if damage.extras else f"Kept as {kept}; made again.")
        )
        store.set_aside(directory, damage.extras)
        return not damage.extras

    def _wait(self, stage: str) -> None:
        self._progress.say(f"{stage}: another run is working on this stage; waiting")
