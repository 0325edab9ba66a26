"""Observations and runs made of numbers, in the shapes that the stages write; small, seeded, with specialised
experts."""

from __future__ import annotations

import numpy as np
import torch

from reapkit.observation.observation import MAXIMA, Observation, Trace
from reapkit.planning.plan import Sizes
from reapkit.recipe.schema import Recipe
from reapkit.report.facts import RunFacts, SourceModel, StageRow
from reapkit.selection.selection import LayerSelection, Selection

SOURCES = ("code", "tools", "prose", "math", "agentic")


def observation(
    layers: int = 4,
    experts: int = 16,
    sources: int = 3,
    top_k: int = 2,
    *,
    tokens: int = 2000,
    coactivation: bool = True,
    trace: bool = True,
    seed: int = 0,
) -> Observation:
    """Experts that prefer a source, late layers with larger outputs, and two experts of the first layer never
    routed."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    scored = torch.tensor([tokens * (index + 2) // 2 for index in range(sources)])
    preference = random(layers, sources, experts).pow(4) * 4 + 0.1
    rate = (random(layers, 1, experts).pow(2) + 0.05) * preference
    rate[0, :, [1, 5]] = 0
    rate = rate / rate.sum(2, keepdim=True)
    count = (rate * scored[None, :, None] * top_k).round()
    depth = torch.linspace(0.3, 2.5, layers, dtype=torch.float64)[:, None, None].pow(1.5)
    norm = (
        (random(layers, 1, experts) + 0.4 * preference.pow(0.5)) * depth * (1 + 2 * random(layers, 1, experts).pow(6))
    )
    gate = 0.15 + 0.3 * random(layers, 1, experts)
    mass = count * gate * norm
    highest = (norm * gate * (2 + 3 * random(layers, sources, experts)) * (count > 0)).float()
    together = None
    if coactivation:
        pairs = rate * scored[None, :, None] * top_k
        together = (
            (pairs[..., :, None] * pairs[..., None, :] / (scored * top_k)[None, :, None, None] * max(1, top_k - 1))
            .round()
            .long()
        )
        together.diagonal(dim1=-2, dim2=-1).zero_()
    parts = [1 / 16, 1 / 8, 1 / 4, 1 / 2]
    noise = [1 + 0.2 * (1 - part) / (16 * part) ** 0.5 * (2 * random(layers, sources, experts) - 1) for part in parts]
    return Observation(
        "qwen3_moe",
        tuple(range(layers)),
        experts,
        top_k,
        SOURCES[:sources],
        (scored * 1.6).long(),
        scored,
        {
            "count": count,
            "gate_sum": count * gate,
            "norm_sum": count * norm,
            "gate_norm_sum": mass,
            "gate_norm_sq_sum": mass * norm * gate * 1.2,
            "relative_sq_sum": mass * norm * gate * 0.012,
        },
        {name: highest.clone() for name in MAXIMA},
        together,
        {
            "count": torch.stack([(count * part).round() for part in parts]),
            "gate_norm_sum": torch.stack(
                [(count * part).round() * gate * norm * wobble for part, wobble in zip(parts, noise, strict=True)]
            ),
        },
        _trace(scored, experts, top_k, generator) if trace else None,
        {"model": "sha256:1b2c", "dtype": "bfloat16", "device": "cpu", "kernels": "eager", "entropy_top_k": 20},
    )


def _trace(scored: torch.Tensor, experts: int, top_k: int, generator: torch.Generator) -> Trace:
    total = int(scored.sum())
    source = torch.repeat_interleave(torch.arange(len(scored)), scored).to(torch.int16)
    h = torch.rand(total, generator=generator).pow(1.5)
    p = ((1 - h) * (0.6 + 0.4 * torch.rand(total, generator=generator))).clamp(0, 1)
    p[torch.rand(total, generator=generator) < 0.06] *= 0.1
    expert = torch.randint(0, experts, (total, top_k), generator=generator).to(torch.int16)
    return Trace(source, p, h, lambda layer: (expert.numpy(), np.full((total, top_k), layer + 1.0, np.float32)))


def selection(observed: Observation, drop: int, criterion: str = "reap") -> Selection:
    """The least salient `drop` experts of each layer by Σgn / N, the lowest of them protected in the last layer."""
    count, mass = (observed.statistics[name].sum(1) for name in ("count", "gate_norm_sum"))
    values = np.where(count > 0, mass / np.maximum(count, 1e-300), -np.inf)
    layers = {}
    for row, layer in enumerate(observed.layers):
        order = np.argsort(-values[row], kind="stable").tolist()[::-1]
        dropped = tuple(sorted(order[1 : drop + 1] if row == len(observed.layers) - 1 else order[:drop]))
        kept = tuple(expert for expert in range(observed.num_experts) if expert not in dropped)
        layers[layer] = LayerSelection(kept, dropped, tuple(values[row].tolist()), {})
    last = observed.layers[-1]
    return Selection(
        criterion,
        layers,
        None,
        {
            "candidate": "candidate",
            "allocation": "uniform",
            "formula": "Σgn / N",
            "reduction": "mean",
            "prior_count": 0.0,
            "mix": None,
            "never_routed": {"0": [1, 5]},
            "protected": {"super expert": {str(last): [order[0]]}, "core": {}},
            "near_ties": [],
            "eaft": None,
        },
    )


def recipe(sources: tuple[str, ...] = SOURCES[:3], ratio: str = "0.5") -> Recipe:
    known = {
        "code": "theblackcat102/evol-codealpaca-v1",
        "tools": "Salesforce/xlam-function-calling-60k",
        "prose": "builtin:prose",
        "math": "builtin:math",
        "agentic": "SWE-bench/SWE-smith-trajectories",
    }
    return Recipe.model_validate(
        {
            "version": 1,
            "name": "small-code-agentic",
            "description": "A small model for code and tool calling.",
            "model": {"source": "some-lab/Small-MoE", "revision": "0123abc"},
            "calibration": {
                "samples": 300,
                "max_length": 512,
                "mix": tuple({"name": name, "source": known[name]} for name in sources),
            },
            "prune": {"ratio": float(ratio)},
            "evaluate": {"gates": "near-lossless"},
        },
        strict=False,
    )


def measured(value: float, spread: float) -> dict:
    return {"value": value, "interval": [value - spread, value + spread]}


def group(loss: float, rows: int = 40) -> dict:
    return {
        "rows": rows,
        "positions": rows * 300,
        "perplexity": measured(6 * (1 + loss), 0.2),
        "perplexity_ratio": measured(1 + loss, 0.2 * loss + 0.004),
        "kl_mean": measured(0.7 * loss, 0.1 * loss + 0.001),
        "top1_agreement": measured(1 - 1.1 * loss, 0.01),
        "conflict_rate_delta": measured(0.01 * loss, 0.0006),
    }


def groups(loss: float, sources: tuple[str, ...]) -> dict:
    return {"all": group(loss), **{name: group(loss * (0.6 + 0.4 * index)) for index, name in enumerate(sources)}}


LIMITS = {
    "perplexity_ratio": (None, 1.05),
    "kl_mean": (None, 0.05),
    "top1_agreement": (0.93, None),
    "conflict_rate_delta": (-0.002, 0.002),
}


def judged(found: dict, pack: str = "512") -> list[dict]:
    results = []
    for metric, (low, high) in LIMITS.items():
        value, interval = found["all"][metric]["value"], found["all"][metric]["interval"]
        excess = max(
            edge
            for edge in (None if high is None else value - high, None if low is None else low - value)
            if edge is not None
        )
        verdict = (
            "pass"
            if all((high is None or edge <= high) and (low is None or edge >= low) for edge in interval)
            else (
                "reject"
                if excess > 0 and ((high is not None and interval[0] > high) or (low is not None and interval[1] < low))
                else "undecided"
            )
        )
        results.append(
            {
                "metric": metric,
                "max": high,
                "min": low,
                "source": "all",
                "required": True,
                "limit": "",
                "pack": pack,
                "value": value,
                "interval": interval,
                "verdict": verdict,
                "excess": excess,
                "rows": 40,
                "more_rows": None,
            }
        )
    return results


def evaluation(losses: dict[str, float], sources: tuple[str, ...]) -> dict:
    """Candidates by name with their loss, smallest model first; a control loses five times as much."""
    table, passed = [], False
    for name, loss in losses.items():
        found = groups(loss, sources)
        results = judged(found)
        verdicts = {result["verdict"] for result in results}
        verdict = "reject" if "reject" in verdicts else "undecided" if "undecided" in verdicts else "pass"
        table.append(
            {
                "name": name,
                "criterion": "reap",
                "kept": {},
                "experts": "8",
                "experts_per_token": None,
                "bytes": 1000,
                "control_of": None,
            }
            | (
                {"metrics": None, "generation": None, "examples": [], "gates": [], "verdict": "not evaluated"}
                if passed
                else {
                    "metrics": {"512": found},
                    "generation": None,
                    "examples": [],
                    "gates": results,
                    "verdict": verdict,
                }
            )
        )
        passed = passed or verdict == "pass"
    chosen = next((entry for entry in table if entry["verdict"] == "pass"), table[0])
    worst = max(losses.values())
    confirm = {
        "candidate": chosen["name"],
        "base": {"512": {}},
        "metrics": chosen["metrics"],
        "gates": chosen["gates"],
        "verdict": chosen["verdict"],
    }
    return {
        "format": 1,
        "packs": {},
        "eaft": {},
        "gates": [
            {name: result[name] for name in ("metric", "max", "min", "source", "required")}
            for result in chosen["gates"]
        ],
        "base": {"512": {}},
        "base_generation": None,
        "candidates": table,
        "controls": [
            {
                "name": "control-random",
                "criterion": "random",
                "experts": "8",
                "metrics": {"512": groups(5 * worst, sources)},
            }
        ],
        "confirm": confirm,
        "winner": chosen["name"] if chosen["verdict"] == "pass" else None,
        "chosen": chosen["name"],
        "verdict": chosen["verdict"],
        "advice": (
            f"{chosen['name']} passes every gate."
            if chosen["verdict"] == "pass"
            else (
                "The candidate is rejected.\n  perplexity_ratio 1.31 (all, 512 tokens), limit ≤ 1.05: reject, 0.26"
                " beyond it\n  agentic alone: kl_mean 0.4\nWhat to change: prune less (a lower prune.ratio)."
            )
        ),
        "pack_samples": 128,
    }


def calibration(observed: Observation, spec: Recipe) -> dict:
    sources = [
        {
            "name": name,
            "source": entry.source,
            "samples": 100 + 50 * index,
            "rows": 30,
            "tokens": int(observed.tokens[index]),
            "scored_tokens": int(observed.scored_tokens[index]),
            "sha256": f"{index}" * 64,
            "spans_text": "{% generation %} marks",
            "example": [["user: sort <a> list\n", False], ["def f(x):\n    return sorted(x)", True]],
        }
        for index, (name, entry) in enumerate(zip(observed.sources, spec.calibration.mix, strict=True))
    ]
    return {
        "version": 1,
        "kind": "calibration",
        "score": "completion",
        "packing": "concat",
        "max_length": 512,
        "seed": 42,
        "rows": 90,
        "scored_tokens": int(observed.scored_tokens.sum()),
        "sources": sources,
    }


def verification(
    base: Sizes, pruned: Sizes, quantized: Sizes, sources: tuple[str, ...], losses: tuple[float, float] = (0.03, 0.05)
) -> dict:
    metrics = {
        "base": {"512": groups(0.0, sources)},
        "pruned": {"512": groups(losses[0], sources)},
        "quantized": {"512": groups(losses[1], sources)},
    }
    rows = []
    for (name, found), sizes in zip(metrics.items(), (base, pruned, quantized), strict=True):
        headline = {
            metric: found["512"]["all"][metric]["value"]
            for metric in ("perplexity", "perplexity_ratio", "kl_mean", "top1_agreement")
        }
        rows.append(
            {
                "name": name,
                "experts": str(max(sizes.experts.values())),
                "bytes": sizes.nbytes,
                "parameters": sizes.parameters,
                **headline,
                "per_source": {},
            }
        )
    return {
        "rows": rows,
        "metrics": metrics,
        "gates": [],
        "verdict": "not judged",
        "advice": "",
        "proofs": [
            {
                "directory": "pruned",
                "name": "tensors",
                "passed": True,
                "detail": "96 tensors equal the bytes they were cut from",
                "value": 96.0,
                "measured": True,
            },
            {
                "directory": "pruned",
                "name": "logits",
                "passed": True,
                "detail": "not measured: no memory for it",
                "value": None,
                "measured": False,
            },
            {
                "directory": "quantized",
                "name": "dequantized",
                "passed": True,
                "detail": "relative error of the matrices: mean 0.2",
                "value": 0.25,
                "measured": True,
                "by_layer": {str(layer): 0.2 + 0.01 * layer for layer in base.experts},
            },
            {
                "directory": "quantized",
                "name": "logits",
                "passed": True,
                "detail": "largest difference 3e-6",
                "value": 3e-6,
                "measured": True,
            },
        ],
    }


def facts(
    *, rejected: bool = False, observed: Observation | None = None, losses: dict[str, float] | None = None
) -> RunFacts:
    """A finished run, or one that its gates stopped."""
    observed = observed or observation()
    spec, half = recipe(observed.sources), observed.num_experts // 2
    experts = dict.fromkeys(observed.layers, observed.num_experts)
    base = Sizes(experts, 3_620_000, 1_200_000, 7_300_000)
    pruned = Sizes(dict.fromkeys(experts, half), 2_100_000, 1_150_000, 4_250_000)
    quantized = Sizes(pruned.experts, pruned.parameters, pruned.active_parameters, 1_900_000)
    losses = losses or ({"ratio-0.5": 0.3} if rejected else {"ratio-0.5": 0.03})
    evaluated = evaluation(losses, observed.sources)
    names = ("calibrate", "packs", "observe", "select", "evaluate", "prune", "quantize", "verify")
    reached = names[:5] if rejected else names
    return RunFacts(
        recipe=spec,
        recipe_yaml="version: 1\nname: small-code-agentic\nprune:\n  ratio: '0.5'\n",
        command="reapkit apply small.yaml --set prune.ratio=0.5",
        model=SourceModel(
            spec.model.source,
            spec.model.revision,
            True,
            "qwen3_moe",
            observed.num_experts,
            observed.num_experts_per_tok,
            len(observed.layers),
            "apache-2.0",
            "9f" * 32,
        ),
        base=base,
        planned=dict.fromkeys(losses, pruned),
        chosen=evaluated["chosen"],
        pruned=None if rejected else pruned,
        quantized=None if rejected else quantized,
        calibration=calibration(observed, spec),
        observation=observed,
        selections={evaluated["chosen"]: selection(observed, half)},
        evaluation=evaluated,
        quantization=(
            {}
            if rejected
            else {
                "scheme": "W3A16",
                "method": "gptq",
                "group_size": 64,
                "bits_per_weight": 3.25,
                "quantized_weights": 1_900_000,
                "quantized_matrices": 400,
                "left": {"router": ["model.layers.0.mlp.gate"], "outside the decoder layers": ["lm_head"]},
                "experts_reload_in_transformers": True,
                "experts_with_few_tokens": {},
                "experts_rounded_to_nearest": {},
            }
        ),
        verification={} if rejected else verification(base, pruned, quantized, observed.sources),
        stages=tuple(
            StageRow(
                name,
                ("run" if index % 3 else "in the store") if name in reached else "not reached",
                (1.5 * index + 0.8) if name in reached else None,
                f"{index}a" * 32,
            )
            for index, name in enumerate(names)
        ),
        warnings=("observe: 2 of 64 experts received no scored token; they rank last.",),
        versions={"reapkit": "0.1.0", "torch": "2.13.0", "transformers": "5.17.0"},
        hub_datasets=tuple(entry.source for entry in spec.calibration.mix if not entry.source.startswith("builtin:")),
    )
