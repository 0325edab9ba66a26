"""How long `reapkit select` takes, as a whole process, to decide anew from an existing observation of 60 layers x 512
experts.

    python benchmarks/redecide.py [--runs 5] [--layout fused|per-expert] [--directory DIR] [--output FILE]

Writes a checkpoint of Qwen3-Next's kind with real headers and holes for weights, a recipe, and an observation of random
routing statistics with two sources and coactivation. The first command imports the observation; each timed one then
decides by another ratio, which is in no store. Beside each, in turns, `reapkit --help`: what Python and the command
line take before anything is decided. Wall-clock time says little on a busy machine; CPU time is printed beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.observation.observation import MAXIMA, SUMS, Observation
from reapkit.selection.selection import Selection
from tests.support import published_models

LAYERS, EXPERTS, TOP_K, HIDDEN, INNER, VOCABULARY, SHARDS, SOURCES = (
    60,
    512,
    10,
    2048,
    512,
    151936,
    60,
    ("code", "tools"),
)
LIMIT_SECONDS = 2.0

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": HIDDEN,
    "intermediate_size": 5120,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": INNER,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}
RECIPE = """
version: 1
name: redecide
model: {source: model}
calibration: {samples: 64, mix: [{name: code, source: "builtin:code"}, {name: tools, source: "builtin:tools"}]}
prune: {ratio: 0.5}
quantize: {scheme: null}
"""


def templates(layout: str) -> dict[str, list]:
    """Tensor names to dtype and shape, in the braces of `published_models`."""
    layer = f"model.layers.{{0..{LAYERS - 1}}}"
    experts = {
        "fused": {
            f"{layer}.mlp.experts.gate_up_proj": [EXPERTS, 2 * INNER, HIDDEN],
            f"{layer}.mlp.experts.down_proj": [EXPERTS, HIDDEN, INNER],
        },
        "per-expert": {
            f"{layer}.mlp.experts.{{0..{EXPERTS - 1}}}.{{gate,up}}_proj.weight": [INNER, HIDDEN],
            f"{layer}.mlp.experts.{{0..{EXPERTS - 1}}}.down_proj.weight": [HIDDEN, INNER],
        },
    }[layout]
    others = {
        "model.embed_tokens.weight": [VOCABULARY, HIDDEN],
        "lm_head.weight": [VOCABULARY, HIDDEN],
        "model.norm.weight": [HIDDEN],
        f"{layer}.{{input,post_attention}}_layernorm.weight": [HIDDEN],
        f"{layer}.self_attn.q_proj.weight": [2048, HIDDEN],
        f"{layer}.self_attn.{{k,v}}_proj.weight": [256, HIDDEN],
        f"{layer}.self_attn.o_proj.weight": [HIDDEN, 2048],
        f"{layer}.self_attn.{{q,k}}_norm.weight": [128],
        f"{layer}.mlp.gate.weight": [EXPERTS, HIDDEN],
    }
    return {name: ["BF16", *shape] for name, shape in (others | experts).items()}


def observation(identity: str) -> Observation:
    """Statistics as a calibration of 400,000 scored tokens would leave them."""
    draw, shape, scored = torch.Generator().manual_seed(0), (LAYERS, len(SOURCES), EXPERTS), 200_000
    count = (torch.rand(shape, generator=draw, dtype=torch.float64).pow(3) + 0.01) * scored * TOP_K / EXPERTS
    statistics_ = {
        name: count.round() * (1 + torch.rand(shape, generator=draw, dtype=torch.float64)) for name in SUMS
    } | {"count": count.round()}
    snapshots = {
        name: torch.stack([statistics_[name] * part for part in (1 / 16, 1 / 8, 1 / 4, 1 / 2)])
        for name in ("count", "gate_norm_sum")
    }
    tokens = torch.tensor([scored] * len(SOURCES))
    return Observation(
        "qwen3_moe",
        tuple(range(LAYERS)),
        EXPERTS,
        TOP_K,
        SOURCES,
        tokens,
        tokens.clone(),
        statistics_,
        {name: torch.rand(shape, generator=draw) for name in MAXIMA},
        torch.randint(0, 1000, (*shape, EXPERTS), generator=draw),
        snapshots,
        None,
        {"model": identity},
    )


def timed(command: Sequence[str], directory: Path) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a command. Python keeps its compiled modules, as it does where reapkit is
    installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(directory / "bytecode")
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def benchmark(directory: Path, runs: int, layout: str) -> dict[str, Any]:
    """Writes everything, imports the observation once and decides `runs` times by another ratio."""
    tensors = sorted(published_models.expand(templates(layout)))
    model = published_models.write_checkpoint(directory / "model", CONFIG, iter(tensors), num_shards=SHARDS)
    (directory / "recipe.yaml").write_text(RECIPE)
    observation(Checkpoint.open(model).identity).save(directory / "observation")
    select = [sys.executable, "-m", "reapkit", "select", "recipe.yaml", "--observation", "observation", "--json"]
    first, measured, floor = timed(select, directory), [], []
    for run in range(runs):
        measured.append(timed([*select, "--set", f"prune.ratio={0.3 + run / 100:.2f}"], directory))
        floor.append(timed([sys.executable, "-m", "reapkit", "--help"], directory))
    kept = {len(layer.keep) for layer in Selection.load(directory / "runs/redecide/selection").layers.values()}
    wall, cpu = (statistics.median(column) for column in zip(*measured, strict=True))
    return {
        "benchmark": "reapkit select from an existing observation, whole process",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} {platform.machine().replace('_', '-')} cores, "
        f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("reapkit", "torch", "safetensors")},
        },
        "checkpoint": {
            "layers": LAYERS,
            "experts": EXPERTS,
            "layout": layout,
            "tensors": len(tensors),
            "shards": SHARDS,
        },
        "observation_bytes": sum(file.stat().st_size for file in (directory / "observation").iterdir()),
        "kept_by_the_last": sorted(kept),
        "seconds": {
            "median": round(wall, 3),
            "runs": [round(each[0], 3) for each in measured],
            "first_with_import": round(first[0], 3),
        },
        "cpu_seconds": {"median": round(cpu, 3), "runs": [round(each[1], 3) for each in measured]},
        "help_seconds": {
            "median": round(statistics.median(each[0] for each in floor), 3),
            "runs": [round(each[0], 3) for each in floor],
        },
        "load_average": round(os.getloadavg()[0], 2),
        "limit_seconds": LIMIT_SECONDS,
        "within_limit": wall < LIMIT_SECONDS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layout", choices=("fused", "per-expert"), default="per-expert")
    parser.add_argument(
        "--directory", type=Path, help="where everything is written and stays; default: a temporary folder"
    )
    parser.add_argument("--output", type=Path, help="also write the result there as JSON")
    arguments = parser.parse_args()
    if arguments.directory:
        arguments.directory.mkdir(parents=True, exist_ok=True)
        result = benchmark(arguments.directory, arguments.runs, arguments.layout)
    else:
        with tempfile.TemporaryDirectory() as directory:
            result = benchmark(Path(directory), arguments.runs, arguments.layout)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
