"""What the quantize stage costs beside llm-compressor called directly: the same matrices, scheme and calibration rows,
in pairs.

    python benchmarks/quantize.py [--device cpu|cuda] [--methods rtn gptq] [--pairs 3] [--json FILE]

Both sides begin with a checkpoint on the disk and end with a complete quantized directory; nothing is verified. `rtn`
is `model_free_ptq` on the directory, `gptq` is `oneshot` on a model that transformers loaded, saved by it. Pairs run in
one process in alternating order after a small warm-up. Reports the seconds, each pair's ratio and their median, against
the limit of 1.05.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from reapkit.calibration.loader import tokens_of_loader
from reapkit.calibration.tokens import CalibrationTokens
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.quantization.checkpoint import quantize_checkpoint
from reapkit.quantization.oneshot import equal_batches
from reapkit.quantization.quiet import quiet
from reapkit.recipe.schema import QuantizeSpec

SHARED = dict(
    vocab_size=8192,
    num_experts=32,
    num_experts_per_tok=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    tie_word_embeddings=False,
)
SHAPES = {
    "rtn": dict(num_hidden_layers=12, hidden_size=1024, intermediate_size=1024, moe_intermediate_size=512),
    "gptq": dict(num_hidden_layers=2, hidden_size=512, intermediate_size=512, moe_intermediate_size=256),
}
SMALL = dict(num_hidden_layers=1, hidden_size=128, intermediate_size=128, moe_intermediate_size=128, num_experts=4)
ROWS, LENGTH, BATCH_TOKENS = 64, 128, 4096
IGNORED = ["lm_head", "re:.*mlp[.]gate$", "re:.*embed_tokens$"]
LIMIT_RATIO = 1.05


def write_model(path: Path, **shape: Any) -> Path:
    """A random bf16 qwen3_moe checkpoint; per-expert tensors, as the hub has them."""
    torch.manual_seed(0)
    with quiet():
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SHARED, **shape})).to(torch.bfloat16).save_pretrained(path)
    return path


def write_tokens(path: Path) -> CalibrationTokens:
    """Random rows of equal length."""
    draw = torch.Generator().manual_seed(1)
    return tokens_of_loader([{"input_ids": torch.randint(8192, (ROWS, LENGTH), generator=draw)}], path)


def ours(method: str, source: Path, tokens: CalibrationTokens, out: Path, device: str) -> None:
    """The stage's function."""
    quantize_checkpoint(
        source,
        out,
        QuantizeSpec(scheme="W3A16", method=method, group_size=128),
        calibration=tokens,
        batch_tokens=BATCH_TOKENS,
        device=device,
    )


def theirs(method: str, source: Path, tokens: CalibrationTokens, out: Path, device: str) -> None:
    """llm-compressor by itself."""
    from llmcompressor import model_free_ptq, oneshot
    from llmcompressor.core import reset_session
    from llmcompressor.modifiers.gptq import GPTQModifier

    with quiet():
        if method == "rtn":
            model_free_ptq(source, out, scheme="W3A16", ignore=IGNORED, device=device)
            return
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", experts_implementation="eager")
        rows = list(equal_batches(tokens, BATCH_TOKENS))
        oneshot(
            model=model,
            processor=_NoProcessor(),
            recipe=[GPTQModifier(scheme="W3A16", targets=["Linear"], ignore=IGNORED)],
            dataset=DataLoader(rows, batch_size=None),
            num_calibration_samples=len(rows),
            moe_calibrate_all_experts=False,
            output_dir=str(out),
        )
        reset_session()


class _NoProcessor:
    """The random model has no tokenizer to save."""

    def save_pretrained(self, directory: str) -> None:
        pass


def timed(
    side: Callable[..., None], method: str, source: Path, tokens: CalibrationTokens, out: Path, device: str
) -> float:
    """Seconds of one side, its files synced."""
    begin = time.perf_counter()
    side(method, source, tokens, out, device)
    os.sync()
    seconds = time.perf_counter() - begin
    shutil.rmtree(out)
    return seconds


def compare(method: str, source: Path, tokens: CalibrationTokens, out: Path, pairs: int, device: str) -> dict[str, Any]:
    """Pairs in alternating order."""
    sides = {"reapkit": ours, "llm-compressor": theirs}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(pairs):
        for name in sorted(sides, reverse=bool(pair % 2)):
            seconds[name].append(timed(sides[name], method, source, tokens, out, device))
            print(f"{method}, pair {pair + 1}: {name} {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    ratios = [mine / other for mine, other in zip(seconds["reapkit"], seconds["llm-compressor"], strict=True)]
    return {
        "seconds": {name: [round(run, 2) for run in runs] for name, runs in seconds.items()},
        "ratio": {"median": round(statistics.median(ratios), 3), "runs": [round(ratio, 3) for ratio in ratios]},
        "within_limit": statistics.median(ratios) <= LIMIT_RATIO,
    }


def benchmark(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    tokens = write_tokens(work / "tokens")
    small = write_model(work / "small", **SMALL)
    found = {}
    for method in options.methods:
        for side in (ours, theirs):
            timed(side, method, small, tokens, work / "out", options.device)
        source = write_model(work / method, **SHAPES[method])
        found[method] = {
            "model": SHAPES[method],
            "parameters": Checkpoint.open(source).numel,
            **compare(method, source, tokens, work / "out", options.pairs, options.device),
        }
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "benchmark": "the quantize stage against llm-compressor called directly, W3A16, groups of 128",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} {platform.machine().replace('_', '-')} cores, {memory / 2**30:.0f} GiB",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "llmcompressor", "compressed-tensors")},
        "load_average": round(os.getloadavg()[0], 2),
        "model": SHARED,
        "calibration": {"rows": ROWS, "tokens_per_row": LENGTH},
        **found,
        "limit_ratio": LIMIT_RATIO,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="reapkit-quantize-") as work:
        text = json.dumps(benchmark(options, Path(work)), indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
