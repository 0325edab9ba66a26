"""How long pruning a checkpoint takes against copying the bytes that stay with `cp`, on the same disk, in pairs.

    python benchmarks/prune.py [--gigabytes 3] [--pairs 5] [--directory /big/disk] [--layout per-expert|fused]

Writes a random checkpoint, prunes half its experts, and copies the result with `cp`; each pair in alternating order, once with
the source in the page cache (warm) and once without (cold). Both sides end with fsync. Reports medians, their ratio and the
peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from reapkit.checkpoint import Checkpoint
from reapkit.layout import read_layout
from reapkit.selection import LayerSelection, Selection
from reapkit.surgery.prune import prune_checkpoint

HIDDEN, INNER, EXPERTS, TOP_K = 2048, 768, 64, 8
SHARD_BYTES = 1_000_000_000


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
                stream.write(os.urandom(min(position, 1 << 24)))
                position -= 1 << 24
            stream.flush()
            os.fsync(stream.fileno())
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {"model_type": "qwen3_moe", "num_hidden_layers": layers, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K,
              "hidden_size": HIDDEN}
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
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, out], check=True)
    for file in out.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - begin


def timed_prune(source: Path, selection: Selection, out: Path) -> float:
    begin = time.perf_counter()
    prune_checkpoint(Checkpoint.open(source), selection, out, max_shard_bytes=SHARD_BYTES)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--layout", choices=["per-expert", "fused"], default="per-expert")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as work:
        source, kept, out = Path(work, "source"), Path(work, "kept"), Path(work, "out")
        source.mkdir()
        write_checkpoint(source, options.gigabytes, options.layout)
        checkpoint = Checkpoint.open(source)
        draw = random.Random(0)
        selection = Selection("random", {layer: LayerSelection(tuple(sorted(draw.sample(range(EXPERTS), EXPERTS // 2))), (), ())
                                         for layer in read_layout(checkpoint).layers})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        nbytes = prune_checkpoint(checkpoint, selection, kept, max_shard_bytes=SHARD_BYTES).nbytes
        print(f"{options.layout}: {checkpoint.nbytes / 1e9:.2f} GB in {len(checkpoint.tensors)} tensors, {nbytes / 1e9:.2f} GB "
              "stay")
        for warm in (True, False):
            times: dict[str, list[float]] = {"cp": [], "prune": []}
            for pair in range(options.pairs):
                for side in sorted(times, reverse=bool(pair % 2)):
                    set_cache(kept if side == "cp" else source, warm=warm)
                    seconds = timed_copy(kept, out) if side == "cp" else timed_prune(source, selection, out)
                    times[side].append(seconds)
                    shutil.rmtree(out)
            ratios = [prune / copy for prune, copy in zip(times["prune"], times["cp"], strict=True)]
            print(f"{'warm' if warm else 'cold'} cache, {options.pairs} pairs: cp {statistics.median(times['cp']):.2f} s, "
                  f"prune with sha256 {statistics.median(times['prune']):.2f} s "
                  f"({nbytes / statistics.median(times['prune']) / 1e9:.2f} GB/s), "
                  f"ratio median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"peak memory {peak / 1024:.0f} MiB, of which {before / 1024:.0f} MiB before pruning")


if __name__ == "__main__":
    main()
