"""verify: checks the written directories on disk: proofs in a fresh process, then final numbers on held-out rows
reserved for them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.atomic_files import write_json
from reapkit.core.errors import StageFailed
from reapkit.core.formatting import human_experts
from reapkit.core.measurements import load_facts, save_facts
from reapkit.evaluation.gates import UNION
from reapkit.evaluation.metrics.table import in_view
from reapkit.evaluation.task_benchmarks import run_benchmarks
from reapkit.pipeline.stages.context import Context
from reapkit.pipeline.stages.evaluate import load_packs
from reapkit.pipeline.stages.final_verdict import judged
from reapkit.pipeline.stages.measured import (
    LABELS,
    VERIFY_VERSION,
    continuing,
    equal_bytes_control,
    fitting,
    measures_of,
    named_directories,
    proofs_of,
    rounded_as,
    speed_of,
    tasks_of,
    verified,
)
from reapkit.planning import stage_disk
from reapkit.planning.plan import Plan
from reapkit.planning.stage_definitions import StageDefinition
from reapkit.recipe.schema import LmEvalSpec
from reapkit.selection.selection import Selection

if TYPE_CHECKING:
    from reapkit.evaluation.directory import Yardstick
    from reapkit.evaluation.metrics.signals import PositionSignals


PROBE_TOKENS = 64


def run(context: Context) -> dict[str, Any]:
    directories = {LABELS[stage]: context.inputs[stage].payload for stage in LABELS if stage in context.inputs}
    kept, named = context.measurements, named_directories(context.inputs)
    proofs = kept.get(
        proofs_of(context.plan, context.inputs), lambda work: _prove(context, directories), save_facts, load_facts
    )
    yardstick, (final, result) = _yardstick(context), list(directories.items())[-1]
    metrics = {"base": yardstick.base_metrics}
    for name, directory in directories.items():
        metrics[name] = yardstick.metrics(
            yardstick.signals(name, named[name], partial(_measured, context, yardstick, name, directory))
        )
    rows = [
        _row(name, context.model_directory if name == "base" else directories[name], metrics[name]) for name in metrics
    ]
    control = _equal_bytes(context, yardstick, result) if context.recipe.evaluate.equal_bytes else None
    compared = {"base": context.model_directory, final: result}
    throughput = _throughput(context, compared)
    benchmarks = _benchmarks(context, compared)
    continuations = {name: _continuations(context, name, directories[name]) for name in continuing(context.plan, named)}
    verdict, results, advice = judged(context, metrics, continuations)
    write_json(
        context.payload / "verify.json",
        {
            "rows": rows,
            "metrics": metrics,
            "equal_bytes": control,
            "throughput": throughput,
            "proofs": proofs,
            "gates": results,
            "verdict": verdict,
            "advice": advice,
            "lm_eval": benchmarks,
            "continuations": continuations.get("quantized"),
        },
    )
    return {
        "rows": rows,
        "equal_bytes": control and _control_row(control, rows[0]),
        "proofs": len(proofs),
        "verdict": verdict,
        "advice": advice,
    }


def _yardstick(context: Context) -> Yardstick:
    """The base on rows that no decision has seen; the model leaves memory before the next one is loaded."""
    from reapkit.evaluation.candidates import eaft_settings
    from reapkit.evaluation.directory import Yardstick
    from reapkit.evaluation.streaming import yardstick_streaming
    from reapkit.model.loading import load_model
    from reapkit.model.streaming.layers import LayeredModel

    recipe, packs = context.recipe, load_packs(context)
    where = {"device": context.device, "trust_remote_code": recipe.model.trust_remote_code}
    common = {
        "eaft": eaft_settings(recipe.saliency, recipe.observe),
        "measures": measures_of(context.plan, context.inputs["packs"], context.measurements),
        "batch_tokens": recipe.runtime.batch_tokens,
        "progress": context.progress,
    }
    if context.streams:
        return yardstick_streaming(
            lambda: LayeredModel(context.model_directory, **where), packs, **common, **context.streaming
        )
    return Yardstick.of(lambda: load_model(context.model_directory, **where), packs, **common)


def _measured(context: Context, yardstick: Yardstick, name: str, directory: Path) -> Mapping[int, PositionSignals]:
    """What a directory says beside the base, by row length; a quantized one that no loader here takes apart is unpacked
    to disk first."""
    from reapkit.evaluation.streaming import measure_streaming
    from reapkit.model.streaming.layers import LayeredModel
    from reapkit.quantization.quiet import quiet

    where = {"device": context.device, "trust_remote_code": context.recipe.model.trust_remote_code}
    with quiet():  # compressed-tensors draws bars of its own while it unpacks
        directory = _readable(context, name, directory)
        if context.streams:
            return measure_streaming(
                yardstick, LayeredModel(directory, **where), progress=context.progress, **context.streaming
            )
        return yardstick.measure_directory(directory, title=f"measure {name}", progress=context.progress, **where)


def _readable(context: Context, name: str, directory: Path) -> Path:
    """The directory itself, or the plain weights that it stands for, written once."""
    from reapkit.quantization.dense import write_dense

    if name != "quantized" or not _needs_dense(context):
        return directory
    plain = context.work / "dense"
    if not (plain / "config.json").is_file():
        write_dense(context.inputs["prune"].payload, directory, context.recipe.quantize, plain, context.progress)
    return plain


def _needs_dense(context: Context) -> bool:
    """Packed weights are read a layer at a time, and in formats that transformers does not know, only after they are
    unpacked to disk."""
    facts = context.inputs["quantize"].summary
    return context.recipe.quantize.recipe is None and (
        context.streams or not facts.get("experts_reload_in_transformers", True)
    )


def _equal_bytes(context: Context, yardstick: Yardstick, result: Path) -> dict[str, Any]:
    """The unpruned model rounded to about the result's bytes, measured as the result is; without `metrics` where no
    scheme is near."""
    from reapkit.quantization.quiet import quiet
    from reapkit.quantization.rounded import write_rounded

    found = equal_bytes_control(context.plan, result)
    if found.spec is None:
        return found.to_json() | {"metrics": None}
    spec, rounded, title = found.spec, context.work / "equal-bytes", f"{found.scheme}, unpruned"

    def measured() -> Mapping[int, PositionSignals]:
        shutil.rmtree(rounded, ignore_errors=True)
        with quiet():
            write_rounded(context.plan.checkpoint, spec, rounded, device=context.device, progress=context.progress)
        signals = _measured(context, yardstick, title, rounded)
        shutil.rmtree(rounded)
        return signals

    signals = yardstick.signals(str(found.scheme), rounded_as(spec), measured)
    return found.to_json() | {"metrics": yardstick.metrics(signals)}


def _control_row(control: dict[str, Any], base: dict[str, Any]) -> dict[str, Any] | None:
    """The control as a line of the final table."""
    if control["metrics"] is None:
        return None
    union = control["metrics"][max(control["metrics"], key=int)][UNION]
    return {
        "name": f"unpruned, {control['scheme']}",
        "experts": base["experts"],
        "bytes": control["bytes"],
        **{metric.name: union[metric.name]["value"] for metric in in_view("final")},
    }


def _throughput(context: Context, directories: dict[str, Path]) -> list[dict[str, Any]]:
    """Speed and memory of base and result, as many tokens as the model has positions for."""
    from reapkit.evaluation.throughput import measure_throughput

    if context.recipe.evaluate.throughput is None:
        return []
    spec = fitting(context.plan, context.recipe.evaluate.throughput)
    skip = (
        dict.fromkeys(directories, "the model does not fit into this machine's memory, so transformers cannot load it")
        if context.streams
        else {}
    )
    if "quantized" in directories and _needs_dense(context):
        skip |= {"quantized": skip.get("quantized", "transformers cannot load this scheme's routed experts")}

    def measured(work: Path | None) -> list[dict[str, Any]]:
        with context.progress.task("throughput"):
            return measure_throughput(
                directories,
                spec,
                device=context.device,
                skip=skip,
                trust_remote_code=context.recipe.model.trust_remote_code,
            )

    return context.measurements.get(speed_of(context.plan, context.inputs, spec), measured, save_facts, load_facts)


def _prove(context: Context, directories: dict[str, Path]) -> list[dict[str, Any]]:
    """Raises StageFailed naming the first proof that does not hold."""
    from reapkit.evaluation.proofs.prove import Request, prove

    recipe, winner = context.recipe, context.inputs["prune"].summary["candidate"]
    request = Request(
        context.model_directory,
        directories,
        Selection.load(context.inputs["select"].payload / "candidates" / winner),
        context.device,
        quantize=recipe.quantize if "quantized" in directories else None,
        probe=_probe(context),
        repaired=context.inputs["repair"].payload / winner if "repair" in context.inputs else None,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    with context.progress.task("proofs in a fresh process"):
        proofs = [asdict(proof) for proof in prove(request)]
    if failed := [proof for proof in proofs if not proof["passed"]]:
        write_json(context.payload / "verify.json", {"proofs": proofs})
        raise StageFailed(
            f"verify: {len(failed)} of {len(proofs)} proofs failed. The first is {failed[0]['name']} of"
            f" {failed[0]['directory']}: {failed[0]['detail']}"
        )
    return proofs


def _benchmarks(context: Context, directories: dict[str, Path]) -> dict[str, Any] | None:
    """Task benchmarks of base and result, lm-eval's own output kept beside verify.json."""
    spec = context.recipe.evaluate.lm_eval
    if spec is None:
        return None
    found = {}
    for name, directory in directories.items():
        found[name], output = context.measurements.get(
            tasks_of(context.plan, context.inputs, name, spec),
            partial(_tested, context, spec, name, directory),
            _save_tasks,
            lambda kept: (load_facts(kept), kept / "lm_eval"),
        )
        shutil.copytree(output, context.payload / "lm_eval" / name, dirs_exist_ok=True)
    return found


def _tested(
    context: Context, spec: LmEvalSpec, name: str, directory: Path, work: Path | None
) -> tuple[dict[str, Any], Path]:
    """The numbers of one directory, and where lm-eval's output lies."""
    from reapkit.quantization.quiet import quiet

    with quiet():
        directory = _readable(context, name, directory)
    beside = context.plan.loaded.directory
    output = (work or context.work) / "lm_eval"
    return run_benchmarks(
        directory,
        [str(file) if (file := beside / task).is_file() else task for task in spec.tasks],
        output,
        limit=spec.limit,
        device=context.device,
        trust_remote_code=context.recipe.model.trust_remote_code,
    ), output


def _save_tasks(found: tuple[dict[str, Any], Path], directory: Path) -> None:
    facts, output = found
    save_facts(facts, directory)
    shutil.move(output, directory / "lm_eval")


def _continuations(context: Context, name: str, directory: Path) -> dict[str, Any] | None:
    """A directory's continuations of the prompts that base and candidates continued, beside the base's; None where
    there are no prompts."""
    from reapkit.calibration.identity import tokenizer_identity
    from reapkit.evaluation.bench import packs_of_part
    from reapkit.evaluation.directory import continued
    from reapkit.model.loading import load_model, load_tokenizer
    from reapkit.quantization.quiet import quiet

    where = {"device": context.device, "trust_remote_code": context.recipe.model.trust_remote_code}
    spec, packs = context.recipe.evaluate.generation, packs_of_part(load_packs(context), "decide")
    assert spec is not None, "a directory continues what candidates continued"
    if not packs:
        return None
    with quiet():
        return continued(
            lambda: _readable(context, name, directory),
            lambda: load_model(context.model_directory, **where),
            packs[max(packs)],
            spec,
            load_tokenizer(context.model_directory) if tokenizer_identity(context.model_directory) else None,
            **where,
            batch_tokens=context.recipe.runtime.batch_tokens,
            measures=measures_of(context.plan, context.inputs["packs"], context.measurements),
            of=named_directories(context.inputs)[name],
            title=f"generate {name}",
            progress=context.progress,
        )


def _probe(context: Context) -> list[list[int]]:
    """Two real rows on which logits are compared."""
    tokens = next(iter(load_packs(context).values()))
    rows = [tokens.row(index).input_ids[:PROBE_TOKENS].tolist() for index in range(min(2, tokens.num_rows))]
    return [row[: min(map(len, rows))] for row in rows]


def _row(name: str, directory: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """A line of the final table, from the longest rows; the base is its own reference."""
    checkpoint, groups = Checkpoint.open(directory), metrics[max(metrics, key=int)]
    values = {
        group: {
            metric.name: found[metric.name]["value"] if metric.name in found else metric.same_as_base
            for metric in in_view("final")
        }
        for group, found in groups.items()
    }
    experts = {index: layer.num_experts for index, layer in checkpoint.layout.layers.items()}
    return {
        "name": name,
        "experts": human_experts(experts),
        "bytes": checkpoint.nbytes,
        "parameters": checkpoint.numel,
        **values[UNION],
        "per_source": {group: found for group, found in values.items() if group != UNION},
    }


def _content(plan: Plan) -> dict[str, Any]:
    return {"task_files": plan.identities.task_files} if plan.identities.task_files else {}


STAGE = StageDefinition(
    name="verify",
    version=VERIFY_VERSION,
    run=run,
    writes=stage_disk.verify,
    measures=verified,
    file="verify.json",
    fields=(
        "evaluate.gates_quantized",
        "evaluate.generation",
        "evaluate.lm_eval",
        "evaluate.throughput",
        "evaluate.equal_bytes",
        "quantize.group_size",
        "quantize.ignore",
    ),
    content=_content,
    inputs=lambda recipe: ("packs", "select", "repair", "prune", "quantize"),
)
