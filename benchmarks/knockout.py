"""How fast are knock-outs against plain forwards? Tokens x layers per second, both measured in one process.

    python benchmarks/knockout.py [--dtype float32|bfloat16] [--hidden 256] [--experts 16] [--top-k 4] [--layers 8]
                                  [--tokens 1024] [--length 256] [--vocabulary 4096] [--json FILE]

A knock-out behind layer l of L counts L - l layers for every token of the sample: what a forward that begins there
takes, whether or not a row sees the expert. `computed` counts only what really ran behind the layers. The plain forward
includes the head, as every knock-out does. The model is a random qwen3_moe on one thread of a CPU, where a row of this
length sees nearly every expert; CPU time, so that a busy machine disturbs it less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from reapkit.calibration.tokens import SUMMARY_FILE, TOKENS_FILE, CalibrationTokens
from reapkit.core.mapped_safetensors import create_tensors
from reapkit.evaluation.head import hidden_states, logits
from reapkit.evaluation.knockout import resident

LIMIT = "what runs once a variant in the expert's own layer (router, norms), and the KL over the vocabulary"


def build(arguments: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=2 * arguments.hidden,
        moe_intermediate_size=arguments.hidden // 2,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.hidden // 64,
        head_dim=64,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
        norm_topk_prob=True,
    )
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, arguments.dtype)).eval()
    model.set_experts_implementation("eager")
    return model


def rows(directory: Path, arguments: argparse.Namespace) -> CalibrationTokens:
    """Rows of random tokens, all scored."""
    count, length = arguments.tokens // arguments.length, arguments.length
    offsets = np.arange(count + 1) * length
    written = {
        "input_ids": np.random.default_rng(0).integers(0, arguments.vocabulary, count * length).astype("int32"),
        "assistant": np.ones(count * length, "uint8"),
        "row_offsets": offsets,
        "row_source": np.zeros(count, "int16"),
        "sample_offsets": offsets,
        "part_sample": np.arange(count, dtype="int32"),
    }
    file = create_tensors(
        directory / TOKENS_FILE, {name: (str(each.dtype), len(each)) for name, each in written.items()}
    )
    for name, values in written.items():
        file[name][:] = values
        file[name].flush()
    summary = {
        "sources": [{"name": "random"}],
        "score": "all",
        "packing": "none",
        "groups": [0, count],
        "snapshots": [0, 0, 0, 0],
    }
    (directory / SUMMARY_FILE).write_text(json.dumps(summary))
    return CalibrationTokens.load(directory)


def plain_speed(model: torch.nn.Module, tokens: CalibrationTokens, arguments: argparse.Namespace) -> float:
    """Tokens x layers per second of whole forwards with the head, the better of two."""
    ids = torch.stack([tokens.row(row).input_ids for row in range(tokens.num_rows)])
    times = []
    for _ in range(3):
        started = time.process_time()
        hidden = hidden_states(model, ids)
        for part in hidden.reshape(-1, hidden.shape[-1]).split(1024):
            logits(model, part)
        times.append(time.process_time() - started)
    return ids.numel() * arguments.layers / min(times[1:])


def counting(computed: list[int], layers: int) -> None:
    """Notes the tokens x layers of every forward that begins behind a layer."""
    begun = resident.hidden_behind

    def counted(model, all_layers, layer, hidden, *rest, **how):
        computed.append(hidden.shape[0] * hidden.shape[1] * (layers - 1 - layer))
        return begun(model, all_layers, layer, hidden, *rest, **how)

    resident.hidden_behind = counted


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    for name, value in (
        ("hidden", 256),
        ("experts", 16),
        ("top-k", 4),
        ("layers", 8),
        ("tokens", 1024),
        ("length", 256),
        ("vocabulary", 4096),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, computed = build(arguments), []
    with tempfile.TemporaryDirectory() as scratch:
        tokens = rows(Path(scratch), arguments)
        plain = plain_speed(model, tokens, arguments)
        counting(computed, arguments.layers)
        started = time.process_time()
        found = resident.measure_knockouts(
            model, tokens, arguments.tokens, batch_tokens=arguments.tokens, work_directory=Path(scratch) / "work"
        )
        seconds = time.process_time() - started
    assert found is not None
    nominal = arguments.experts * tokens.num_tokens * sum(range(1, arguments.layers + 1))
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": {name: value for name, value in vars(arguments).items() if name != "json"},
        "seconds": round(seconds, 2),
        "token_layers_per_second": {
            "plain": round(plain),
            "knockout": round(nominal / seconds),
            "computed": round(sum(computed) / seconds),
        },
        "ratio": round(nominal / seconds / plain, 3),
        "limit": LIMIT,
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
