"""Lists the optional parts of an observation, which exist only if the recipe's `observe` section asks for them.
Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from reapkit.core.errors import UnusableError
from reapkit.observation.observation import Observation
from reapkit.recipe.schema import ObserveSpec


@dataclass(frozen=True)
class Material:
    """Something that is recorded on request, beyond the sums and maxima that every observation holds.

    `what`: its name in messages. `field`: the attribute of `Observation` that holds it, None there where it was not
    recorded. `setting`: the field of `observe` that asks for it; `on`, `off`: the values with and without it. `why`:
    how an observation can come to lack it. `stage`: who records it, and only if a criterion needs it where that is not
    the pass itself.
    """

    what: str
    field: str
    setting: str
    on: Any
    off: Any
    why: str
    stage: str = "observe"

    def of(self, observation: Observation, needed_by: str) -> Any:
        """The material that `observation` holds. Raises UnusableError where it holds none."""
        found = getattr(observation, self.field)
        if found is None:
            raise UnusableError(
                f"{needed_by} needs {self.what}, but this observation has none ({self.why}). Observe with"
                f" observe.{self.setting}: {json.dumps(self.on)}."
            )
        return found

    def collected(self, spec: ObserveSpec) -> bool:
        """Whether a pass under these settings records it."""
        return getattr(spec, self.setting) != self.off

    def unmeasured(self, name: str) -> str:
        """That `name` cannot be computed from a pass that does not record it, and what to set."""
        when = "during the observation" if self.stage == "observe" else f"by the stage {self.stage}"
        return (
            f"{name} is measured {when}, but observe.{self.setting} is {json.dumps(self.off)}. Set it to"
            f" {json.dumps(self.on)}."
        )


EAFT_SIGNALS = Material("EAFT signals", "eaft", "eaft", True, False, "observe.eaft was false, or another tool made it")
REMOVAL_PATHS = Material(
    "removal paths",
    "reroute",
    "reroute_tokens",
    8192,
    0,
    "observe.reroute_tokens was 0, or it is a sum of observations, whose paths do not add up",
)
KNOCKOUTS = Material(
    "knock-outs",
    "knockout",
    "knockout_tokens",
    8192,
    0,
    "no criterion of its run asked for them, or it is a sum of observations",
    "knockout",
)
MATERIALS = (EAFT_SIGNALS, REMOVAL_PATHS, KNOCKOUTS)


def collecting(*needed: Material) -> ObserveSpec:
    """Settings of `observe` that record these materials and no others."""
    return ObserveSpec.model_validate(
        {material.setting: material.on if material in needed else material.off for material in MATERIALS}
    )
