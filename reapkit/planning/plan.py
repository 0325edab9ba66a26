"""What a recipe would do to a checkpoint: integers, bytes, and for every stage its key and whether it must run.
Torch-free.

A stage's key is a hash of (stage, version, resolved spec, input keys); a key that is in the store is never run again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from reapkit.calibration.identity import source_identity, template_identity, tokenizer_identity
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.expert_layout import Layout, read_layout
from reapkit.checkpoint.locate import model_checkpoint
from reapkit.checkpoint.mtp_support import mtp_notes, observed_mtp, why_unobserved
from reapkit.checkpoint.parameter_counts import active_parameters, pruned_sizes
from reapkit.core.artifact_store import Artifact, Store
from reapkit.core.errors import Problem, ReapkitError, RecipeError
from reapkit.core.formatting import ranges
from reapkit.core.hashing import digest, digest_file
from reapkit.observation.external import ImportedObservation
from reapkit.planning.checks import checked_candidates
from reapkit.quantization.schemes import scheme_of
from reapkit.quantization.sizes import quantized_bytes
from reapkit.quantization.targets import targets
from reapkit.recipe.loading import LoadedRecipe, as_loaded, in_file_order, load
from reapkit.recipe.schema import Recipe
from reapkit.selection.candidates import Candidate, budget_notes
from reapkit.selection.criteria import criterion_fingerprint

STAGES = ("calibrate", "packs", "observe", "select", "repair", "evaluate", "prune", "quantize", "verify", "report")
VERSIONS = {
    "calibrate": 1,
    "packs": 1,
    "observe": 1,
    "select": 1,
    "repair": 1,
    "evaluate": 3,
    "prune": 1,
    "quantize": 3,
    "verify": 4,
    "report": 4,
}
"""Raised by one whenever a stage's code would give other bytes for the same spec."""


@dataclass(frozen=True)
class Stage:
    """One step: its key (None while an earlier verdict decides what it works on) and whether it is in the store."""

    name: str
    key: str | None
    spec: Mapping[str, Any]
    inputs: tuple[str, ...]
    after: tuple[str, ...]
    artifact: Artifact | None
    reason: str
    must_run: bool

    @property
    def hit(self) -> bool:
        return self.artifact is not None and not self.must_run


@dataclass(frozen=True)
class Sizes:
    """A checkpoint's size: routed experts per MoE layer, parameters (total, active per token) and bytes of tensors."""

    experts: Mapping[int, int]
    parameters: int
    active_parameters: int
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Everything decided before any weight is read. `mtp`: the multi-token-prediction layers that are observed and
    pruned, not dropped."""

    loaded: LoadedRecipe
    checkpoint: Checkpoint
    layout: Layout
    candidates: tuple[Candidate, ...]
    stages: tuple[Stage, ...]
    imported: ImportedObservation | None = None
    mtp: tuple[int, ...] = ()

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def leading_to(self, until: str | None) -> tuple[str, ...]:
        """The stages, in order, that the end of stage `until` needs; all of them without one."""
        if until is None or until not in {stage.name for stage in self.stages}:
            return tuple(stage.name for stage in self.stages)
        needed = {until}
        for stage in reversed(self.stages):  # inputs stand before what reads them
            needed |= {*stage.inputs, *stage.after} if stage.name in needed else set()
        return tuple(stage.name for stage in self.stages if stage.name in needed)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What the user should hear before it runs."""
        notes = budget_notes(
            self.candidates[0].prune(self.recipe.prune), self.checkpoint.architecture, tuple(self.layout.layers)
        )
        why = (
            why_unobserved(self.checkpoint, self.layout, trust_remote_code=self.recipe.model.trust_remote_code)
            if self.imported is None
            else ("the imported observation does not hold its layers")
        )
        notes += mtp_notes(self.recipe.prune.mtp, self.layout, self.mtp, why)
        if self.recipe.quantize.scheme is not None and self.recipe.quantize.recipe is None:
            found = targets(self.checkpoint, self.recipe.quantize, self.layout)
            routed = any(matrix.routed for matrix in found.matrices.values())
            if found.has_stacked_experts or (routed and not scheme_of(self.recipe.quantize).experts_reload):
                notes.append(
                    f"transformers cannot read this model's routed experts in {self.recipe.quantize.scheme}; engines"
                    " with one module per expert, such as vLLM, can. The result is proven without the loader."
                )
        return tuple(notes)

    @cached_property
    def base(self) -> Sizes:
        experts = {index: layer.num_experts for index, layer in self.layout.layers.items()}
        weights = active_parameters(self.checkpoint, self.layout)
        return Sizes(experts, weights.total, weights.active, self.checkpoint.nbytes)

    def kept(self, candidate: Candidate) -> dict[int, int]:
        """Experts kept per MoE layer under a candidate's budget; multi-token-prediction layers keep as many as any."""
        kept = candidate.kept(self.recipe.prune, self.checkpoint.architecture, tuple(self.layout.layers))
        return kept | dict.fromkeys(self.mtp, max(kept.values()))

    def pruned(self, candidate: Candidate) -> Sizes:
        """The pruned checkpoint's size, from headers alone."""
        kept = self.kept(candidate)
        weights = active_parameters(
            self.checkpoint, self.layout, kept=kept, experts_per_token=candidate.experts_per_token
        )
        return Sizes(
            {layer: kept[layer] for layer in self.layout.layers},
            weights.total,
            weights.active,
            pruned_sizes(self.checkpoint, kept, self.layout)[1],
        )

    def quantized_nbytes(self, candidate: Candidate) -> int | None:
        """Bytes of the quantized checkpoint, or None where the recipe quantizes nothing."""
        if self.recipe.quantize.scheme is None and self.recipe.quantize.recipe is None:
            return None
        return quantized_bytes(self.checkpoint, self.recipe.quantize, kept=self.kept(candidate))


def plan(recipe: Recipe | LoadedRecipe | str | Path) -> Plan:
    """What a recipe (or the one at a path) would do, without doing it. Raises as `make_plan`."""
    return make_plan(as_loaded(recipe))


def load_and_plan(
    name: str, overrides: Sequence[str] = (), *, download: bool = False, observation: Path | None = None
) -> Plan:
    """The plan of the recipe at a path or of a shipped name; what is wrong with the file and with the budget is raised
    together.

    Raises RecipeError with every problem, UnusableError for the checkpoint of a recipe that is right in itself.
    """
    try:
        return make_plan(load(name, overrides), download=download, observation=observation)
    except RecipeError as error:
        if error.partial is not None:
            try:
                make_plan(error.partial)
            except RecipeError as more:
                known = {problem.path for problem in error.problems}
                raise RecipeError(
                    in_file_order(error.problems + [p for p in more.problems if p.path not in known])
                ) from None
            except ReapkitError:
                pass  # the checkpoint's turn comes when the recipe is right
        raise


def make_plan(loaded: LoadedRecipe, *, download: bool = False, observation: Path | None = None) -> Plan:
    """The plan of a recipe against its checkpoint and the store; of a hub model that is not in the cache, from its
    metadata.

    `download` fetches the hub model first: a run needs it, a plan does not. `observation`: the directory of one made
    elsewhere, which takes the place of observing; its content is its key, whatever the recipe's calibration says.
    Raises RecipeError with every contradiction between recipe and checkpoint at its line, UnusableError for the
    checkpoint.
    """
    recipe = loaded.recipe
    if str(loaded.directory) not in sys.path:
        sys.path.append(str(loaded.directory))  # `saliency.criterion: module:function` finds a module beside its recipe
    checkpoint = model_checkpoint(recipe.model, loaded.directory, download=download)
    layout = read_layout(checkpoint)
    grid = checked_candidates(loaded, checkpoint, layout, observation)
    store, imported = Store(recipe.runtime.store), None
    if observation is not None:
        imported = ImportedObservation.open(observation, store.root / "imports" / "hashes.json")
        imported.check(checkpoint, layout)
    mtp = observed_mtp(
        recipe.prune.mtp,
        checkpoint,
        layout,
        trust_remote_code=recipe.model.trust_remote_code,
        measured=None if imported is None else imported.facts["layers"],
    )
    if imported is not None and recipe.prune.mtp == "observe" and layout.mtp and not mtp:
        raise loaded.located(
            RecipeError(
                [
                    Problem(
                        "prune.mtp",
                        f"observe, but --observation {observation} does not hold the multi-token-prediction "
                        f"layers {ranges(sorted(layout.mtp))}. Choose drop or auto, or give one that does.",
                    )
                ]
            )
        )
    stages = _stages(loaded, checkpoint, grid, store, imported, mtp)
    return Plan(loaded, checkpoint, layout, grid, stages, imported, mtp)


def _task_files(loaded: LoadedRecipe) -> dict[str, str]:
    """Content of the task files beside the recipe: another content is another benchmark."""
    spec = loaded.recipe.evaluate.lm_eval
    return {
        task: digest_file(loaded.directory / task)
        for task in (spec.tasks if spec else ())
        if (loaded.directory / task).is_file()
    }


def _own_criteria(grid: tuple[Candidate, ...], controls: Sequence[str]) -> dict[str, str]:
    """A user's own criteria are code: their files' hashes belong to the decision."""
    names = dict.fromkeys([*(candidate.criterion for candidate in grid), *controls])
    return {name: fingerprint for name in names if (fingerprint := criterion_fingerprint(name))}


def _dump(section: BaseModel, *, exclude: set[str] | None = None) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude=exclude)


def _specs(
    loaded: LoadedRecipe,
    checkpoint: Checkpoint,
    grid: tuple[Candidate, ...],
    winner: str | None,
    imported: ImportedObservation | None,
    mtp: tuple[int, ...],
) -> dict[str, Any]:
    """Stage -> (resolved spec, input stages, stages it only waits for). What is meant to change the output is here;
    nothing else."""
    recipe, directory = loaded.recipe, loaded.directory
    tokenizer = tokenizer_identity(checkpoint.path)
    sources = [source_identity(entry, directory) for entry in recipe.calibration.mix]
    model = {"identity": checkpoint.identity, "trust_remote_code": recipe.model.trust_remote_code}
    quantizes = recipe.quantize.scheme is not None or recipe.quantize.recipe is not None
    calibrated = quantizes and (recipe.quantize.method != "rtn" or recipe.quantize.recipe is not None)
    final = "quantize" if quantizes else "prune"
    evaluate, prune = recipe.evaluate, recipe.prune
    repaired = () if prune.repair is None else ("repair",)
    specs = {
        "calibrate": (
            {
                "calibration": _dump(recipe.calibration),
                "sources": sources,
                "tokenizer": tokenizer,
                "chat_template": template_identity(recipe.calibration.chat_template, directory),
            },
            (),
            (),
        ),
        "packs": (
            {
                "packs": _dump(evaluate.packs),
                "extra": [_dump(entry) for entry in evaluate.extra_packs],
                "extra_sources": [source_identity(entry, directory) for entry in evaluate.extra_packs],
            },
            ("calibrate",),
            (),
        ),
        "observe": (
            (
                {"observe": _dump(recipe.observe), "model": model} | ({"mtp": list(mtp)} if mtp else {}),
                ("calibrate",),
                (),
            )
            if imported is None
            else ({"imported": imported.content, "model": model}, (), ())
        ),
        "select": (
            {
                "saliency": _dump(recipe.saliency),
                "own_criteria": _own_criteria(grid, evaluate.controls),
                "prune": _dump(prune, exclude={"repair", "mtp"}),
                "controls": list(evaluate.controls),
            },
            ("observe",),
            (),
        ),
        **({"repair": ({"repair": prune.repair, "model": model}, ("calibrate", "select"), ())} if repaired else {}),
        "evaluate": (
            {
                "evaluate": _dump(
                    evaluate,
                    exclude={"gates_quantized", "on_reject", "on_undecided", "lm_eval", "throughput", "equal_bytes"},
                )
            },
            ("packs", "select", *repaired),
            ("observe",),
        ),
        "prune": (
            {
                "candidate": winner,
                "mtp": prune.mtp,
                "repair": prune.repair,
                "model": model,
                "max_shard_bytes": recipe.output.max_shard_bytes,
            },
            ("select", *repaired),
            ("evaluate",),
        ),
    }
    if quantizes:
        specs["quantize"] = (
            {"quantize": _dump(recipe.quantize), "max_shard_bytes": recipe.output.max_shard_bytes},
            ("prune", "calibrate") if calibrated else ("prune",),
            (),
        )
    alone = (
        {"group_size": recipe.quantize.group_size, "ignore": list(recipe.quantize.ignore)}
        if evaluate.equal_bytes
        else None
    )
    specs["verify"] = (
        {
            **{name: _dump(evaluate)[name] for name in ("gates_quantized", "lm_eval", "throughput")},
            "equal_bytes": alone,
            **({"task_files": files} if (files := _task_files(loaded)) else {}),
        },
        tuple(dict.fromkeys(("packs", "select", *repaired, "prune", final))),
        (),
    )
    specs["report"] = (
        {
            "name": recipe.name,
            "description": recipe.description,
            "card": recipe.output.card,
            "source": recipe.model.source,
        },
        tuple(dict.fromkeys(("calibrate", "observe", "select", *repaired, "evaluate", "prune", final, "verify"))),
        (),
    )
    return specs


def _stages(
    loaded: LoadedRecipe,
    checkpoint: Checkpoint,
    grid: tuple[Candidate, ...],
    store: Store,
    imported: ImportedObservation | None,
    mtp: tuple[int, ...],
) -> tuple[Stage, ...]:
    """Keys forwards, then what must run backwards from the outputs that are wanted."""
    winner = grid[0].name if len(grid) == 1 else None
    specs = _specs(loaded, checkpoint, grid, winner, imported, mtp)
    keys: dict[str, str | None] = {}
    for name, (spec, inputs, _) in specs.items():
        if name == "prune" and winner is None:
            judged = store.get("evaluate", keys["evaluate"]) if keys["evaluate"] else None
            if judged is not None:
                spec["candidate"] = judged.summary["chosen"]  # judged well enough to go on, or the run stops before it
        known = all(keys[source] for source in inputs) and spec.get("candidate", "") is not None
        parents = {source: keys[source] for source in inputs}
        keys[name] = (
            digest({"stage": name, "version": VERSIONS[name], "spec": spec, "inputs": parents}) if known else None
        )
    artifacts = {name: store.get(name, key) if key else None for name, key in keys.items()}
    must_run, reasons = _must_run(specs, keys, artifacts, loaded.recipe)
    return tuple(
        Stage(name, keys[name], spec, inputs, after, artifacts[name], reasons[name], must_run[name])
        for name, (spec, inputs, after) in specs.items()
    )


def _must_run(
    specs: Mapping[str, Any], keys: Mapping[str, str | None], artifacts: Mapping[str, Artifact | None], recipe: Recipe
) -> tuple[dict[str, bool], dict[str, str]]:
    """Backwards: a stage runs if it was never made, or if its files are gone and something that runs, or the user,
    needs them."""
    kept = {"prune": "pruned" in recipe.output.keep, "quantize": "quantized" in recipe.output.keep}
    must_run: dict[str, bool] = {}
    reasons: dict[str, str] = {}
    for name in reversed(specs):
        artifact = artifacts[name]
        readers = [other for other, (_, inputs, _) in specs.items() if name in inputs and must_run.get(other)]
        if artifact is None:
            must_run[name] = True
            reasons[name] = (
                "waits for the verdict of evaluate" if keys[name] is None else "new, or something it depends on changed"
            )
        elif not artifact.has_payload and (readers or kept.get(name)):
            must_run[name] = True
            reasons[name] = f"its files were dropped and {readers[0] if readers else 'output.keep'} needs them"
        else:
            must_run[name], reasons[name] = False, "in the store"
    return must_run, reasons


def store_of(recipe: Recipe) -> Store:
    """The recipe's artifact store."""
    return Store(Path(recipe.runtime.store))
