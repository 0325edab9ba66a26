"""How much slower than a plain forward is an observed one? Measured in pairs in one process, medians of the ratios.

    python benchmarks/observe.py [--dtype float32|bfloat16] [--device cpu|cuda] [--pairs 7] [--json FILE]

The model is a random qwen3_moe, top-8: on a CPU of hidden 1024, 64 experts, 4 layers, one thread; on a GPU of hidden
2048, 128 experts, 24 layers (15 billion parameters). The plain forward runs transformers' fastest experts
implementation on the device, both sides without the LM head, and with it where EAFT signals are collected.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from reapkit.calibration.tokens import Batch
from reapkit.model.loading import final_hidden
from reapkit.model.routed_experts import find_experts
from reapkit.observation.accumulate import GroupSums
from reapkit.observation.eaft_trace import GroupTraces
from reapkit.observation.session import BatchWatch, Session
from reapkit.recipe.schema import ObserveSpec


@dataclass(frozen=True)
class Shape:
    """The model, and the tokens of one batch."""

    hidden: int
    experts: int
    intermediate: int
    layers: int
    tokens: int


SHAPES = {"cpu": Shape(1024, 64, 512, 4, 2048), "cuda": Shape(2048, 128, 768, 24, 16384)}


def build(shape: Shape, dtype: torch.dtype, device: str, vocabulary: int) -> torch.nn.Module:
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=shape.experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.to_empty(device=device)
    block = (0.1 * (torch.rand(1 << 18) - 0.5)).to(
        device=device, dtype=dtype
    )  # drawing 400 million normals would take longer than the test
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        flat.copy_(block.repeat(-(-flat.numel() // block.numel()))[: flat.numel()])
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.weight.data.fill_(1)
        if "Rotary" in type(module).__name__:
            model._init_weights(module)
    return model


def one_batch(rows: int, length: int, vocabulary: int) -> Batch:
    ids = torch.randint(0, vocabulary, (rows, length))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    signal = everywhere.clone()
    signal[:, -1] = False
    return Batch(
        ids,
        torch.full((rows,), length),
        everywhere,
        everywhere,
        signal,
        torch.arange(rows) % 3,
        None,
        tuple(range(rows)),
    )


def fastest_plain(model: torch.nn.Module, run: Callable[[], object]) -> str:
    """Sets and returns the experts implementation with the fastest plain forward."""
    times = {}
    for name in ("eager", "grouped_mm"):
        model.set_experts_implementation(name)
        run()
        times[name] = min(timed(run) for _ in range(2))
    best = min(times, key=times.get)
    model.set_experts_implementation(best)
    return best


def timed(run: Callable[[], object]) -> float:
    """Seconds: wall time with a GPU, else this one thread's CPU time, which a busy machine disturbs less."""
    if not torch.cuda.is_available():
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@contextlib.contextmanager
def watching(model: torch.nn.Module, batch: Batch, eaft: bool) -> Iterator[BatchWatch]:
    sites = find_experts(model)
    with tempfile.TemporaryDirectory() as directory:
        starts = (0, int(batch.signal.sum()))
        trace = GroupTraces(Path(directory), [site.layer for site in sites], 8, starts) if eaft else None
        session = Session(sites, None, ObserveSpec(eaft=eaft), Path(directory), trace, (0,), 8, "qwen3_moe", {})
        yield BatchWatch(session, batch, GroupSums(sites, 3).add)


def ratios(plain: Callable[[], object], observed: Callable[[], object], pairs: int) -> list[float]:
    plain(), observed()
    out = []
    for number in range(pairs):  # alternate who goes first
        first, second = (plain, observed) if number % 2 else (observed, plain)
        a, b = timed(first), timed(second)
        out.append(b / a if first is plain else a / b)
    return out


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, help="in one batch; default: 2048 on a CPU, 16384 on a GPU")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = SHAPES[arguments.device]
    tokens = arguments.tokens or shape.tokens
    model = build(shape, getattr(torch, arguments.dtype), arguments.device, arguments.vocabulary)
    batch = one_batch(tokens // 512, 512, arguments.vocabulary)
    ids = batch.input_ids.to(arguments.device)
    best = fastest_plain(model, lambda: final_hidden(model, ids))
    gpu = arguments.device == "cuda"
    result = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if gpu else arguments.device,
        "dtype": arguments.dtype,
        "tokens": tokens,
        "model": asdict(shape) | {"parameters": sum(parameter.numel() for parameter in model.parameters())},
        "plain": best,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for eaft in (False, True):
        with watching(model, batch, eaft) as watch:

            def observed(watch: BatchWatch = watch, eaft: bool = eaft) -> None:
                with watch.session.watching(lambda: watch):
                    hidden = final_hidden(model, ids)
                if eaft:
                    for site in watch.session.sites:
                        watch.write_routed(site.layer)
                    watch.finish(model, hidden)

            plain = (lambda: model(ids, use_cache=False)) if eaft else (lambda: final_hidden(model, ids))
            measured = ratios(plain, observed, arguments.pairs)
        name = "eaft" if eaft else "statistics"
        result[name] = {
            "median": round(statistics.median(measured), 4),
            "ratios": [round(ratio, 4) for ratio in measured],
        }
        print(
            f"{name:11s} {result[name]['median']:.3f}x a plain forward ({best}), pairs {min(measured):.3f} to"
            f" {max(measured):.3f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
