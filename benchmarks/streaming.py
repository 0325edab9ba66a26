"""Time and peak memory of a streamed observation, against reading the shards and against the plain forward of the same layers.

    python benchmarks/streaming.py [--layers 24] [--tokens 8192] [--json FILE] [--keep DIR]

Writes a random qwen3_moe checkpoint, one shard per layer (24 layers of 400 MB in bfloat16 are 10 GB), observes it in one
process with one thread and prints: seconds to read the shards, seconds of plain compute (one layer's share measured, times the
layers), seconds streamed; and the peak of the process's anonymous memory beside one layer's bytes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from reapkit.calibration.tokens import SUMMARY_FILE, TOKENS_FILE, CalibrationTokens, create_tensors
from reapkit.models import final_hidden, load_model
from reapkit.observe.streaming import observe_streaming
from reapkit.recipe.schema import ObserveSpec

ROW = 512


def write_checkpoint(path: Path, layers: int, hidden: int, experts: int, intermediate: int) -> int:
    """Random, one shard per layer; returns the bytes of a layer."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        moe_intermediate_size=intermediate,
        num_attention_heads=hidden // 64,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    one = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    where = {}
    parts = {"rest": {name: tensor for name, tensor in one.items() if ".layers." not in name}}
    for layer in range(layers):
        parts[f"{layer:04d}"] = {
            name.replace(".layers.0.", f".layers.{layer}."): tensor for name, tensor in one.items() if ".layers." in name
        }
    for part, tensors in parts.items():
        file = f"model-{part}.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    saved = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**saved, "num_hidden_layers": layers}))
    return sum(tensor.nbytes for tensor in parts["0000"].values())


def write_tokens(path: Path, tokens: int) -> CalibrationTokens:
    path.mkdir()
    rows = tokens // ROW
    file = create_tensors(
        path / TOKENS_FILE,
        {
            "input_ids": ("int32", tokens),
            "assistant": ("uint8", tokens),
            "row_offsets": ("int64", rows + 1),
            "row_source": ("int16", rows),
            "sample_offsets": ("int64", rows + 1),
            "part_sample": ("int32", rows),
        },
    )
    file["input_ids"][:] = np.random.default_rng(0).integers(0, 4096, tokens)
    file["assistant"][:] = 1
    file["row_offsets"][:] = file["sample_offsets"][:] = ROW * np.arange(rows + 1)
    summary = {
        "sources": [{"name": "random"}],
        "score": "all",
        "packing": "none",
        "groups": [0, rows],
        "snapshots": [0, 0, 0, 0],
    }
    (path / SUMMARY_FILE).write_text(json.dumps(summary))
    return CalibrationTokens.load(path)


def seconds_to_read(path: Path) -> float:
    start = time.perf_counter()
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():
                file.get_tensor(name).sum()
    return time.perf_counter() - start


class PeakMemory(threading.Thread):
    """The highest anonymous resident memory seen, sampled."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.stopped = 0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.02):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@torch.no_grad()
def seconds_of_plain_compute(path: Path, layers: int, tokens: CalibrationTokens, batch_tokens: int) -> float:
    """One layer's forward over all tokens, measured on a copy of the checkpoint with one layer, times the layers."""
    with tempfile.TemporaryDirectory() as directory:
        for name in ("model-rest.safetensors", "model-0000.safetensors"):
            (Path(directory) / name).symlink_to(path / name)
        config = json.loads((path / "config.json").read_text())
        (Path(directory) / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
        index = json.loads((path / "model.safetensors.index.json").read_text())
        kept = {
            name: file
            for name, file in index["weight_map"].items()
            if file in ("model-rest.safetensors", "model-0000.safetensors")
        }
        (Path(directory) / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": kept}))
        model = load_model(directory)
        rows = [tokens.row(row).input_ids for row in range(tokens.num_rows)]
        per_batch = max(1, batch_tokens // ROW)
        start = time.perf_counter()
        for first in range(0, len(rows), per_batch):
            final_hidden(model, torch.stack(rows[first : first + per_batch]))
        return layers * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("layers", 24),
        ("hidden", 1024),
        ("experts", 128),
        ("intermediate", 512),
        ("tokens", 8192),
        ("batch-tokens", 2048),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        layer_bytes = write_checkpoint(path, arguments.layers, arguments.hidden, arguments.experts, arguments.intermediate)
        tokens = write_tokens(Path(directory) / "tokens", arguments.tokens)
        total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        compute = seconds_of_plain_compute(path, arguments.layers, tokens, arguments.batch_tokens)
        before, memory = anonymous_bytes(), PeakMemory()
        memory.start()
        start = time.perf_counter()
        observe_streaming(
            path, tokens, ObserveSpec(eaft=False), batch_tokens=arguments.batch_tokens, work_directory=Path(directory) / "work"
        )
        streamed = time.perf_counter() - start
        memory.stopped.set()
        read = seconds_to_read(path)
    result = {
        "checkpoint_bytes": total,
        "layer_bytes": layer_bytes,
        "tokens": arguments.tokens,
        "read_seconds": round(read, 2),
        "compute_seconds": round(compute, 2),
        "streamed_seconds": round(streamed, 2),
        "over_the_larger": round(streamed / max(read, compute), 3),
        "peak_bytes": memory.peak - before,
        "peak_in_layers": round((memory.peak - before) / layer_bytes, 2),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
