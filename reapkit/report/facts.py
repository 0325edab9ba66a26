"""Collects the facts for a report and a model card: the plan and the artifacts of a run, as one value. What a
run did not come to is empty or None."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from reapkit.calibration.data_files import is_local_data
from reapkit.core.artifact_store import Artifact
from reapkit.evaluation.outcome import Outcome, outcome
from reapkit.planning.plan import Plan, Sizes
from reapkit.recipe.schema import Recipe
from reapkit.recipe.yaml_tree import walk
from reapkit.report.serving_needs import PromptKind, cache_bytes_per_token, prompt_kind
from reapkit.selection.selection import Selection

if TYPE_CHECKING:
    from reapkit.observation.observation import Observation


@dataclass(frozen=True)
class StageRow:
    """One stage of the run: `state` is "run", "in the store" or "not reached"."""

    name: str
    state: str
    seconds: float | None
    key: str | None


@dataclass(frozen=True)
class SourceModel:
    """The base model as its checkpoint describes it. `hub`: the source is a hub id. `license`: what its own card says,
    or None. `prompts`: what it is given; `cache_bytes`: of keys and values for a token, None where unknown."""

    source: str
    revision: str | None
    hub: bool
    model_type: str
    num_experts: int
    num_experts_per_tok: int
    num_hidden_layers: int
    license: str | None
    identity: str
    prompts: PromptKind = "text"
    cache_bytes: int | None = None


@dataclass(frozen=True, eq=False)
class RunFacts:
    """A run as far as it came.

    `planned`: sizes each candidate would have; `pruned`, `quantized`: sizes of what was written. `selections`: by
    candidate and control; `chosen`: the candidate that the evaluation chose. `evaluation`, `verification`,
    `calibration`: their JSON files. `quantization`: what the stage reported. `hub_datasets`: sources of the mix that
    are on the hub. `mtp`: whether multi-token-prediction blocks stay; None where the model has none.
    """

    recipe: Recipe
    recipe_yaml: str
    command: str
    model: SourceModel
    base: Sizes
    planned: Mapping[str, Sizes]
    chosen: str | None = None
    pruned: Sizes | None = None
    quantized: Sizes | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    observation: Observation | None = None
    selections: Mapping[str, Selection] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    quantization: Mapping[str, Any] = field(default_factory=dict)
    verification: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[StageRow, ...] = ()
    warnings: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    hub_datasets: tuple[str, ...] = ()
    mtp: bool | None = None

    @property
    def selection(self) -> Selection | None:
        """The chosen candidate's decision."""
        return self.selections.get(self.chosen) if self.chosen else None

    @cached_property
    def outcome(self) -> Outcome:
        """What was judged, by which gates, and how the final directory stands to them."""
        return outcome(self.evaluation, self.verification)

    @property
    def stopped(self) -> bool:
        """Whether the run ended before it wrote a model."""
        return self.pruned is None


def facts_from(
    plan: Plan,
    artifacts: Mapping[str, Artifact],
    *,
    executed: Collection[str] | None = None,
    command: str | None = None,
) -> RunFacts:
    """The facts of a run from its plan and the artifacts it has, by stage name. `executed`: the stages this run made
    itself.

    Reads the artifacts' small files and the observation; no model weight.
    """
    chosen = _chosen(plan, artifacts)
    candidate = next((each for each in plan.candidates if each.name == chosen), None)
    planned = {each.name: plan.pruned(each) for each in plan.candidates}
    pruned = planned[candidate.name] if "prune" in artifacts and candidate else None
    quantized = None
    if "quantize" in artifacts and pruned is not None:
        quantized = Sizes(
            pruned.experts, pruned.parameters, pruned.active_parameters, artifacts["quantize"].summary["bytes"]
        )
    return RunFacts(
        recipe=plan.recipe,
        recipe_yaml=recipe_yaml(plan.recipe),
        command=command or _command(plan),
        model=_source_model(plan),
        base=plan.base,
        planned=planned,
        chosen=chosen,
        pruned=pruned,
        quantized=quantized,
        calibration=_json(artifacts, "calibrate", "calibration.json"),
        observation=_observation(artifacts),
        selections=_selections(artifacts),
        evaluation=_json(artifacts, "evaluate", "evaluation.json"),
        quantization=artifacts["quantize"].summary if "quantize" in artifacts else {},
        verification=_json(artifacts, "verify", "verify.json"),
        stages=_stages(plan, artifacts, executed),
        warnings=_warnings(artifacts),
        versions=_versions(artifacts),
        hub_datasets=tuple(
            dict.fromkeys(
                entry.source for entry in plan.recipe.calibration.mix if _on_hub(entry.source, plan.loaded.directory)
            )
        ),
        mtp=_mtp_stays(plan),
    )


def _mtp_stays(plan: Plan) -> bool | None:
    """Blocks that route stay where they were observed, others unless the recipe drops them."""
    if not plan.layout.mtp_tensors:
        return None
    return bool(plan.mtp) if plan.layout.mtp else plan.recipe.prune.mtp != "drop"


def _chosen(plan: Plan, artifacts: Mapping[str, Artifact]) -> str | None:
    for stage, name in (("prune", "candidate"), ("evaluate", "chosen")):
        if stage in artifacts and artifacts[stage].summary.get(name):
            return artifacts[stage].summary[name]
    return plan.candidates[0].name if len(plan.candidates) == 1 else None


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe with parents merged and every default written out; it loads again as the same recipe."""
    return yaml.safe_dump(_plain(recipe.model_dump()), sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    """What YAML can say: a fraction is written as the number it is, not as text."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _on_hub(source: str, directory: Path) -> bool:
    return not source.startswith("builtin:") and not is_local_data(source, directory)


def _source_model(plan: Plan) -> SourceModel:
    model, architecture = plan.recipe.model, plan.checkpoint.architecture
    return SourceModel(
        model.source,
        model.revision,
        _on_hub(model.source, plan.loaded.directory),
        architecture.model_type,
        architecture.num_experts,
        architecture.num_experts_per_tok,
        architecture.num_hidden_layers,
        license_of(plan.checkpoint.path),
        plan.checkpoint.identity,
        prompt_kind(plan.checkpoint.path),
        cache_bytes_per_token(plan.checkpoint.config),
    )


def license_of(directory: Path) -> str | None:
    """The license that a model directory's own card names in its front matter, or None."""
    card = directory / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    return found.get("license") if isinstance(found, dict) and isinstance(found.get("license"), str) else None


def _json(artifacts: Mapping[str, Artifact], stage: str, file: str) -> dict[str, Any]:
    artifact = artifacts.get(stage)
    if artifact is None or not (artifact.payload / file).is_file():
        return {}
    return json.loads((artifact.payload / file).read_text(encoding="utf-8"))


def _observation(artifacts: Mapping[str, Artifact]) -> Observation | None:
    if "observe" not in artifacts or not artifacts["observe"].has_payload:
        return None
    from reapkit.observation.observation import Observation

    observation = Observation.load(artifacts["observe"].payload)
    knockouts = artifacts.get("knockout")
    return (
        observation if knockouts is None or not knockouts.has_payload else observation.with_knockouts(knockouts.payload)
    )


def _selections(artifacts: Mapping[str, Artifact]) -> dict[str, Selection]:
    if "select" not in artifacts or not artifacts["select"].has_payload:
        return {}
    folder = artifacts["select"].payload / "candidates"
    return {path.name: Selection.load(path) for path in sorted(folder.iterdir()) if path.is_dir()}


def _stages(plan: Plan, artifacts: Mapping[str, Artifact], executed: Collection[str] | None) -> tuple[StageRow, ...]:
    """Every stage but the report, whose page this is."""
    readers = {source for stage in plan.stages if stage.name in artifacts for source in (*stage.inputs, *stage.after)}
    rows = []
    for stage in plan.stages:
        artifact = artifacts.get(stage.name)
        if artifact is None and stage.name in readers and stage.key:
            artifact = plan.store.get(stage.name, stage.key)
        if artifact is not None:
            made = not stage.hit if executed is None else stage.name in executed
            rows.append(
                StageRow(stage.name, "run" if made else "in the store", artifact.manifest.get("seconds"), artifact.key)
            )
        elif stage.name != "report":
            rows.append(StageRow(stage.name, "not reached", None, stage.key))
    return tuple(rows)


def _command(plan: Plan) -> str:
    """The command line that plans the same: the recipe and every override."""
    given = dict.fromkeys(
        node.file.removeprefix("--set ") for _, node in walk(plan.loaded.document) if node.file.startswith("--set ")
    )
    imported = [] if plan.imported is None else ["--observation", str(plan.imported.directory)]
    return shlex.join(
        [
            "reapkit",
            "apply",
            plan.loaded.shown,
            *(part for override in given for part in ("--set", override)),
            *imported,
        ]
    )


def _warnings(artifacts: Mapping[str, Artifact]) -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(warning for artifact in artifacts.values() for warning in artifact.manifest.get("warnings", ()))
    )


def _versions(artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    """Versions that made the last artifact."""
    found: dict[str, str] = {}
    for artifact in sorted(artifacts.values(), key=lambda each: str(each.manifest.get("finished", ""))):
        found |= artifact.manifest.get("versions", {})
    return found
