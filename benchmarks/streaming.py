"""Time and peak memory of a streamed observation, against reading the shards and against the plain forward of the same
layers.

    python benchmarks/streaming.py [--device cpu|cuda] [--gigabytes 10] [--dtype bfloat16] [--rounds 3]
        [--directory DIR] [--json FILE]

Writes a random qwen3_moe checkpoint, one shard per layer, and measures in turns, each in a process of its own with one
torch thread: reading all shards into one buffer, the plain forward (one layer's share measured, times the layers), and
the streamed observation with its hashes of the shards, all with the shards in the page cache; then reading and
observing with the shards on disk alone. Reported: medians, the observation over the larger of reading and computing,
and the highest resident memory that the kernel saw of the observing process (VmHWM, everything counted) against what
was resident before (interpreter, libraries, after observing a model of a few MB) plus two layers, embeddings and head,
the hidden states, and what the plan counts for a batch and for buffers.

A virtual machine may give freed memory back to its host within seconds and then take it again at 0.5 GB/s, twenty times
slower than memory it has, and slower than a disk is read. So a measured process first touches and frees as much as it
will use; and where it reads from disk, whose pages want memory for as long as it runs, it finds the page cache full of
another file, as on a machine that has been up for a day. `--empty-cache` leaves the memory that the shards had free
instead.

With `--device cuda` the model has 15 GB, the process may allocate 4 GiB of the card's memory (torch refuses more), rows
pass in batches of 8,192 tokens, and memory is the card's: what torch's allocator had reserved at most. Its memory is
too large to fill its page cache within minutes, so that reading "from disk" finds free memory there, as with
`--empty-cache`.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from reapkit.calibration.tokens import SUMMARY_FILE, TOKENS_FILE, CalibrationTokens
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.shard_reader import ShardHashes
from reapkit.core.artifact_store import link_or_copy
from reapkit.core.mapped_safetensors import create_tensors
from reapkit.model.loading import final_hidden, load_model
from reapkit.observation.streamed import observe_streaming
from reapkit.planning.estimates import COMPUTE_BYTES, LOGITS_BYTES, READ_BUFFER_BYTES, activation_bytes, layer_weights
from reapkit.recipe.schema import ObserveSpec

ROW = 512
PROCESS_BYTES = 3 << 30  # more than any measured process holds
FREE_BYTES = 1 << 30  # a full page cache still leaves some memory free
GPU_BYTES = 4 << 30  # what a measured process may allocate on the card


@dataclass(frozen=True)
class Shape:
    """What decides a layer's size."""

    hidden: int
    experts: int
    intermediate: int


@dataclass(frozen=True)
class Defaults:
    """What is measured on a device where the command line names nothing else."""

    gigabytes: float
    shape: Shape
    tokens: int
    batch_tokens: int
    rounds: int


DEFAULTS = {
    "cpu": Defaults(10, Shape(1024, 128, 512), 2048, 2048, 3),
    "cuda": Defaults(15, Shape(2048, 128, 768), 131_072, 8_192, 1),
}


@dataclass(frozen=True)
class Place:
    """Where a child computes, and how many tokens at a time."""

    device: str
    batch_tokens: int

    def finish(self) -> None:
        """Waits for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def resident(self) -> int:
        """Bytes held now: the process's on a CPU, torch's allocator's on a card."""
        return torch.cuda.memory_reserved() if self.device == "cuda" else status("VmRSS")

    def start_again(self) -> None:
        """`peak` counts from here."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again

    def peak(self) -> int:
        """The most bytes held since `start_again`."""
        return torch.cuda.max_memory_reserved() if self.device == "cuda" else status("VmHWM")


def write_checkpoint(path: Path, nbytes: int, shape: Shape, dtype: torch.dtype) -> None:
    """Random, one shard per layer, as many layers as make `nbytes`; all layers hold the same numbers."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=4096,
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,
        num_hidden_layers=1,
        moe_intermediate_size=shape.intermediate,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=shape.experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(path)
    one = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    layers = max(3, round(nbytes / sum(tensor.nbytes for name, tensor in one.items() if ".layers." in name)))
    where = {}
    parts = {"rest": {name: tensor for name, tensor in one.items() if ".layers." not in name}}
    for layer in range(layers):
        parts[f"{layer:04d}"] = {
            name.replace(".layers.0.", f".layers.{layer}."): tensor
            for name, tensor in one.items()
            if ".layers." in name
        }
    for part, tensors in parts.items():
        file = f"model-{part}.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    saved = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**saved, "num_hidden_layers": layers}))


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


# ---------------------------------------------------------------------------------------------- measured, each in its
# own process


def read(path: Path, tokens: CalibrationTokens, get_ready: Callable[[Path], None], place: Place) -> dict[str, float]:
    """All shards into one buffer, which is touched before."""
    shards = sorted(path.glob("*.safetensors"))
    buffer = memoryview(bytearray(max(shard.stat().st_size for shard in shards)))
    get_ready(path)
    start = time.perf_counter()
    for shard in shards:
        file, done = os.open(shard, os.O_RDONLY), 0
        while count := os.preadv(file, [buffer[done : done + (1 << 30)]], done):
            done += count
        os.close(file)
    return {"seconds": time.perf_counter() - start}


@torch.no_grad()
def compute(path: Path, tokens: CalibrationTokens, get_ready: Callable[[Path], None], place: Place) -> dict[str, float]:
    """One layer's forward over all tokens, on a copy of the checkpoint with one layer: the median of three, times the
    layers."""
    config = json.loads((path / "config.json").read_text())
    with tempfile.TemporaryDirectory() as directory:
        kept = ("model-rest.safetensors", "model-0000.safetensors")
        for name in kept:
            link_or_copy(path / name, Path(directory) / name)
        (Path(directory) / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
        index = json.loads((path / "model.safetensors.index.json").read_text())
        where = {name: file for name, file in index["weight_map"].items() if file in kept}
        (Path(directory) / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        model = load_model(directory, device=place.device)
    rows = torch.stack([tokens.row(row).input_ids for row in range(tokens.num_rows)]).to(place.device)
    get_ready(path)

    def forward() -> float:
        start = time.perf_counter()
        for batch in rows.split(place.batch_tokens // ROW):
            final_hidden(model, batch)
        place.finish()
        return time.perf_counter() - start

    forward()  # pages, caches and kernels as in a layer that is not the first
    seconds = [forward() for _ in range(3)]
    return {"seconds": config["num_hidden_layers"] * statistics.median(seconds)}


def observe(path: Path, tokens: CalibrationTokens, get_ready: Callable[[Path], None], place: Place) -> dict[str, float]:
    """The streamed observation and its hashes; bytes held before it, and the most that were.

    A model of a few MB goes first: what libraries load and keep with their first use is no model's.
    """
    _observed(path.with_name("small"), CalibrationTokens.load(path.with_name("few-tokens")), place)
    get_ready(path)
    place.start_again()
    before, start = place.resident(), time.perf_counter()
    _observed(path, tokens, place)
    return {"seconds": time.perf_counter() - start, "before": before, "peak": place.peak()}


def _observed(path: Path, tokens: CalibrationTokens, place: Place) -> None:
    with tempfile.TemporaryDirectory() as work, ShardHashes(path, Path(work) / "shards.json") as hashes:
        observe_streaming(
            path,
            tokens,
            ObserveSpec(eaft=False),
            batch_tokens=place.batch_tokens,
            work_directory=Path(work),
            device=place.device,
            reading=hashes.begin,
        )
        hashes.keep()
        place.finish()


def have_memory(path: Path) -> None:
    """Touches and frees what the process needs at most, and room for those shards that the page cache lacks."""
    needed = PROCESS_BYTES + Checkpoint.open(path).nbytes - meminfo("Cached")
    with mmap.mmap(-1, max(PROCESS_BYTES, needed), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1


def drop_from_cache(path: Path) -> None:
    os.sync()
    for shard in path.glob("*.safetensors"):
        file = os.open(shard, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def empty_cache(path: Path) -> None:
    """The shards are on disk alone, and the memory for them is free."""
    drop_from_cache(path)
    have_memory(path)


def fill_cache(path: Path) -> None:
    """The shards are on disk alone; other pages, of a file of holes, have the memory until this process ends."""
    drop_from_cache(path)
    file, begin, piece = os.open(path.with_name("holes"), os.O_RDWR | os.O_CREAT | os.O_TRUNC), 0, bytearray(8 << 20)
    path.with_name("holes").unlink()
    os.truncate(file, meminfo("MemTotal"))
    while meminfo("MemFree") > FREE_BYTES and (count := os.preadv(file, [piece], begin)):
        begin += count


def kernel_bytes(name: str, file: str) -> int:
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024


def meminfo(name: str) -> int:
    return kernel_bytes(name, "/proc/meminfo")


def status(name: str) -> int:
    return kernel_bytes(name, "/proc/self/status")


MEASURED = {"read": read, "compute": compute, "observe": observe}
CACHES = {"warm": have_memory, "full": fill_cache, "empty": empty_cache}


def in_child(name: str, cache: str, directory: Path, place: Place) -> dict[str, float]:
    command = [
        sys.executable,
        __file__,
        "--child",
        name,
        "--cache",
        cache,
        "--directory",
        str(directory),
        "--device",
        place.device,
        "--batch-tokens",
        str(place.batch_tokens),
    ]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def child(name: str, cache: str, directory: Path, place: Place) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if place.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(GPU_BYTES / torch.cuda.get_device_properties(0).total_memory)
    print(
        json.dumps(
            MEASURED[name](directory / "model", CalibrationTokens.load(directory / "tokens"), CACHES[cache], place)
        )
    )


# ---------------------------------------------------------------------------------------------- the bound and the
# report


def bound(path: Path, tokens: int, dtype: torch.dtype, place: Place) -> dict[str, int]:
    """What the observation may take beside what was resident before it; on a card hidden states and buffers wait on the
    host."""
    checkpoint = Checkpoint.open(path)
    weights = layer_weights(checkpoint, checkpoint.layout)
    rest, wider = weights.pop(None), dtype.itemsize // COMPUTE_BYTES
    batch = (activation_bytes(checkpoint.config, place.batch_tokens) - LOGITS_BYTES) * wider
    on_host = {
        "hidden_states": tokens * checkpoint.config["hidden_size"] * dtype.itemsize,
        "buffers": READ_BUFFER_BYTES,
    }
    return {
        "two_layers": 2 * max(weights.values()),
        "embeddings_and_head": rest,
        "batch": batch,
        **({} if place.device == "cuda" else on_host),
    }


def measure(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        path = directory / "model"
        place = Place(arguments.device, arguments.batch_tokens)
        write_checkpoint(
            path,
            int(arguments.gigabytes * 1e9),
            Shape(arguments.hidden, arguments.experts, arguments.intermediate),
            dtype,
        )
        write_tokens(directory / "tokens", arguments.tokens)
        write_checkpoint(directory / "small", 0, Shape(256, 8, 32), dtype)
        write_tokens(directory / "few-tokens", ROW)
        allowed = bound(path, arguments.tokens, dtype, place)
        nbytes = Checkpoint.open(path).nbytes
        turns = []
        for _ in range(arguments.rounds):
            turn = {name: in_child(name, "warm", directory, place) for name in MEASURED}
            cold = "empty" if arguments.empty_cache else "full"
            turn |= {f"{name}_cold": in_child(name, cold, directory, place) for name in ("read", "observe")}
            turns.append(turn)
    seconds = {name: statistics.median(turn[name]["seconds"] for turn in turns) for name in turns[0]}

    def over_the_larger(suffix: str) -> float:
        ratios = [
            turn[f"observe{suffix}"]["seconds"] / max(turn[f"read{suffix}"]["seconds"], turn["compute"]["seconds"])
            for turn in turns
        ]
        return round(statistics.median(ratios), 3)

    peak = max(turn[name]["peak"] - turn[name]["before"] for turn in turns for name in ("observe", "observe_cold"))
    layer = allowed["two_layers"] / 2
    return {
        "checkpoint_bytes": nbytes,
        "checkpoint_over_bound": round(nbytes / sum(allowed.values()), 2),
        "tokens": arguments.tokens,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "over_the_larger": over_the_larger(""),
        "over_the_larger_cold": over_the_larger("_cold"),
        "resident_before_bytes": turns[0]["observe"]["before"],
        "peak_over_before_bytes": peak,
        "bound_bytes": allowed,
        "peak_over_bound": round(peak / sum(allowed.values()), 3),
        "peak_in_layers": round((peak - allowed["embeddings_and_head"] - allowed.get("hidden_states", 0)) / layer, 2),
    }


def with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    """Fills in what the command line left open, by device."""
    defaults = DEFAULTS[arguments.device]
    tokens = arguments.tokens or defaults.tokens
    at_once = {"cpu": tokens, "cuda": defaults.batch_tokens}[arguments.device]
    found = {
        "gigabytes": defaults.gigabytes,
        **vars(defaults.shape),
        "tokens": tokens,
        "batch_tokens": at_once,
        "rounds": defaults.rounds,
    }
    for name, value in found.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.empty_cache |= arguments.device == "cuda"
    return arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(DEFAULTS), default="cpu")
    parser.add_argument("--gigabytes", type=float)
    for name in ("hidden", "experts", "intermediate", "tokens", "batch-tokens", "rounds"):
        parser.add_argument(f"--{name}", type=int, help="default: by device")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "both"], default="both")
    parser.add_argument(
        "--empty-cache",
        action="store_true",
        help="read from disk into memory that is free, not full of another file's pages",
    )
    parser.add_argument("--directory", type=Path, help="where the checkpoint is written, and deleted again")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=MEASURED, help=argparse.SUPPRESS)
    parser.add_argument("--cache", choices=CACHES, help=argparse.SUPPRESS)
    arguments = with_defaults(parser.parse_args())
    if arguments.child:
        return child(
            arguments.child, arguments.cache, arguments.directory, Place(arguments.device, arguments.batch_tokens)
        )
    logging.disable_progress_bar()
    result = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "argv": [
            f"{name}={value}"
            for name, value in vars(arguments).items()
            if name not in ("json", "directory", "child", "cache")
        ],
    }
    for dtype in ("bfloat16", "float32") if arguments.dtype == "both" else (arguments.dtype,):
        result[dtype] = measure(arguments, getattr(torch, dtype))
        print(json.dumps({dtype: result[dtype]}, indent=2), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
