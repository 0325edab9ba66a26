"""Plans what a recipe does to a checkpoint: integers, bytes, and for every stage its key and whether it must run.
Torch-free.

A stage's key is a hash of (stage, version, spec, input keys); a key that is in the store is never run again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from reapkit.calibration.identity import pinned_entries, source_identity, template_identity, tokenizer_identity
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.companions import companions, stray_note, unheld_note
from reapkit.checkpoint.expert_layout import Layout
from reapkit.checkpoint.locate import model_checkpoint
from reapkit.checkpoint.mtp_support import mtp_notes, observed_mtp, why_unobserved
from reapkit.checkpoint.parameter_counts import active_parameters, pruned_sizes
from reapkit.checkpoint.readable import require_readable
from reapkit.core.artifact_store import Store
from reapkit.core.errors import Problem, RecipeError, UnusableError
from reapkit.core.formatting import human_bytes, human_count, human_experts, ranges
from reapkit.core.hashing import digest_file
from reapkit.core.notebook import html_table
from reapkit.observation.external import ImportedObservation
from reapkit.planning.checks import checked_candidates, recipe_problems, written_text_gates
from reapkit.planning.estimates import Estimates, Machine, estimate, machine_memory
from reapkit.planning.measuring import reason
from reapkit.planning.stage_definitions import Stage, StageDefinition, resolve_stages
from reapkit.planning.template_date import date_note, keep_date, template_date
from reapkit.quantization.schemes import scheme_of
from reapkit.quantization.sizes import quantized_bytes
from reapkit.quantization.targets import targets
from reapkit.recipe.loading import LoadedRecipe
from reapkit.recipe.schema import CalibrationSpec, EvaluateSpec, Recipe
from reapkit.selection.candidates import Candidate, budget_notes
from reapkit.selection.criteria.registry import criterion_fingerprint


@dataclass(frozen=True)
class Sizes:
    """A checkpoint's size: routed experts per MoE layer, parameters (total, active per token) and bytes of tensors."""

    experts: Mapping[int, int]
    parameters: int
    active_parameters: int
    nbytes: int


@dataclass(frozen=True)
class Identities:
    """What names in keys the content of everything that a recipe refers to."""

    model: Mapping[str, Any]
    tokenizer: Mapping[str, str]
    chat_template: str | None
    sources: Sequence[Any]
    extra_sources: Sequence[Any]
    criteria: Mapping[str, str]
    task_files: Mapping[str, str]
    date: str | None = None

    @classmethod
    def of(cls, loaded: LoadedRecipe, checkpoint: Checkpoint, grid: Sequence[Candidate]) -> Identities:
        """Reads and hashes what lies on this machine; nothing of the user's is run."""
        recipe, directory = loaded, loaded.directory
        return cls(
            {"identity": checkpoint.identity, "trust_remote_code": recipe.model.trust_remote_code},
            tokenizer_identity(checkpoint.path),
            template_identity(recipe.calibration.chat_template, directory),
            [source_identity(entry, directory) for entry in recipe.calibration.mix],
            [source_identity(entry, directory) for entry in recipe.evaluate.extra_packs],
            _own_criteria(grid, recipe.evaluate.controls),
            _task_files(loaded),
            template_date(loaded, checkpoint.path),
        )


@dataclass(frozen=True, repr=False)
class Plan:
    """Everything decided before any weight is read: one per run.

    `definitions`: the stages that there are. `machine`: the memory that was free when the plan was made, by which it
    chose the placement. `mtp`: the multi-token-prediction layers that are observed and pruned, not dropped. `winner`:
    the name of the candidate that is pruned, None until the evaluation has chosen it.
    """

    loaded: LoadedRecipe
    definitions: tuple[StageDefinition, ...]
    checkpoint: Checkpoint
    candidates: tuple[Candidate, ...]
    identities: Identities
    machine: Machine
    imported: ImportedObservation | None = None
    mtp: tuple[int, ...] = ()
    winner: str | None = None
    stages: tuple[Stage, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", resolve_stages(self))

    def __repr__(self) -> str:
        runs = [stage.name for stage in self.stages if not stage.hit]
        experts = f"{human_experts(self.base.experts)} experts in {len(self.layout.layers)} layers"
        model = f"{self.recipe.model.source}, {experts}"
        return f"<Plan {self.recipe.name}: {model}; to run: {', '.join(runs) or 'nothing'}>"

    def _repr_html_(self) -> str:
        stages = [(stage.name, "done" if stage.hit else "will run", reason(self, stage)) for stage in self.stages]
        sizes = {"base": self.base} | {candidate.name: self.pruned(candidate) for candidate in self.candidates}
        rows = [
            (name, human_experts(size.experts), human_count(size.parameters), human_bytes(size.nbytes))
            for name, size in sizes.items()
        ]
        return html_table(f"{self.recipe.name}: stages", ("stage", "state", "why"), stages) + html_table(
            self.recipe.model.source, ("", "experts", "parameters", "size"), rows
        )

    def downloaded(self) -> Plan:
        """The same plan with the whole model on this machine, its stages looked up in the store now."""
        if not self.checkpoint.shard_hashes:
            return self.anew()
        checkpoint = model_checkpoint(self.recipe.model, self.loaded.directory, download=True)
        identities = Identities.of(self.loaded, checkpoint, self.candidates)
        return replace(self, checkpoint=checkpoint, identities=identities).anew()

    def anew(self) -> Plan:
        """The same plan, its stages looked up in the store now: an evaluation that is there has decided."""
        return _judged(replace(self, winner=self.candidates[0].name if len(self.candidates) == 1 else None))

    def date_kept(self) -> Plan:
        """The same plan, its store keeping the date that chat templates see: another run may just have fixed it."""
        date = self.identities.date
        if date is None or self.recipe.calibration.date is not None:
            return self
        kept = keep_date(self.store, date)
        return self if kept == date else replace(self, identities=replace(self.identities, date=kept)).anew()

    def decided(self, winner: str) -> Plan:
        """The same plan, now that the evaluation has chosen a candidate by name."""
        return replace(self, winner=winner)

    @property
    def store(self) -> Store:
        """The recipe's artifact store."""
        return Store(self.recipe.runtime.store)

    @cached_property
    def estimates(self) -> Estimates:
        """What the run takes on `machine`, and the placement chosen for it."""
        return estimate(self)

    @property
    def layout(self) -> Layout:
        """Where the checkpoint's experts are."""
        return self.checkpoint.layout

    @property
    def recipe(self) -> Recipe:
        return self.loaded

    @property
    def calibration(self) -> CalibrationSpec:
        """The recipe's calibration, on the date that its chat templates see and with the commits of hub datasets that
        the keys name."""
        mix = pinned_entries(self.recipe.calibration.mix, self.identities.sources)
        return self.recipe.calibration.model_copy(update={"mix": mix, "date": self.identities.date})

    @property
    def evaluation(self) -> EvaluateSpec:
        """The recipe's evaluation, with the commits of hub datasets that the keys name."""
        extra = pinned_entries(self.recipe.evaluate.extra_packs, self.identities.extra_sources)
        return self.recipe.evaluate.model_copy(update={"extra_packs": extra})

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
        notes += [*stray_note(companions(self.checkpoint)[1]), *unheld_note(self.checkpoint)]
        if self.identities.date is not None:
            notes.append(date_note(self.loaded, self.identities.date))
        why = (
            why_unobserved(self.checkpoint, self.layout, trust_remote_code=self.recipe.model.trust_remote_code)
            if self.imported is None
            else ("the imported observation does not have their layers")
        )
        notes += mtp_notes(self.recipe.prune.mtp, self.layout, self.mtp, why)
        if self.recipe.quantize.scheme is not None and self.recipe.quantize.recipe is None:
            found = targets(self.checkpoint, self.recipe.quantize)
            routed = any(matrix.routed for matrix in found.matrices.values())
            if found.has_stacked_experts or (routed and not scheme_of(self.recipe.quantize).experts_reload):
                notes.append(
                    f"transformers cannot read this model's routed experts in {self.recipe.quantize.scheme}; engines"
                    " with one module per expert, such as vLLM, can. The proofs of the result do not load the model"
                    " with transformers."
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
            pruned_sizes(self.checkpoint, kept)[1],
        )

    def quantized_nbytes(self, candidate: Candidate) -> int | None:
        """Bytes of the quantized checkpoint, or None where the recipe quantizes nothing."""
        if self.recipe.quantize.scheme is None and self.recipe.quantize.recipe is None:
            return None
        return quantized_bytes(self.checkpoint, self.recipe.quantize, kept=self.kept(candidate))


def make_plan(
    loaded: LoadedRecipe,
    definitions: Sequence[StageDefinition],
    *,
    download: bool = False,
    observation: Path | None = None,
) -> Plan:
    """The plan of a recipe against its checkpoint and the store; of a hub model that is not in the cache, from its
    metadata.

    `definitions`: the stages, each after those that it reads. `download` fetches the hub model first: a run needs it, a
    plan does not. `observation`: the directory of one made elsewhere, which takes the place of observing; its content
    is its key, whatever the recipe's calibration says. Raises RecipeError with every contradiction between recipe and
    checkpoint at its line, UnusableError for the checkpoint.
    """
    recipe = loaded
    if str(loaded.directory) not in sys.path:
        sys.path.append(str(loaded.directory))  # `saliency.criterion: module:function` finds a module beside its recipe
    checkpoint = _checkpoint(loaded, observation, download)
    layout = checkpoint.layout
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
                        f"observe, but --observation {observation} does not have the multi-token-prediction layers"
                        f" {ranges(sorted(layout.mtp))}. Choose drop or auto, or give an observation that has them.",
                    )
                ]
            )
        )
    identities = Identities.of(loaded, checkpoint, grid)
    made = Plan(loaded, tuple(definitions), checkpoint, grid, identities, machine_memory(), imported, mtp)
    if made.estimates.placement == "streaming" and (limits := written_text_gates(loaded)):
        raise loaded.located(RecipeError([_never_generated(*each) for each in limits]))
    made = made.anew()
    if problem := _streamed_knockouts(made):
        raise loaded.located(RecipeError([problem]))
    return made


def _streamed_knockouts(plan: Plan) -> Problem | None:
    """Forwards begin behind every layer of a model that is in memory."""
    running = [stage for stage in plan.stages if stage.name == "knockout" and stage.must_run]
    if not running or plan.estimates.placement == "resident":
        return None
    needed = human_bytes(plan.estimates.footprints["resident"].device)
    return Problem(
        "saliency.criterion",
        "found a criterion of knock-outs, which are measured on a model that is in memory as a whole, but the layers of"
        f" this one stream (in memory it takes {needed}). Choose a criterion that the observation alone decides, or a"
        " machine that holds the model.",
    )


def _never_generated(field: str, metric: str) -> Problem:
    return Problem(
        f"evaluate.{field}.{metric}",
        "is a limit on generated text, but this model does not fit into memory, and one that is streamed layer by layer"
        " generates none. Remove the limit, or run where the model fits (runtime.placement: resident).",
    )


def _checkpoint(loaded: LoadedRecipe, observation: Path | None, download: bool) -> Checkpoint:
    """The recipe's checkpoint. Raises UnusableError where it cannot be used and the recipe is right otherwise, else
    RecipeError with everything that is known to be wrong."""
    try:
        checkpoint = model_checkpoint(loaded.model, loaded.directory, download=download)
        require_readable(checkpoint)
        return checkpoint
    except UnusableError as error:
        if problems := recipe_problems(loaded, observation):
            raise loaded.located(
                RecipeError([*problems, Problem("model.source", str(error).removeprefix("model.source: "))])
            ) from None
        raise


def _judged(plan: Plan) -> Plan:
    """With the winner of an evaluation that is in the store: judged well enough to go on, or the run stops before
    it."""
    found = next((stage.artifact for stage in plan.stages if stage.name == "evaluate"), None)
    return plan if plan.winner is not None or found is None else plan.decided(found.summary["chosen"])


def _task_files(loaded: LoadedRecipe) -> dict[str, str]:
    """Content of the task files beside the recipe: another content is another benchmark."""
    spec = loaded.evaluate.lm_eval
    return {
        task: digest_file(loaded.directory / task)
        for task in (spec.tasks if spec else ())
        if (loaded.directory / task).is_file()
    }


def _own_criteria(grid: Sequence[Candidate], controls: Sequence[str]) -> dict[str, str]:
    """A user's own criteria are code: their files' hashes belong to the decision."""
    names = dict.fromkeys([*(candidate.criterion for candidate in grid), *controls])
    return {name: fingerprint for name in names if (fingerprint := criterion_fingerprint(name))}
