"""Names what `evaluate` and `verify` measure, once their inputs are there, without measuring anything. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reapkit.calibration.packing import PARTS
from reapkit.checkpoint.architecture import text_config
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.artifact_store import Artifact
from reapkit.core.mapped_safetensors import map_tensors
from reapkit.core.measurements import KEPT_NOWHERE, Measure, Measurements
from reapkit.evaluation.equal_bytes import EqualBytes, equal_bytes
from reapkit.evaluation.gates import resolve
from reapkit.evaluation.measures import BASE, Measures, Of, mask
from reapkit.evaluation.metrics.table import is_generation
from reapkit.pipeline.stages.select import load_selections
from reapkit.planning.plan import Plan
from reapkit.recipe.schema import LmEvalSpec, QuantizeSpec, ThroughputSpec

EVALUATE_VERSION, VERIFY_VERSION = 4, 6
"""Of the stages: another version measures everything anew."""
LABELS = {"prune": "pruned", "quantize": "quantized"}
"""What the directories are called that stages write."""


def measures_of(plan: Plan, packs: Artifact, kept: Measurements = KEPT_NOWHERE) -> Measures:
    """The measurements of the plan's model on these packs."""
    spec = plan.recipe.calibration
    how = {"score": spec.score, "packing": spec.packing}
    files = packs.files or {}
    tokens = {length: files.get(f"{length}/tokens.safetensors") for length in plan.recipe.evaluate.packs.lengths}
    rows = {length: how | {"sha256": found.sha256 if found else packs.key} for length, found in tokens.items()}
    return Measures(EVALUATE_VERSION, plan.identities.model, rows, plan.recipe.observe.entropy_top_k, kept)


def parts_of(packs: Artifact, lengths: Sequence[int]) -> dict[int, list[str]]:
    """By row length the parts that have rows."""
    found = {length: map_tensors(packs.payload / str(length) / "tokens.safetensors")["row_part"] for length in lengths}
    return {length: [part for i, part in enumerate(PARTS) if (rows == i).any()] for length, rows in found.items()}


def weight_files(inputs: Mapping[str, Artifact], name: str) -> dict[str, str] | None:
    """sha256 of the files of a candidate's re-fitted weights; None where nothing is repaired."""
    if "repair" not in inputs:
        return None
    files = inputs["repair"].files or {}
    mine = {file: facts.sha256 for file, facts in files.items() if file.startswith(f"{name}/")}
    return {file.partition("/")[2]: sha256 for file, sha256 in mine.items()} or {"repair": inputs["repair"].key}


def hidden_of(measures: Measures, packs: Artifact) -> list[Measure]:
    """The base's hidden states on every part of every pack."""
    parts = parts_of(packs, list(measures.rows))
    return [measures.hidden(part, length) for length, found in parts.items() for part in found]


def evaluated(plan: Plan, inputs: Mapping[str, Artifact]) -> list[Measure]:
    """What is measured at most, without smaller cuts: a candidate larger than one that passes is not tried, and only
    the chosen one is confirmed and has controls."""
    spec, index, packs = plan.recipe.evaluate, inputs["select"].summary, inputs["packs"]
    measures, parts = measures_of(plan, packs), parts_of(packs, spec.packs.lengths)
    decided = load_selections(inputs["select"].payload, [*index["candidates"], *index["controls"]])
    architecture = plan.checkpoint.architecture
    of: dict[str, Of] = {BASE: BASE}
    of |= {name: mask(each.decoder(architecture), weight_files(inputs, name)) for name, each in decided.items()}
    found = hidden_of(measures, packs)
    for name in of:
        places = [(part, length) for length, each in parts.items() for part in each]
        judged = [place for place in places if name not in index["controls"] or place[0] == "decide"]
        found += [measures.signals(*place, name, of[name]) for place in judged]
        if spec.generation is not None and plan.estimates.placement == "resident" and name not in index["controls"]:
            found.append(measures.continuations(max(parts), name, of[name], spec.generation))
    return found


# ---------------------------------------------------------------------------------------------- the final directory


def named_directories(inputs: Mapping[str, Artifact]) -> dict[str, dict[str, Any]]:
    """What names the written directories, by label."""
    return {LABELS[stage]: {stage: inputs[stage].key, "verify": VERIFY_VERSION} for stage in LABELS if stage in inputs}


def continuing(plan: Plan, named: Mapping[str, Any]) -> list[str]:
    """The written directories whose continuations are looked at: the quantized one, beside those of base and mask. The
    pruned one's are the mask's, and written anew only where its gates judge them. None of a model that is streamed."""
    spec = plan.recipe.evaluate
    if spec.generation is None or plan.estimates.placement != "resident":
        return []
    limits = spec.gates_quantized
    gates = resolve(limits if limits is None or isinstance(limits, str) else limits.model_dump(exclude_none=True))
    judged = any(is_generation(gate.metric) for gate in gates)
    return [name for name in named if name == "quantized" or judged]


def rounded_as(spec: QuantizeSpec) -> dict[str, Any]:
    """What names the unpruned model rounded to nearest."""
    settings = spec.model_dump(mode="json", include={"scheme", "group_size", "ignore"})
    return {"rounded": settings, "verify": VERIFY_VERSION}


def _of_directories(plan: Plan, kind: str, title: str, **spec: Any) -> Measure:
    return Measure(kind, VERIFY_VERSION, {"model": plan.identities.model, **spec}, title)


def proofs_of(plan: Plan, inputs: Mapping[str, Artifact]) -> Measure:
    """The proofs of the written directories."""
    return _of_directories(plan, "proofs", "proofs", directories=named_directories(inputs), packs=inputs["packs"].key)


def speed_of(plan: Plan, inputs: Mapping[str, Artifact], spec: ThroughputSpec) -> Measure:
    """Speed and memory of the base and the final directory, measured side by side."""
    final = list(named_directories(inputs).items())[-1]
    return _of_directories(plan, "throughput", "throughput", final=final, spec=spec.model_dump(mode="json"))


def tasks_of(plan: Plan, inputs: Mapping[str, Artifact], name: str, spec: LmEvalSpec) -> Measure:
    """Task benchmarks of the base, or of a written directory by its label."""
    of = named_directories(inputs).get(name, BASE)
    files = plan.identities.task_files
    settings = spec.model_dump(mode="json")
    return _of_directories(plan, "benchmarks", f"{name} (tasks)", directory=of, spec=settings, task_files=files)


def verified(plan: Plan, inputs: Mapping[str, Artifact]) -> list[Measure]:
    """All that is measured."""
    spec, named = plan.recipe.evaluate, named_directories(inputs)
    found = [proofs_of(plan, inputs)]
    measures = measures_of(plan, inputs["packs"])
    of: dict[str, Of] = {BASE: BASE, **named}
    final = [inputs[stage] for stage in LABELS if stage in inputs][-1]
    if spec.equal_bytes and (control := equal_bytes_control(plan, final.payload)).spec is not None:
        of[str(control.scheme)] = rounded_as(control.spec)
    parts = parts_of(inputs["packs"], spec.packs.lengths)
    for length, each in parts.items():
        found += [measures.signals(each[-1], length, name, what) for name, what in of.items()]
    if spec.generation is not None:
        for name in continuing(plan, named):
            found += [
                measures.continuations(max(parts), *each, spec.generation)
                for each in ((BASE, BASE), (name, named[name]))
            ]
    if spec.throughput is not None:
        found.append(speed_of(plan, inputs, fitting(plan, spec.throughput)))
    if spec.lm_eval is not None:
        found += [tasks_of(plan, inputs, name, spec.lm_eval) for name in (BASE, list(named)[-1])]
    return found


def equal_bytes_control(plan: Plan, result: Path) -> EqualBytes:
    """How the unpruned model comes nearest to the bytes of the result."""
    return equal_bytes(plan.checkpoint, plan.recipe.quantize, Checkpoint.open(result).nbytes)


def fitting(plan: Plan, spec: ThroughputSpec) -> ThroughputSpec:
    """No more tokens than the model has positions for."""
    longest = text_config(plan.checkpoint.config).get("max_position_embeddings")
    if not isinstance(longest, int):
        return spec
    new = max(1, min(spec.new_tokens, longest // 2))
    return spec.model_copy(
        update={"new_tokens": new, "prompt_tokens": max(1, min(spec.prompt_tokens, longest - new - 2))}
    )
