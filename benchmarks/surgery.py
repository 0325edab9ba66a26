"""How long pruning a checkpoint takes against copying the bytes that stay with `cp`, on the same disk, in pairs.

    python benchmarks/surgery.py [--gigabytes 20] [--pairs 3] [--warm-pairs 5] [--directory /big/disk]
        [--layout per-expert|fused] [--output FILE]

Writes a random checkpoint, prunes half its experts, and copies the result with `cp`; each pair in alternating order,
once with what is read out of the page cache (cold) and once in it (warm, on a checkpoint of at most a fifth of the
memory: a larger one does not stay there). Both sides end with fsync; pruning hashes what it writes with SHA-256
besides. Reports medians, the ratio of each pair and the peak memory, and whether they are within 1.15 and 1 GiB. Needs
twice the checkpoint's size on the disk.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.pruning.checkpoint import prune_checkpoint
from reapkit.selection.selection import LayerSelection, Selection

HIDDEN, INNER, EXPERTS, TOP_K = 2048, 768, 64, 8
SHARD_BYTES = 1_000_000_000
LIMIT_RATIO, LIMIT_BYTES = 1.15, 1 << 30
NOISE_BYTES = 64 << 20
WARM_SHARE = 0.2


def tensors(layers: int, layout: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a bf16 qwen3_moe checkpoint."""
    yield "model.embed_tokens.weight", (8192, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for part in ("q", "k", "v", "o"):
            yield f"{prefix}self_attn.{part}_proj.weight", (HIDDEN, HIDDEN)
        yield f"{prefix}mlp.gate.weight", (EXPERTS, HIDDEN)
        if layout == "fused":
            yield f"{prefix}mlp.experts.gate_up_proj", (EXPERTS, HIDDEN, 2 * INNER)
            yield f"{prefix}mlp.experts.down_proj", (EXPERTS, INNER, HIDDEN)
        else:
            for expert in range(EXPERTS):
                for part in ("gate", "up"):
                    yield f"{prefix}mlp.experts.{expert}.{part}_proj.weight", (INNER, HIDDEN)
                yield f"{prefix}mlp.experts.{expert}.down_proj.weight", (HIDDEN, INNER)


def write_checkpoint(path: Path, gigabytes: float, layout: str) -> None:
    """A random checkpoint of about that size in shards of 1 GB; no model library is needed."""
    layer_bytes = 2 * (EXPERTS * 3 * HIDDEN * INNER + 4 * HIDDEN * HIDDEN)
    layers = max(1, round(gigabytes * 1e9 / layer_bytes))
    noise = memoryview(
        os.urandom(NOISE_BYTES)
    )  # no disk or file system of ours compresses or deduplicates; fresh noise would take minutes
    shards: list[list[tuple[str, tuple[int, ...], int]]] = [[]]
    for name, shape in tensors(layers, layout):
        nbytes = 2
        for extent in shape:
            nbytes *= extent
        if sum(size for _, _, size in shards[-1]) + nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append((name, shape, nbytes))
    where = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, position = {}, 0
        for name, shape, nbytes in members:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + nbytes]}
            position += nbytes
            where[name] = file
        text = json.dumps(header).encode()
        with (path / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            while position > 0:
                stream.write(noise[: min(position, NOISE_BYTES)])
                position -= NOISE_BYTES
            stream.flush()
            os.fsync(stream.fileno())
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "hidden_size": HIDDEN,
    }
    (path / "config.json").write_text(json.dumps(config))


def set_cache(path: Path, *, warm: bool) -> None:
    """Brings the files into the page cache or out of it."""
    os.sync()
    for file in path.iterdir():
        with file.open("rb", buffering=0) as stream:
            if warm:
                while stream.read(1 << 24):
                    pass
            else:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed_copy(source: Path, out: Path) -> float:
    """Seconds of `cp` with fsync of every file."""
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, out], check=True)
    for file in out.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - begin


def timed_prune(source: Path, selection: Selection, out: Path) -> float:
    """Seconds of opening the checkpoint and writing the pruned one, all of it synced."""
    begin = time.perf_counter()
    prune_checkpoint(Checkpoint.open(source), selection, out, max_shard_bytes=SHARD_BYTES)
    return time.perf_counter() - begin


def compare(work: Path, gigabytes: float, layout: str, pairs: int, *, warm: bool) -> dict[str, Any]:
    """Pairs on a checkpoint of this size; everything that was written is gone afterwards."""
    source, kept, out = work / "source", work / "kept", work / "out"
    source.mkdir()
    write_checkpoint(source, gigabytes, layout)
    checkpoint, draw = Checkpoint.open(source), random.Random(0)
    selection = Selection(
        "random",
        {
            layer: LayerSelection(tuple(sorted(draw.sample(range(EXPERTS), EXPERTS // 2))), (), ())
            for layer in checkpoint.layout.layers
        },
    )
    nbytes = prune_checkpoint(checkpoint, selection, kept, max_shard_bytes=SHARD_BYTES).nbytes
    times: dict[str, list[float]] = {"cp": [], "prune": []}
    for pair in range(pairs):
        for side in sorted(times, reverse=bool(pair % 2)):
            set_cache(source if side == "cp" else kept, warm=False)
            set_cache(kept if side == "cp" else source, warm=warm)
            times[side].append(timed_copy(kept, out) if side == "cp" else timed_prune(source, selection, out))
            shutil.rmtree(out)
    ratios = [prune / copy for prune, copy in zip(times["prune"], times["cp"], strict=True)]
    shutil.rmtree(source)
    shutil.rmtree(kept)
    return {
        "checkpoint_bytes": checkpoint.nbytes,
        "tensors": len(checkpoint.tensors),
        "kept_bytes": nbytes,
        "seconds": {side: [round(run, 2) for run in runs] for side, runs in times.items()},
        "gigabytes_per_second": round(nbytes / statistics.median(times["prune"]) / 1e9, 2),
        "ratio": {"median": round(statistics.median(ratios), 3), "runs": [round(ratio, 3) for ratio in ratios]},
        "within_limit": statistics.median(ratios) <= LIMIT_RATIO,
    }


def sha256_rate() -> float:
    """Gigabytes that one core hashes per second."""
    data, begin = os.urandom(NOISE_BYTES), time.perf_counter()
    for _ in range(4):
        hashlib.sha256(data).digest()
    return 4 * NOISE_BYTES / (time.perf_counter() - begin) / 1e9


def benchmark(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Cold and warm pairs, the peak memory of this process, and the limits."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "cold": compare(work, options.gigabytes, options.layout, options.pairs, warm=False),
        "warm": compare(
            work, min(options.gigabytes, WARM_SHARE * memory / 1e9), options.layout, options.warm_pairs, warm=True
        ),
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "benchmark": "prune against cp of the bytes that stay",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} {platform.machine().replace('_', '-')} cores, {memory / 2**30:.0f} GiB",
        "versions": {"python": platform.python_version(), "reapkit": version("reapkit"), "kernel": platform.release()},
        "layout": options.layout,
        "load_average": round(os.getloadavg()[0], 2),
        "sha256_gigabytes_per_second": round(sha256_rate(), 2),
        **found,
        "peak_memory_mib": round(peak / 2**20),
        "limits": {"ratio": LIMIT_RATIO, "memory_mib": LIMIT_BYTES >> 20},
        "within_limits": peak <= LIMIT_BYTES and all(part["within_limit"] for part in found.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--pairs", type=int, default=3, help="cold pairs")
    parser.add_argument("--warm-pairs", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="a directory on the disk to measure")
    parser.add_argument("--layout", choices=["per-expert", "fused"], default="per-expert")
    parser.add_argument("--output", type=Path, help="also write the result there as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as work:
        text = json.dumps(benchmark(options, Path(work)), indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
