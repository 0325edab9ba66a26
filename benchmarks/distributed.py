"""How much faster do two ranks of one thread each observe than one process of one thread? In turns, medians of the
ratios.

    python benchmarks/distributed.py [--placement resident|streaming] [--tokens 16384] [--pairs 5]
        [--directory DIR] [--json FILE]

The model is a random qwen3_moe of hidden 1024, 64 experts, top-8, 4 layers, float32, written as a checkpoint; the
calibration has 16 row groups. Every measurement starts its processes anew, two ranks by torchrun. `observe` counts from
the moment when every rank has its model in memory to the observation on rank 0, waiting and adding up included
(streaming: reading the layers too); `process` counts everything from the start of the first process to the end of the
last: Python, libraries, loading.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from streaming import Shape, write_checkpoint, write_tokens
from transformers.utils import logging

from reapkit.calibration.tokens import SUMMARY_FILE, CalibrationTokens
from reapkit.core import ranks
from reapkit.model.loading import load_model
from reapkit.observation.resident import observe
from reapkit.observation.streamed import observe_streaming
from reapkit.recipe.schema import ObserveSpec

GROUPS = 16
LAYER_BYTES = 4 * 64 * 3 * 1024 * 512


def write_inputs(directory: Path, tokens: int) -> None:
    write_checkpoint(
        directory / "model", 4 * LAYER_BYTES, Shape(hidden=1024, experts=64, intermediate=512), torch.float32
    )
    rows = write_tokens(directory / "tokens", tokens).num_rows
    file = directory / "tokens" / SUMMARY_FILE
    bounds = sorted({rows * group // GROUPS for group in range(GROUPS + 1)})
    file.write_text(json.dumps({**json.loads(file.read_text()), "groups": bounds}))


def child(directory: Path, placement: str) -> None:
    """One rank, or the only process; rank 0 writes the seconds."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    team = ranks.join() if ranks.launched() else ranks.ALONE
    tokens = CalibrationTokens.load(directory / "tokens")
    work = Path(os.environ["WORK"])
    common = {"batch_tokens": 2048, "work_directory": work, "ranks": team}
    model = load_model(directory / "model") if placement == "resident" else None
    team.meet("loaded")
    start = time.perf_counter()
    if model is not None:
        observation = observe(model, tokens, ObserveSpec(), **common)
    else:
        observation = observe_streaming(directory / "model", tokens, ObserveSpec(), **common)
    if team.rank:
        team.leave()
        return
    seconds = time.perf_counter() - start
    observation.save(work / "saved")
    (work / "seconds").write_text(str(seconds))
    if team.world > 1:
        team.conclude(0)


def measured(directory: Path, placement: str, count: int) -> tuple[float, float, bytes]:
    """Seconds of the observation and of the processes, and the observation's bytes."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(count)) if count > 1 else ()
    with tempfile.TemporaryDirectory(dir=directory) as work:
        command = [
            sys.executable,
            *launcher,
            __file__,
            "--child",
            "--placement",
            placement,
            "--directory",
            str(directory),
        ]
        start = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "WORK": work})
        seconds = time.perf_counter() - start
        return (
            float(Path(work, "seconds").read_text()),
            seconds,
            Path(work, "saved", "observation.safetensors").read_bytes(),
        )


def report(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        directory = Path(temporary)
        write_inputs(directory, arguments.tokens)
        one, two = [], []
        measured(directory, arguments.placement, 1)  # the checkpoint is in the page cache, compiled files are there
        for number in range(arguments.pairs):
            for count in (1, 2) if number % 2 else (2, 1):  # alternate who goes first
                (one if count == 1 else two).append(measured(directory, arguments.placement, count))
        if len({file for _, _, file in (*one, *two)}) != 1:
            raise SystemExit("two ranks and one process gave different observations")
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "placement": arguments.placement,
        "tokens": arguments.tokens,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "equal_bytes": True,
    }
    for place, name in enumerate(("observe", "process")):
        ratios = [alone[place] / together[place] for alone, together in zip(one, two, strict=True)]
        result[name] = {
            "one_tokens_per_second": round(arguments.tokens / statistics.median(run[place] for run in one), 1),
            "two_tokens_per_second": round(arguments.tokens / statistics.median(run[place] for run in two), 1),
            "median": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
        print(
            f"{name:8s} {result[name]['one_tokens_per_second']:8.1f} -> {result[name]['two_tokens_per_second']:8.1f}"
            f" tokens/s, {result[name]['median']:.2f}x (pairs {min(ratios):.2f} to {max(ratios):.2f})"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--placement", default="resident", choices=["resident", "streaming"])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.directory, arguments.placement)
    else:
        report(arguments)


if __name__ == "__main__":
    main()
