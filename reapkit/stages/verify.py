"""verify: the written directories as they are on disk: proofs in a fresh process, then final numbers on rows kept for this."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from reapkit.checkpoint import Checkpoint
from reapkit.errors import StageFailed
from reapkit.evaluate.candidates import eaft_settings
from reapkit.evaluate.directory import Yardstick
from reapkit.evaluate.streaming import measure_streaming, yardstick_streaming
from reapkit.evaluate.task_benchmarks import run_benchmarks
from reapkit.gates import UNION, GateResult, judge, overall
from reapkit.layout import read_layout
from reapkit.models import load_model
from reapkit.observe.layers import LayeredModel
from reapkit.quantize.dense import write_dense
from reapkit.quantize.quiet import quiet
from reapkit.selection import Selection
from reapkit.stages import Context
from reapkit.stages.evaluate import gates_of, load_packs
from reapkit.store import write_json
from reapkit.tables import human_experts
from reapkit.verify import Request, prove

PROBE_TOKENS = 64
HEADLINE = ("perplexity", "perplexity_ratio", "kl_mean", "top1_agreement")


def run(context: Context) -> dict[str, Any]:
    directories = {LABELS[stage]: context.inputs[stage].payload for stage in LABELS if stage in context.inputs}
    proofs = _prove(context, directories)
    yardstick = _yardstick(context)
    metrics = {"base": yardstick.base_metrics}
    for name, directory in directories.items():
        metrics[name] = _measured(context, yardstick, name, directory)
    benchmarks = _benchmarks(context, {"base": context.model_directory, list(directories)[-1]: list(directories.values())[-1]})
    rows = [_row(name, context.model_directory if name == "base" else directories[name], metrics[name]) for name in metrics]
    verdict, results, advice = _judge(context, metrics, list(directories)[-1])
    write_json(context.payload / "verify.json", {"rows": rows, "metrics": metrics, "proofs": proofs, "gates": results, "verdict": verdict,
                                                 "advice": advice, "lm_eval": benchmarks})
    return {"rows": rows, "proofs": len(proofs), "verdict": verdict, "advice": advice}


LABELS = {"prune": "pruned", "quantize": "quantized"}


def _yardstick(context: Context) -> Yardstick:
    """The base on rows that no decision has seen; the model leaves memory before the next one is loaded."""
    recipe, packs = context.recipe, load_packs(context)
    where = {"device": context.device, "trust_remote_code": recipe.model.trust_remote_code}
    common = {"eaft": eaft_settings(recipe.saliency, recipe.observe), "batch_tokens": recipe.runtime.batch_tokens, "progress": context.progress}
    if context.streams:
        return yardstick_streaming(LayeredModel(context.model_directory, **where), packs, **common, **context.streaming)
    return Yardstick.of(load_model(context.model_directory, **where), packs, work_directory=context.work, **common)


def _measured(context: Context, yardstick: Yardstick, name: str, directory: Path) -> dict[str, Any]:
    where = {"device": context.device, "trust_remote_code": context.recipe.model.trust_remote_code}
    if name == "quantized" and _needs_dense(context):
        write_dense(context.inputs["prune"].payload, directory, context.recipe.quantize, context.work / "dense", context.progress)
        directory = context.work / "dense"
    with quiet():  # compressed-tensors draws bars of its own while it unpacks
        if context.streams:
            return measure_streaming(yardstick, LayeredModel(directory, **where), progress=context.progress, **context.streaming)
        return yardstick.measure_directory(directory, title=f"measure {name}", progress=context.progress, **where)


def _needs_dense(context: Context) -> bool:
    """Packed weights are read a layer at a time, and in formats that transformers does not know, only after they are unpacked to disk."""
    facts = context.inputs["quantize"].summary
    return context.recipe.quantize.recipe is None and (context.streams or not facts.get("experts_reload_in_transformers", True))


def _prove(context: Context, directories: dict[str, Path]) -> list[dict[str, Any]]:
    """Raises StageFailed naming the first proof that does not hold."""
    recipe, winner = context.recipe, context.inputs["prune"].summary["candidate"]
    request = Request(context.model_directory, directories, Selection.load(context.inputs["select"].payload / "candidates" / winner),
                      context.device, quantize=recipe.quantize if "quantized" in directories else None,
                      probe=_probe(context), repaired=recipe.prune.repair is not None, trust_remote_code=recipe.model.trust_remote_code)
    with context.progress.task("proofs in a fresh process"):
        proofs = [asdict(proof) for proof in prove(request)]
    if failed := [proof for proof in proofs if not proof["passed"]]:
        write_json(context.payload / "verify.json", {"proofs": proofs})
        raise StageFailed(f"verify: {len(failed)} of {len(proofs)} proofs do not hold, first {failed[0]['directory']}, {failed[0]['name']}: "
                          f"{failed[0]['detail']}")
    return proofs


def _benchmarks(context: Context, directories: dict[str, Path]) -> dict[str, Any] | None:
    """Task benchmarks of base and result, lm-eval's own output kept beside verify.json."""
    spec, recipe = context.recipe.evaluate.lm_eval, context.recipe
    if spec is None:
        return None
    tasks = [str(recipe_file) if (recipe_file := context.plan.loaded.directory / task).is_file() else task for task in spec.tasks]
    return {name: run_benchmarks(directory, tasks, context.payload / "lm_eval" / name, limit=spec.limit, device=context.device,
                                 trust_remote_code=recipe.model.trust_remote_code) for name, directory in directories.items()}


def _probe(context: Context) -> list[list[int]]:
    """Two real rows on which logits are compared."""
    tokens = next(iter(load_packs(context).values()))
    rows = [tokens.row(index).input_ids[:PROBE_TOKENS].tolist() for index in range(min(2, tokens.num_rows))]
    return [row[:min(map(len, rows))] for row in rows]


def _row(name: str, directory: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """A line of the final table, from the longest rows; the base is its own reference."""
    checkpoint, groups = Checkpoint.open(directory), metrics[max(metrics, key=int)]
    same = {"perplexity_ratio": 1.0, "kl_mean": 0.0, "top1_agreement": 1.0}
    values = {group: {metric: found[metric]["value"] if metric in found else same[metric] for metric in HEADLINE}
              for group, found in groups.items()}
    experts = {index: layer.num_experts for index, layer in read_layout(checkpoint).layers.items()}
    return {"name": name, "experts": human_experts(experts), "bytes": checkpoint.nbytes, "parameters": checkpoint.numel, **values[UNION],
            "per_source": {group: found for group, found in values.items() if group != UNION}}


def _judge(context: Context, metrics: dict[str, Any], final: str) -> tuple[str, list[dict[str, Any]], str]:
    gates = gates_of(context.recipe.evaluate.gates_quantized, context)
    if not gates:
        return "not judged", [], ""
    results = judge(metrics[final], gates)
    verdict = overall(results)
    return verdict, [result.to_json() for result in results], "" if verdict == "pass" else _advice(verdict, results, context)


def _advice(verdict: str, results: list[GateResult], context: Context) -> str:
    """Which gate, by how much, and the cheapest thing to try next."""
    worst = next(result for result in results if result.verdict == verdict)
    scheme, schemes = context.recipe.quantize.scheme, ("W3A16", "W4A16", "W8A16")
    wider = schemes[schemes.index(scheme) + 1] if scheme in schemes[:-1] else None
    more = f"quantize.scheme: {wider}" if wider else "a smaller prune.ratio"
    finer = " or quantize.method: gptq" if context.recipe.quantize.method == "rtn" and wider else ""
    return f"evaluate.gates_quantized: {worst}. The cheapest next step is {more}{finer}."
