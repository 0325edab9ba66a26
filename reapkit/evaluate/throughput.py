"""How fast a model directory runs and how much memory it takes, each in a fresh process so that nothing else counts.

`python -m reapkit.evaluate.throughput DIRECTORY [DEVICE]` prints one JSON object.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reapkit.errors import StageFailed
from reapkit.models import load_model

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 256, 32, 3


def throughput_of(path: Path, device: str = "cpu", trust_remote_code: bool = False) -> dict[str, Any]:
    """`{engine, device, prompt_tokens, new_tokens, prefill_tokens_per_s, decode_tokens_per_s, peak_bytes}` of one row.

    Medians over three repeats after a warm-up; the peak is the device's, on a CPU the process's. Raises StageFailed with the
    process's last words where it fails.
    """
    command = [
        sys.executable,
        "-m",
        "reapkit.evaluate.throughput",
        str(path),
        device,
        *(["--trust-remote-code"] if trust_remote_code else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise StageFailed(f"throughput of {path}: the measuring process ended with {done.returncode}: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def measure(model: nn.Module) -> dict[str, Any]:
    """The numbers of `throughput_of` for a loaded model, peak memory of this process included."""
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_output_embeddings().weight.shape[0]
    prompt = torch.randint(vocabulary, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    _decode(model, prompt)
    prefill = statistics.median(_seconds(device, lambda: model(input_ids=prompt, use_cache=True)) for _ in range(REPEATS))
    both = statistics.median(_seconds(device, lambda: _decode(model, prompt)) for _ in range(REPEATS))
    return {"engine": "transformers", "device": device.type, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS,
            "prefill_tokens_per_s": PROMPT_TOKENS / prefill, "decode_tokens_per_s": NEW_TOKENS / max(both - prefill, 1e-9),
            "peak_bytes": _peak_bytes(device)}


def _decode(model: nn.Module, prompt: Tensor) -> None:
    """The prompt, then `NEW_TOKENS` single tokens on its cache."""
    out = model(input_ids=prompt, use_cache=True)
    for _ in range(NEW_TOKENS):
        out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def main(arguments: list[str]) -> None:
    given = [argument for argument in arguments if argument != "--trust-remote-code"]
    model = load_model(given[0], device=given[1] if len(given) > 1 else "cpu", trust_remote_code=len(given) < len(arguments))
    print(json.dumps(measure(model)))


if __name__ == "__main__":
    main(sys.argv[1:])
