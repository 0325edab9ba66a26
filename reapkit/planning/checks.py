"""Finds all contradictions between a recipe and its checkpoint before any weight is read. Torch-free."""

from __future__ import annotations

from pathlib import Path

from reapkit.calibration.builtin import generators
from reapkit.calibration.first_rows import first_row_problems
from reapkit.calibration.shares import share_problems
from reapkit.checkpoint.architecture import text_config
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.expert_layout import Layout
from reapkit.checkpoint.mtp_support import why_unobserved
from reapkit.core.errors import Problem, RecipeError
from reapkit.evaluation.gates import resolve
from reapkit.evaluation.metrics.table import is_generation
from reapkit.quantization.checks import check_quantize
from reapkit.recipe.error_messages import closest
from reapkit.recipe.loading import LoadedRecipe
from reapkit.recipe.schema import Recipe
from reapkit.selection.candidates import Candidate, candidates
from reapkit.selection.criteria.registry import criterion_problem, described


def checked_candidates(
    loaded: LoadedRecipe, checkpoint: Checkpoint, layout: Layout, observation: Path | None
) -> tuple[Candidate, ...]:
    """The concrete candidates; every contradiction of recipe and checkpoint is raised at once."""
    problems, grid = recipe_problems(loaded, observation), ()
    try:
        grid = candidates(loaded.prune, loaded.saliency, checkpoint.architecture, tuple(layout.layers))
    except RecipeError as error:
        problems += error.problems
    problems += check_quantize(checkpoint, loaded.quantize) + _length_problems(loaded, checkpoint)
    problems += _unavailable(loaded, layout, checkpoint, observation)
    if problems:
        raise loaded.located(RecipeError(list(dict.fromkeys(problems))))
    return grid


def recipe_problems(loaded: LoadedRecipe, observation: Path | None) -> list[Problem]:
    """Every contradiction that the recipe shows without its checkpoint; with an `observation` made elsewhere nothing
    needs to be collected."""
    problems = _candidate_problems(loaded) + _source_problems(loaded) + _mix_problems(loaded)
    problems += [] if observation is not None else _data_problems(loaded)
    problems += [] if observation is not None else _unmeasured(loaded)
    problems += share_problems(loaded.calibration, loaded.evaluate, calibrates=observation is None)
    problems += _unmeasured_gates(loaded) + _missing_tasks(loaded) + _gate_problems(loaded)
    problems += [
        problem
        for i, name in enumerate(loaded.evaluate.controls)
        if (problem := criterion_problem(name, f"evaluate.controls[{i}]"))
    ]
    return list(dict.fromkeys(problems))


def _candidate_problems(recipe: Recipe) -> list[Problem]:
    try:
        candidates(recipe.prune, recipe.saliency)
    except RecipeError as error:
        return error.problems
    return []


def _data_problems(loaded: LoadedRecipe) -> list[Problem]:
    """Local data that is not there, is empty or has other columns than the recipe names."""
    listed = {"calibration.mix": loaded.calibration.mix, "evaluate.extra_packs": loaded.evaluate.extra_packs}
    places = {f"{path}[{i}]": entry for path, entries in listed.items() for i, entry in enumerate(entries)}
    return [
        problem for place, entry in places.items() for problem in first_row_problems(entry, place, loaded.directory)
    ]


def _mix_problems(recipe: Recipe) -> list[Problem]:
    """Post-hoc weights of sources that there are not."""
    names = [entry.name for entry in recipe.calibration.mix]
    return [
        Problem(
            f"saliency.mix.{name}",
            f"no source of calibration.mix has this name.{closest(name, names)} Allowed: {', '.join(names)}.",
        )
        for name in recipe.saliency.mix or {}
        if name not in names
    ]


def _gate_problems(recipe: Recipe) -> list[Problem]:
    """Presets and limits by source that cannot be resolved."""
    problems: list[Problem] = []
    sources = [entry.name for entry in (*recipe.calibration.mix, *recipe.evaluate.extra_packs)]
    for gates in (recipe.evaluate.gates, recipe.evaluate.gates_quantized):
        try:
            resolve(gates if gates is None or isinstance(gates, str) else gates.model_dump(exclude_none=True), sources)
        except RecipeError as error:
            problems += error.problems
    return problems


def _source_problems(recipe: Recipe) -> list[Problem]:
    """Packaged sources that exist, and a name of its own for every source."""
    mix, extra, known = (
        recipe.calibration.mix,
        recipe.evaluate.extra_packs,
        [f"builtin:{name}" for name in generators.SOURCES],
    )
    places = [(f"calibration.mix[{i}]", entry) for i, entry in enumerate(mix)] + [
        (f"evaluate.extra_packs[{i}]", entry) for i, entry in enumerate(extra)
    ]
    problems = [
        Problem(
            f"{place}.source",
            f"found '{entry.source}', which is not built in.{closest(entry.source, known)} Allowed:"
            f" {', '.join(known)}.",
        )
        for place, entry in places
        if entry.source.startswith("builtin:") and entry.source not in known
    ]
    taken = [entry.name for entry in mix]
    for i, entry in enumerate(extra):
        if entry.name in taken:
            problems.append(
                Problem(
                    f"evaluate.extra_packs[{i}].name",
                    f"'{entry.name}' is the name of another source. Give every source its own name.",
                )
            )
        taken.append(entry.name)
    return problems


def _unmeasured(recipe: Recipe) -> list[Problem]:
    """Criteria that need what the observation would not collect, and what they refuse of the recipe themselves."""
    named = {path: described(name) for path, name in _criteria(recipe).items()}
    missing = [
        Problem(path, material.unmeasured(criterion.name))
        for path, criterion in named.items()
        for material in criterion.materials
        if not material.collected(recipe.observe)
    ]
    refused = [problem for criterion in named.values() if criterion.problems for problem in criterion.problems(recipe)]
    return missing + list(dict.fromkeys(refused))


def _criteria(recipe: Recipe) -> dict[str, str]:
    """Where criteria are named -> their names."""
    grid = recipe.prune.candidates.criterion if recipe.prune.candidates else None
    named = (
        {f"prune.candidates.criterion[{i}]": name for i, name in enumerate(grid)}
        if grid
        else {"saliency.criterion": recipe.saliency.criterion}
    )
    return named | {f"evaluate.controls[{i}]": name for i, name in enumerate(recipe.evaluate.controls)}


def _unmeasured_gates(recipe: Recipe) -> list[Problem]:
    """Limits, of those that the user wrote, on text that would never be generated: the verdict could only be
    undecided."""
    if recipe.evaluate.generation is not None:
        return []
    return [
        Problem(
            f"evaluate.{field}.{metric}",
            "is a limit on generated text, but the recipe generates no text. Set evaluate.generation, or remove it.",
        )
        for field, metric in written_text_gates(recipe)
    ]


def written_text_gates(recipe: Recipe) -> list[tuple[str, str]]:
    """Field and metric of each limit on generated text that the recipe itself sets; those of a preset are not
    required."""
    limits = {field: getattr(recipe.evaluate, field) for field in ("gates", "gates_quantized")}
    return [
        (field, metric)
        for field, found in limits.items()
        if found is not None and not isinstance(found, str)
        for metric in sorted(found.model_dump(exclude_none=True))
        if is_generation(metric)
    ]


def _missing_tasks(loaded: LoadedRecipe) -> list[Problem]:
    """Task files that are not there; names of lm-eval's own tasks only lm-eval knows."""
    spec = loaded.evaluate.lm_eval
    return [
        Problem(
            f"evaluate.lm_eval.tasks[{i}]",
            f"the file '{task}' does not exist. Give a path relative to the recipe, or a task name that lm-eval knows.",
        )
        for i, task in enumerate(spec.tasks if spec else ())
        if task.endswith((".yaml", ".yml")) and not (loaded.directory / task).is_file()
    ]


def _unavailable(recipe: Recipe, layout: Layout, checkpoint: Checkpoint, observation: Path | None) -> list[Problem]:
    """What the language can say and this version cannot do: refused, never silently left out."""
    problems = []
    if recipe.prune.repair is not None and checkpoint.quantization:
        problems.append(
            Problem(
                "prune.repair",
                "ridge re-fits plain weights, but this checkpoint is quantized. Start from the model's bfloat16"
                " version, or remove prune.repair.",
            )
        )
    why = why_unobserved(checkpoint, layout, trust_remote_code=recipe.model.trust_remote_code)
    if recipe.prune.mtp == "observe" and observation is None and why is not None:
        problems.append(
            Problem(
                "prune.mtp", f"observe, but {why}. Choose drop, or auto, which drops blocks that cannot be observed."
            )
        )
    return problems


def _length_problems(recipe: Recipe, checkpoint: Checkpoint) -> list[Problem]:
    """Rows the user made longer than the model's positions would be read where it was never trained."""
    longest = text_config(checkpoint.config).get("max_position_embeddings")
    calibration, packs = recipe.calibration, recipe.evaluate.packs
    lengths = {"calibration.max_length": calibration.max_length} if "max_length" in calibration.model_fields_set else {}
    if "lengths" in packs.model_fields_set:
        lengths |= {f"evaluate.packs.lengths[{i}]": length for i, length in enumerate(packs.lengths)}
    return [
        Problem(
            path,
            f"{length}, but the model reads at most {longest} tokens (max_position_embeddings). Choose at most"
            f" {longest}.",
        )
        for path, length in lengths.items()
        if isinstance(longest, int) and length > longest
    ]
