"""evaluate: measures the base and the candidates (as masks on the loaded model) on held-out packs; gates give the
verdict."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any

from reapkit.calibration.identity import tokenizer_identity
from reapkit.core.atomic_files import write_json
from reapkit.core.errors import RecipeError
from reapkit.evaluation.gates import Gate, resolve
from reapkit.evaluation.measures import mask
from reapkit.observation.observation import Observation
from reapkit.pipeline.stages.context import Context
from reapkit.pipeline.stages.measured import EVALUATE_VERSION, evaluated, hidden_of, measures_of, weight_files
from reapkit.pipeline.stages.repair import load_repaired
from reapkit.pipeline.stages.select import load_observation, load_selections
from reapkit.planning import stage_disk
from reapkit.planning.plan import Plan
from reapkit.planning.stage_definitions import StageDefinition
from reapkit.recipe.schema import Gates
from reapkit.selection.candidates import ratio_removing
from reapkit.selection.criteria.registry import BUILTIN, criterion
from reapkit.selection.decide import select_all

if TYPE_CHECKING:
    from reapkit.calibration.tokens import CalibrationTokens
    from reapkit.evaluation.bench import MaskedCandidate
    from reapkit.evaluation.candidates import SmallerCut


def run(context: Context) -> dict[str, Any]:
    from reapkit.evaluation.bench import MaskedCandidate
    from reapkit.evaluation.candidates import eaft_settings, evaluate
    from reapkit.evaluation.streaming import evaluate_streaming
    from reapkit.model.loading import load_model
    from reapkit.model.streaming.layers import LayeredModel

    recipe, spec = context.recipe, context.recipe.evaluate
    index = context.inputs["select"].summary
    decided = load_selections(context.inputs["select"].payload, [*index["candidates"], *index["controls"]])
    selections = {name: selection.decoder(context.plan.checkpoint.architecture) for name, selection in decided.items()}
    nbytes = {candidate.name: context.plan.pruned(candidate).nbytes for candidate in context.plan.candidates}
    weights = load_repaired(context, list(selections))
    masks = {
        name: {"weights": weights.get(name), "of": mask(selection, weight_files(context.inputs, name))}
        for name, selection in selections.items()
    }
    measures = measures_of(context.plan, context.inputs["packs"], context.measurements)
    tried = [MaskedCandidate(name, selections[name], nbytes[name], **masks[name]) for name in index["candidates"]]
    compared = {
        "controls": [
            MaskedCandidate(name, selections[name], control_of=candidate, **masks[name])
            for name, candidate in index["controls"].items()
        ],
        "eaft": eaft_settings(recipe.saliency, recipe.observe),
        "pack_samples": spec.packs.samples,
        "steps": _steps(context),
        "measures": measures,
        "batch_tokens": recipe.runtime.batch_tokens,
        "progress": context.progress,
    }
    where = {"device": context.device, "trust_remote_code": recipe.model.trust_remote_code}
    gates, packs = gates_of(spec.gates, context), load_packs(context)
    if context.streams:
        evaluation = evaluate_streaming(
            lambda: LayeredModel(context.model_directory, **where), packs, tried, gates, **compared, **context.streaming
        )
    else:
        evaluation = evaluate(
            lambda: load_model(context.model_directory, **where),
            packs,
            tried,
            gates,
            generation=spec.generation,
            tokenizer=_tokenizer(context),
            smaller_cut=_smaller_cut(context),
            **compared,
        )
    for each in hidden_of(measures, context.inputs["packs"]):  # further candidates are compared with them
        measures.kept.find(each, lambda directory: directory)
    write_json(context.payload / "evaluation.json", evaluation)
    decided[evaluation["chosen"]].save(context.payload)
    return {name: evaluation[name] for name in ("chosen", "verdict", "advice")}


def _steps(context: Context) -> dict[str, Any]:
    """What an advice may change: `{"grid": whether the recipe has one, "budget": its field, "same_size": [{"override",
    "why"}]}`, the last what loses less at the same size without another observation, most promising first."""
    recipe = context.recipe
    prune, saliency = recipe.prune, recipe.saliency
    same_size = []
    if saliency.reduction == "mean" and criterion(saliency.criterion).reduction == "mean":
        why = "rank by sums, not means: half the loss on small models (see README)"
        same_size.append({"override": "saliency.reduction=sum", "why": why})
    same_size += [
        {"override": f"saliency.criterion={name}", "why": f"rank by {name}, which this observation has measured"}
        for name, record in BUILTIN.items()
        if record.removal is not None
        and name != saliency.criterion
        and all(
            material.collected(recipe.observe) and material.stage in {stage.name for stage in context.plan.stages}
            for material in record.materials
        )
    ]
    if prune.repair is None and not context.plan.checkpoint.quantization:
        same_size.append({"override": "prune.repair=ridge", "why": "re-fit the kept experts, at the same size"})
    budget = next((name for name in ("ratio", "keep_ratio", "keep_experts") if getattr(prune, name) is not None), "")
    return {"grid": prune.candidates is not None, "budget": budget, "same_size": same_size}


def _searches(plan: Plan) -> bool:
    """Whether smaller cuts are tried after a rejection: where layers stream, or weights are re-fitted, each would take
    a pass of its own."""
    return plan.recipe.prune.repair is None and plan.estimates.placement == "resident"


def _smaller_cut(context: Context) -> SmallerCut | None:
    """Decides the recipe's candidates anew with fewer removals; None where each would have to be re-fitted first."""
    from reapkit.evaluation.bench import MaskedCandidate

    if not _searches(context.plan):
        return None
    plan, grid = context.plan, {candidate.name: candidate for candidate in context.plan.candidates}
    num_experts = max(plan.base.experts.values())

    @cache
    def observation() -> Observation:
        return load_observation(context)

    def smaller_cut(name: str, share: Fraction) -> MaskedCandidate | None:
        removed = int(max(plan.base.experts[layer] - kept for layer, kept in plan.kept(grid[name]).items()) * share)
        ratio = ratio_removing(removed, num_experts)
        smaller = grid[name].with_ratio(ratio)
        try:
            [selection] = select_all(
                observation(), context.recipe.saliency, context.recipe.prune, plan.checkpoint.architecture, (smaller,)
            )
        except RecipeError:  # nothing would be removed, or the caps leave no room
            return None
        size, said = plan.pruned(smaller).nbytes, f"{ratio.normalize():f}"
        return MaskedCandidate(smaller.name, selection, size, ratio=said, of=mask(selection))

    return smaller_cut


def _tokenizer(context: Context) -> Any:
    """The model's tokenizer; None where the calibration gave tokens and the model ships none."""
    from reapkit.model.loading import load_tokenizer

    return load_tokenizer(context.model_directory) if tokenizer_identity(context.model_directory) else None


def load_packs(context: Context) -> dict[int, CalibrationTokens]:
    """The held-out packs by row length."""
    from reapkit.calibration.tokens import CalibrationTokens

    payload = context.inputs["packs"].payload
    return {length: CalibrationTokens.load(payload / str(length)) for length in context.recipe.evaluate.packs.lengths}


def gates_of(gates: Gates | None, context: Context) -> tuple[Gate, ...]:
    """The recipe's gates with their preset resolved."""
    sources = [entry.name for entry in (*context.recipe.calibration.mix, *context.recipe.evaluate.extra_packs)]
    return resolve(gates if gates is None or isinstance(gates, str) else gates.model_dump(exclude_none=True), sources)


def _spoken(summary: Mapping[str, Any]) -> str:
    """What the end of the stage says; the reasons of a rejection come with the error."""
    return f". {summary['advice']}" if summary["verdict"] == "pass" else f": {summary['verdict']}"


STAGE = StageDefinition(
    name="evaluate",
    version=EVALUATE_VERSION,
    run=run,
    writes=stage_disk.evaluate,
    measures=evaluated,
    afterwards=lambda plan: "a rejection measures smaller cuts" if _searches(plan) else "",
    shows=lambda plan: ("evaluation.json", "selection.json"),
    directory="evaluation",
    fields=("evaluate.packs", "evaluate.extra_packs", "evaluate.gates", "evaluate.controls", "evaluate.generation"),
    inputs=lambda recipe: ("packs", "select", "repair"),
    waits_for=("observe", "knockout"),
    remark=_spoken,
)
