"""How long `reapkit plan` takes, as a whole process, for a checkpoint of a trillion parameters in a thousand shards.

    python benchmarks/plan.py [--runs 5] [--dtype fp8|bf16] [--directory DIR] [--output FILE]

Writes a checkpoint of Kimi-K2's dimensions with real headers and holes for weights (61 layers, 384 experts of 2048,
hidden 7168; block FP8 with scales, as published, or bf16) and a recipe for it, then times the command. The first, cold
run is reported apart. Wall-clock time says little on a busy machine; the process's own CPU time is printed beside it.
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
from collections.abc import Iterator
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support import published_models

LAYERS, DENSE, EXPERTS, HIDDEN, INNER, VOCABULARY, SHARDS = 61, 1, 384, 7168, 2048, 163840, 1000
LIMIT_SECONDS = 2.0

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "first_k_dense_replace": DENSE,
    "hidden_size": HIDDEN,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": INNER,
    "n_group": 1,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": VOCABULARY,
}
FP8 = {
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
}

RECIPE = """
version: 1
name: trillion
model: {source: model}
calibration: {samples: 64, mix: [{name: code, source: "builtin:code"}]}
prune: {ratio: 0.5}
quantize: {scheme: W3A16}
"""


def templates(is_fp8: bool) -> dict[str, list]:
    """Tensor names to dtype and shape, in the braces of `published_models`."""
    every, routed = f"model.layers.{{0..{LAYERS - 1}}}", f"model.layers.{{{DENSE}..{LAYERS - 1}}}"
    attention = f"{every}.self_attn"
    matrices = {
        f"{attention}.q_a_proj": (1536, HIDDEN),
        f"{attention}.q_b_proj": (12288, 1536),
        f"{attention}.kv_b_proj": (16384, 512),
        f"{attention}.kv_a_proj_with_mqa": (576, HIDDEN),
        f"{attention}.o_proj": (HIDDEN, 8192),
        "model.layers.0.mlp.{gate,up}_proj": (18432, HIDDEN),
        "model.layers.0.mlp.down_proj": (HIDDEN, 18432),
        f"{routed}.mlp.shared_experts.{{gate,up}}_proj": (INNER, HIDDEN),
        f"{routed}.mlp.shared_experts.down_proj": (HIDDEN, INNER),
        f"{routed}.mlp.experts.{{0..{EXPERTS - 1}}}.{{gate,up}}_proj": (INNER, HIDDEN),
        f"{routed}.mlp.experts.{{0..{EXPERTS - 1}}}.down_proj": (HIDDEN, INNER),
    }
    others = {
        "model.embed_tokens.weight": ["BF16", VOCABULARY, HIDDEN],
        "lm_head.weight": ["BF16", VOCABULARY, HIDDEN],
        "model.norm.weight": ["BF16", HIDDEN],
        f"{every}.{{input,post_attention}}_layernorm.weight": ["BF16", HIDDEN],
        f"{attention}.q_a_layernorm.weight": ["BF16", 1536],
        f"{attention}.kv_a_layernorm.weight": ["BF16", 512],
        f"{routed}.mlp.gate.weight": ["BF16", EXPERTS, HIDDEN],
        f"{routed}.mlp.gate.e_score_correction_bias": ["F32", EXPERTS],
    }
    weights = {f"{name}.weight": ["F8_E4M3" if is_fp8 else "BF16", *shape] for name, shape in matrices.items()}
    scales = {
        f"{name}.weight_scale_inv": ["F32", ceil(rows / 128), ceil(columns / 128)]
        for name, (rows, columns) in matrices.items()
    }
    return weights | others | (scales if is_fp8 else {})


def in_file_order(is_fp8: bool) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Tensors as a hub checkpoint lays them out: layer by layer, expert by expert, a weight beside its scale."""

    def place(tensor: tuple[str, str, tuple[int, ...]]) -> list:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in tensor[0].split(".")]

    return iter(sorted(published_models.expand(templates(is_fp8)), key=place))


def measure(directory: Path) -> tuple[float, float, dict[str, Any]]:
    """Wall-clock seconds, CPU seconds (user and system) and the printed plan of one `reapkit plan --json`."""
    command = [sys.executable, "-m", "reapkit", "plan", "recipe.yaml", "--json"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, json.loads(done.stdout)


def imports_torch(directory: Path) -> bool:
    """Whether planning this checkpoint loads torch."""
    code = (
        "import atexit, os, sys; from reapkit.cli.main import main;"
        " atexit.register(lambda: os._exit('torch' in sys.modules)); main(['plan', 'recipe.yaml', '--json'])"
    )
    return bool(subprocess.run([sys.executable, "-c", code], cwd=directory, stdout=subprocess.DEVNULL).returncode)


def benchmark(directory: Path, runs: int, dtype: str) -> dict[str, Any]:
    """Writes model and recipe, plans once cold and `runs` times warm."""
    is_fp8 = dtype == "fp8"
    tensors = list(in_file_order(is_fp8))
    model = published_models.write_checkpoint(
        directory / "model", CONFIG | (FP8 if is_fp8 else {}), iter(tensors), num_shards=SHARDS
    )
    (directory / "recipe.yaml").write_text(RECIPE)
    cold = measure(directory)
    measured = [measure(directory) for _ in range(runs)]
    wall, cpu = (statistics.median(column) for column in list(zip(*measured, strict=True))[:2])
    return {
        "benchmark": "reapkit plan, whole process",
        "date": datetime.date.today().isoformat(),
        "machine": (
            f"{os.cpu_count()} {platform.machine().replace('_', '-')} cores, "
            f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
        ),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("reapkit", "pydantic", "typer")},
        },
        "checkpoint": {
            "parameters": cold[2]["base"]["parameters"],
            "tensors": len(tensors),
            "shards": SHARDS,
            "dtype": dtype,
            "bytes_on_disk": sum(file.stat().st_blocks * 512 for file in model.iterdir()),
        },
        "plan": {
            "parameters_after": cold[2]["candidates"][0]["pruned"]["parameters"],
            "quantized_bytes": cold[2]["candidates"][0]["quantized_bytes"],
        },
        "seconds": {
            "median": round(wall, 3),
            "runs": [round(run[0], 3) for run in measured],
            "first": round(cold[0], 3),
        },
        "cpu_seconds": {
            "median": round(cpu, 3),
            "runs": [round(run[1], 3) for run in measured],
            "first": round(cold[1], 3),
        },
        "load_average": round(os.getloadavg()[0], 2),
        "imports_torch": imports_torch(directory),
        "limit_seconds": LIMIT_SECONDS,
        "within_limit": wall < LIMIT_SECONDS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=("fp8", "bf16"), default="fp8")
    parser.add_argument(
        "--directory", type=Path, help="where model and recipe are written and stay; default: a temporary folder"
    )
    parser.add_argument("--output", type=Path, help="also write the result there as JSON")
    arguments = parser.parse_args()
    if arguments.directory:
        result = benchmark(arguments.directory, arguments.runs, arguments.dtype)
    else:
        with tempfile.TemporaryDirectory() as directory:
            result = benchmark(Path(directory), arguments.runs, arguments.dtype)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
