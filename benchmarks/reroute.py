"""What the reroute stage costs for one layer: all experts' outputs on the sample, then the removal path. Times and peak
memory.

    python benchmarks/reroute.py [--device cpu|cuda] [--dtype float32|bfloat16] [--tokens 8192] [--threads N]
        [--json FILE]

The default is a layer of Qwen3-30B-A3B's shape with random weights: 128 experts, top-8, hidden 2048, 768 per expert.
Half of the router's rows are drawn along a few common directions, so that loads are uneven as in trained models.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from reapkit.model.routed_experts import RoutedExperts, find_experts
from reapkit.observation.reroute_layer import Router, _outputs, is_local
from reapkit.observation.rerouting import Sampled, path, single


def build(arguments: argparse.Namespace) -> RoutedExperts:
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=256, hidden_size=arguments.hidden, intermediate_size=64,
        moe_intermediate_size=arguments.inner, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        head_dim=32, num_experts=arguments.experts, num_experts_per_tok=arguments.top_k,
        norm_topk_prob=True)  # fmt: skip
    with torch.device("meta"):
        model = (
            AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype)).eval().requires_grad_(False)
        )
    model.to_empty(device=arguments.device)
    torch.manual_seed(0)
    site = find_experts(model)[0]
    for parameter in site.block.parameters():
        for part in parameter.data if parameter.dim() == 3 else [parameter.data]:
            part.normal_(0, part.shape[-1] ** -0.5)
    router = site.block.gate.weight.data
    common = torch.randn(8, arguments.hidden, device=router.device, dtype=router.dtype) * arguments.hidden**-0.5
    router[::2] += common[torch.arange(len(router[::2]), device=router.device) % 8]
    return site


def timed(run: Callable[[], object], device: str) -> tuple[object, float]:
    """Seconds; of one thread on a CPU its processor time, which the load of other processes leaves nearly alone."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    found = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return found, clock() - began


def peak_bytes(device: str) -> int:
    return (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


def product_rate(rows: int, inner: int, outer: int, dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a plain matrix product of this size, the best of five: the limit that nothing built on products can
    pass."""
    left, right = torch.randn(rows, inner).to(device, dtype), torch.randn(outer, inner).to(device, dtype)
    seconds = [timed(lambda: torch.nn.functional.linear(left, right), device)[1] for _ in range(6)][1:]
    return 2 * rows * inner * outer / min(seconds)


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Seconds of each part, FLOPs of the outputs and the time that plain products of that many take, bytes before and
    at the peak."""
    site, device = build(arguments), arguments.device
    inputs = torch.randn(arguments.tokens, arguments.hidden, generator=torch.Generator().manual_seed(1)).to(
        device, getattr(torch, arguments.dtype)
    )
    residual, before = torch.full((arguments.tokens,), float(arguments.hidden)), peak_bytes(device)
    calls = 0
    with Router(site, inputs) as router:
        outputs, outputs_s = timed(lambda: _outputs(site, router.read, residual, arguments.projected), device)

        def route(alive: list[int], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal calls
            calls += 1
            return router.route(alive, tokens)

        local, probe_s = timed(lambda: is_local(router, arguments.experts, arguments.top_k), device)
        everything = torch.zeros(arguments.tokens, dtype=torch.int64)
        sampled = Sampled(
            outputs,
            route,
            everything,
            torch.ones(arguments.tokens, dtype=torch.float64),
            arguments.experts,
            arguments.top_k,
            local=local,
        )
        _, single_s = timed(lambda: single(sampled, 1), device)
        calls = 0
        found, path_s = timed(lambda: path(sampled), device)
    computing = torch.float32 if device == "cpu" else getattr(torch, arguments.dtype)
    rate = product_rate(512, arguments.hidden, 2 * arguments.inner, computing, device)
    flop = (
        2
        * arguments.tokens
        * arguments.experts
        * arguments.hidden
        * (3 * arguments.inner + min(arguments.experts, 256))
    )
    return {
        "outputs_seconds": outputs_s, "outputs_flop": flop, "product_flop_per_second": rate,
        "limit_seconds": flop / rate, "share_of_limit": flop / rate / outputs_s,
        "probe_seconds": probe_s, "single_seconds": single_s, "path_seconds": path_s, "router_calls": calls,
        "kept_bytes": arguments.tokens * arguments.experts * min(arguments.experts, 256) * 4, "local": local,
        "bytes_before": before, "bytes_peak": peak_bytes(device), "removed": int((found.order >= 0).sum()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--projected", action="store_true", help="random projections instead of inner products")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    facts = {
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": {name: value for name, value in vars(arguments).items() if name != "json"},
        **measure(arguments),
    }
    print(json.dumps(facts, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
