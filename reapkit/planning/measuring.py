"""What a stage that runs would measure, and what of it was measured before. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reapkit.core.artifact_check import glance
from reapkit.core.artifact_store import Artifact, Store
from reapkit.core.errors import UnusableError
from reapkit.core.formatting import plural
from reapkit.core.measurements import Measure

if TYPE_CHECKING:
    from reapkit.planning.plan import Plan
    from reapkit.planning.stage_definitions import Stage

SHOWN = 3
"""Names of what is measured that are said; the others are counted."""


@dataclass(frozen=True)
class Measuring:
    """Of all that a stage measures at most: what was measured before, and what was not."""

    there: tuple[Measure, ...]
    missing: tuple[Measure, ...]

    def __str__(self) -> str:
        if not self.missing:
            return "nothing is measured: it is judged again from what was measured"
        names = list(dict.fromkeys(measure.title for measure in self.missing))
        said = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        return f"measures at most {said}; {plural(len(self.there), 'measurement')} are there"


def measuring(plan: Plan, stage: Stage) -> Measuring | None:
    """None for a stage that does not run, that keeps no measurements, or whose inputs are not there yet."""
    inputs = {name: plan.stage(name) for name in stage.inputs}
    found = {name: each.artifact for name, each in inputs.items() if each.hit and each.artifact is not None}
    if not stage.must_run or len(found) < len(inputs) or not all(each.has_payload for each in found.values()):
        return None
    try:
        measures = stage.definition.measures(plan, found)
    except UnusableError:  # of inputs that are damaged: the run will say so
        return None
    there = tuple(measure for measure in measures if _is_there(plan.store, measure))
    missing = tuple(measure for measure in measures if measure not in there)
    return Measuring(there, missing) if measures else None


def reason(plan: Plan, stage: Stage) -> str:
    """Why a stage runs, or does not, and what is left to measure where some was measured before."""
    found = measuring(plan, stage)
    if found is None or not found.there:
        return stage.reason
    after = stage.definition.afterwards(plan)
    return "; ".join(filter(None, (stage.reason, str(found), after)))


def unmeasured(plan: Plan, stage: str, kinds: Sequence[str]) -> float:
    """The share of a stage's measurements of these kinds that are not there; 1 where that is not known yet."""
    found = measuring(plan, plan.stage(stage))
    if found is None:
        return 1.0
    missing, all_of_them = (
        sum(measure.kind in kinds for measure in each) for each in (found.missing, found.there + found.missing)
    )
    return missing / all_of_them if all_of_them else 0.0


def _is_there(store: Store, measure: Measure) -> bool:
    found = store.get(measure.kind, measure.key)
    return isinstance(found, Artifact) and found.has_payload and glance(found) is None
