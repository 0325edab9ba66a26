"""What a run has done so far. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from reapkit.core.artifact_store import Artifact
from reapkit.core.formatting import human_bytes
from reapkit.core.json_text import parse_json
from reapkit.core.notebook import html_table
from reapkit.core.ranks import ALONE, Alone
from reapkit.evaluation.metrics.table import in_view
from reapkit.evaluation.outcome import Outcome, outcome
from reapkit.pipeline.damaged import SoundPlans
from reapkit.pipeline.run_directory import RunDirectory
from reapkit.planning.lock import versions
from reapkit.planning.plan import Plan
from reapkit.planning.stage_definitions import Stage


@dataclass(repr=False)
class Run:
    """What a walk did: artifacts by stage, which stages were executed, seconds and warnings."""

    plan: Plan
    published: RunDirectory
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    executed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    ranks: Alone = ALONE
    sound: SoundPlans = field(default_factory=SoundPlans)

    def __repr__(self) -> str:
        done = ", ".join(self.executed) or "nothing"
        return f"<Run {self.plan.recipe.name} in {self.directory}: {self.outcome.headline}; ran: {done}>"

    def _repr_html_(self) -> str:
        stages = [
            (name, "ran" if name in self.executed else "in the store", f"{artifact.manifest['seconds']:.1f} s")
            for name, artifact in self.artifacts.items()
        ]
        made = html_table(f"{self.plan.recipe.name}: {self.outcome.headline}", ("stage", "", "took"), stages)
        rows = self.summary("verify").get("rows", ())
        columns = in_view("narrow")
        measured = [
            (
                row["name"],
                row["experts"],
                human_bytes(row["bytes"]),
                *(metric.show(row.get(metric.name)) for metric in columns),
            )
            for row in rows
        ]
        names = ("", "experts", "size", *(metric.label for metric in columns))
        return made + (html_table("measured on held-out rows", names, measured) if measured else "")

    @property
    def directory(self) -> Path:
        """Where its results are."""
        return self.published.path

    @property
    def got_as_far(self) -> bool:
        """Whether it came at least as far as the run whose results are in its directory."""
        names = [definition.name for definition in self.plan.definitions]
        earlier = [names.index(name) for name in self.published.earlier_stages() if name in names]
        return max((names.index(name) for name in self.artifacts), default=-1) >= max(earlier, default=-1)

    @property
    def models(self) -> tuple[Stage, ...]:
        """The stages of this run whose models were made, the final one last."""
        return tuple(
            stage for stage in self.plan.stages if stage.definition.makes_model and stage.name in self.artifacts
        )

    @property
    def outcome(self) -> Outcome:
        """What was judged, by which gates, and how the final directory stands to the same limits."""
        return outcome(self._record("evaluate", "evaluation.json"), self._record("verify", "verify.json"))

    def _record(self, stage: str, file: str) -> Mapping[str, Any] | None:
        artifact = self.artifacts.get(stage)
        return (
            parse_json((artifact.payload / file).read_bytes())
            if artifact is not None and artifact.has_payload
            else None
        )

    def summary(self, stage: str) -> Mapping[str, Any]:
        """What the stage reported, or nothing if it did not come to it."""
        artifact = self.artifacts.get(stage)
        return artifact.summary if artifact else {}


def describe(run: Run) -> dict[str, Any]:
    """What ran, from what, in which time, with which versions."""
    stages = {}
    for name, artifact in run.artifacts.items():
        stages[name] = {
            "key": artifact.key,
            "artifact": artifact.directory.name,
            "executed": name in run.executed,
            "seconds": artifact.manifest["seconds"],
            "summary": dict(artifact.summary),
        }
    return {
        "name": run.plan.recipe.name,
        "recipe": run.plan.loaded.shown,
        "model": run.plan.recipe.model.source,
        "outcome": {"word": run.outcome.word, "sentence": run.outcome.sentence},
        "stages": stages,
        "warnings": list(dict.fromkeys(run.warnings)),
        "versions": versions(),
    }


def directory_of(stage: Stage) -> str:
    """The directory in which the run shows the payload of a stage that has one."""
    return cast(str, stage.definition.directory)
