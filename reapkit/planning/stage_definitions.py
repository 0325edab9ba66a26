"""Defines a stage for the plan: what it reads, what its key consists of, where its result appears. Torch-free.

A stage's key names what it reads, by inclusion: the stage, its version, the recipe fields that it lists, the content
that it looks at beside them, and its inputs' keys. Nothing else enters, so a new recipe field changes no key until a
stage lists it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reapkit.core.artifact_check import glance
from reapkit.core.artifact_store import Artifact, Damage, Store, undisturbed
from reapkit.core.hashing import digest
from reapkit.core.measurements import Measure
from reapkit.planning.rerun_reasons import why_new
from reapkit.recipe.key_values import key_values
from reapkit.recipe.schema import Recipe

if TYPE_CHECKING:
    from reapkit.planning.disk_use import DiskUse
    from reapkit.planning.plan import Plan

NEVER_KEYED = (
    "version",
    "model.source",
    "model.revision",
    "evaluate.on_reject",
    "evaluate.on_undecided",
    "output.directory",
    "output.keep",
    "output.push_to_hub",
    "runtime",
)
"""Recipe fields that change no stage's bytes: locations (keys identify the model by its content), what happens after a
verdict, and how the work is done."""


def nothing(plan: Plan) -> Mapping[str, Any]:
    """No content beside the recipe's fields."""
    return {}


def always(plan: Plan) -> bool:
    """In every run."""
    return True


def no_inputs(recipe: Recipe) -> tuple[str, ...]:
    """It reads no artifact."""
    return ()


def no_remark(summary: Mapping[str, Any]) -> str:
    """Nothing to add."""
    return ""


def nothing_shown(plan: Plan) -> Sequence[str]:
    """No directory."""
    return ()


def nothing_measured(plan: Plan, inputs: Mapping[str, Artifact]) -> Sequence[Measure]:
    """No measurement that is kept."""
    return ()


def nothing_more(plan: Plan) -> str:
    """Nothing to add."""
    return ""


def nothing_written(plan: Plan) -> Sequence[DiskUse]:
    """Nothing worth counting."""
    return ()


@dataclass(frozen=True)
class StageDefinition:
    """One step of a run. `run(context)` reads its inputs, writes its payload and returns a small summary (JSON data).

    `version`: raised by one whenever the stage's code gives other bytes for the same key. `fields`: the recipe fields
    that it reads, as dotted paths; a section stands for all its fields. `content`: what else decides its bytes, such
    as hashes of files; None while that waits for an earlier verdict. `inputs`: stages whose artifacts it reads;
    those that the run does not have fall away. `waits_for`: stages that must be finished first and do not enter the
    key. `directory`: where its payload is published in the run directory; `file`: of its payload only this file is,
    beside the directories. `remark`: what is worth a word when it is done. `writes`: what it puts on disk.
    `shows`: the names of the files in `directory`, as patterns, before it has run. `measures`: what it measures at
    most, each kept as an artifact of its own, once its inputs are there. `afterwards`: what its verdict may make it
    measure beyond that.
    """

    name: str
    version: int
    run: Callable[[Any], dict[str, Any]]
    directory: str | None = None
    file: str | None = None
    fields: tuple[str, ...] = ()
    content: Callable[[Plan], Mapping[str, Any] | None] = nothing
    inputs: Callable[[Recipe], tuple[str, ...]] = no_inputs
    waits_for: tuple[str, ...] = ()
    wanted: Callable[[Plan], bool] = always
    resumes_in_place: bool = False
    makes_model: bool = False
    remark: Callable[[Mapping[str, Any]], str] = no_remark
    writes: Callable[[Plan], Sequence[DiskUse]] = nothing_written
    shows: Callable[[Plan], Sequence[str]] = nothing_shown
    measures: Callable[[Plan, Mapping[str, Artifact]], Sequence[Measure]] = nothing_measured
    afterwards: Callable[[Plan], str] = nothing_more


@dataclass(frozen=True)
class Stage:
    """A stage of one plan: its key (None while an earlier verdict decides what it works on) and whether it is in the
    store."""

    definition: StageDefinition
    key: str | None
    spec: Mapping[str, Any]
    inputs: tuple[str, ...]
    after: tuple[str, ...]
    artifact: Artifact | None
    reason: str
    must_run: bool

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def known_key(self) -> str:
        """Its key. Raises ValueError while an earlier verdict decides what it works on."""
        if self.key is None:
            raise ValueError(f"{self.name} has no key before the verdict that it waits for")
        return self.key

    @property
    def hit(self) -> bool:
        return self.artifact is not None and not self.must_run


def fields_of(recipe: Recipe, paths: Sequence[str]) -> dict[str, Any]:
    """The values at dotted paths of a recipe, as JSON data. Raises KeyError for a path that the schema lacks."""
    dumped = key_values(recipe)
    return {path: _at(dumped, path) for path in paths}


def _at(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value[part]
    return value


def resolve_stages(plan: Plan) -> tuple[Stage, ...]:
    """The plan's stages: keys forwards, then what must run backwards from the outputs that are wanted."""
    wanted = [definition for definition in plan.definitions if definition.wanted(plan)]
    names = {definition.name for definition in wanted}
    keys: dict[str, str | None] = {}
    specs: dict[str, Mapping[str, Any]] = {}
    inputs: dict[str, tuple[str, ...]] = {}
    for stage in wanted:
        content = stage.content(plan)
        specs[stage.name] = fields_of(plan.recipe, stage.fields) | dict(content or {})
        inputs[stage.name] = tuple(name for name in stage.inputs(plan.recipe) if name in names)
        parents = {name: keys[name] for name in inputs[stage.name]}
        known = content is not None and all(parents.values())
        keys[stage.name] = _key(stage, specs[stage.name], parents) if known else None
    found = {name: _found(plan.store, name, key) if key else None for name, key in keys.items()}
    damaged = {name: each for name, each in found.items() if isinstance(each, Damage)}
    artifacts = {name: each if isinstance(each, Artifact) else None for name, each in found.items()}
    made = _made_before(plan.store, [name for name, key in keys.items() if key and artifacts[name] is None])

    def why(name: str) -> str:
        if name in damaged:
            return f"its result is damaged: {damaged[name]}"
        if plan.store.was_set_aside(name, str(keys[name])):
            return "its damaged result was set aside"
        return why_new(specs[name], {parent: keys[parent] for parent in inputs[name]}, made[name])

    verdicts = _must_run(wanted, keys, inputs, artifacts, plan.recipe.output.keep, why)
    return tuple(
        Stage(
            stage,
            keys[stage.name],
            specs[stage.name],
            inputs[stage.name],
            tuple(name for name in stage.waits_for if name in names),
            artifacts[stage.name],
            *verdicts[stage.name],
        )
        for stage in wanted
    )


def _found(store: Store, stage: str, key: str) -> Artifact | Damage | None:
    """The artifact, or what can be told without reading its files that makes it unusable."""

    def look() -> Artifact | Damage | None:
        found = store.find(stage, key)
        damage = glance(found) if isinstance(found, Artifact) else None
        return found if damage is None or damage.extras else damage

    return undisturbed(store.directory(stage, key), look)


def _key(stage: StageDefinition, spec: Mapping[str, Any], parents: Mapping[str, str | None]) -> str:
    return digest({"stage": stage.name, "version": stage.version, "spec": spec, "inputs": parents})


def _made_before(store: Store, names: Sequence[str]) -> Mapping[str, list[Artifact]]:
    """The finished artifacts of these stages, to compare with."""
    made: dict[str, list[Artifact]] = {name: [] for name in names}
    for artifact in store.artifacts() if names else ():
        if artifact.stage in made:
            made[artifact.stage].append(artifact)
    return made


def _must_run(
    stages: Sequence[StageDefinition],
    keys: Mapping[str, str | None],
    inputs: Mapping[str, tuple[str, ...]],
    artifacts: Mapping[str, Artifact | None],
    keep: Sequence[str],
    why: Callable[[str], str],
) -> dict[str, tuple[str, bool]]:
    """(reason, whether it runs) by stage: it has no sound result, or its files are gone and something that runs, or the
    user, needs them."""
    found: dict[str, tuple[str, bool]] = {}
    for stage in reversed(stages):
        artifact = artifacts[stage.name]
        readers = [name for name, (_, runs) in found.items() if runs and stage.name in inputs[name]]
        if artifact is None:
            waits = keys[stage.name] is None
            found[stage.name] = ("waits for the verdict of evaluate" if waits else why(stage.name), True)
        elif not artifact.has_payload and (readers or (stage.makes_model and stage.directory in keep)):
            reader = readers[-1] if readers else "output.keep"
            found[stage.name] = (f"its files were deleted, but {reader} needs them", True)
        else:
            found[stage.name] = ("in the store", False)
    return found
