"""How long deciding again takes, from an observation of 60 layers x 512 experts: `reapkit select` with another ratio, as a user runs it.

A model of that shape with narrow matrices is written and observed once; then `saliency` and `prune` change from run to run, so that
every run plans, loads the observation, decides and writes. `command` is the wall time of the process, interpreter and imports with it;
`stage` what the select stage took of it; `imports` a process that only imports what the stage needs.

    python benchmarks/deciding.py --output benchmarks/results/deciding.json
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
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

LAYERS, EXPERTS = 60, 512
RECIPE = """version: 1
name: select
model: {source: model}
calibration: {samples: 24, max_length: 64, packing: none, score: all, mix: [{name: a, source: a.jsonl, format: tokens}, {name: b, source: b.jsonl, format: tokens}]}
prune: {ratio: 0.5}
evaluate: {packs: {samples: 8, lengths: [64]}}
quantize: {scheme: null}
output: {directory: run}
runtime: {store: store}
"""
CHANGES = {"reap, uniform": ["prune.ratio={}"], "ean, uniform": ["saliency.criterion=ean", "prune.ratio={}"],
           "eaft-reap, uniform": ["saliency.criterion=eaft-reap", "prune.ratio={}"],
           "reap, global, ragged": ["prune.allocation=global", "prune.layout=ragged", "prune.ratio={}"]}


def prepare(directory: Path) -> None:
    """Model, data and recipe, observed once."""
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", num_hidden_layers=LAYERS, num_experts=EXPERTS, num_experts_per_tok=10, hidden_size=16, moe_intermediate_size=8,
        intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=256)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(directory / "model")
    draw = torch.Generator().manual_seed(1)
    for name in ("a", "b"):
        rows = (torch.randint(5, 250, (48,), generator=draw).tolist() for _ in range(64))
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    (directory / "recipe.yaml").write_text(RECIPE)
    reapkit(directory, "observe")


def reapkit(directory: Path, command: str, overrides: Sequence[str] = ()) -> dict:
    """What the command reports."""
    settings = [part for one in overrides for part in ("--set", one)]
    run = subprocess.run([sys.executable, "-m", "reapkit", command, "recipe.yaml", "--json", *settings], cwd=directory, capture_output=True,
                         text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout)


def imports() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import reapkit.cli.recipes, reapkit.stages.select, reapkit.run"], check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    times: dict[str, dict[str, list[float]]] = {name: {"command": [], "stage": []} for name in CHANGES}
    alone = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        prepare(directory)
        for number in range(arguments.rounds):
            alone.append(imports())
            for name, change in CHANGES.items():
                started = time.perf_counter()
                found = reapkit(directory, "select", [part.format(f"0.{40 + number}") for part in change])
                times[name]["command"].append(time.perf_counter() - started)
                if found["executed"] != ["select"]:
                    raise SystemExit(f"{name}: ran {found['executed']} where only select was to run")
                times[name]["stage"].append(found["stages"]["select"]["seconds"])
    result = {"what": f"reapkit select, {LAYERS} layers x {EXPERTS} experts, 2 sources", "date": time.strftime("%Y-%m-%d"),
              "machine": f"{platform.machine()}, {os.cpu_count()} cores", "threads": torch.get_num_threads(),
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
              "rounds": arguments.rounds, "imports_seconds": statistics.median(alone),
              "seconds": {name: {part: round(statistics.median(values), 3) for part, values in parts.items()} for name, parts in times.items()}}
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
