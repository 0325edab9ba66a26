"""Measures speed and memory of a model directory, each in a fresh process so that nothing else counts.

`python -m reapkit.evaluation.throughput DIRECTORY PROMPT_TOKENS NEW_TOKENS [DEVICE]` prints one JSON object.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import ReapkitError, StageFailed, UnusableError
from reapkit.core.programs import run_program
from reapkit.evaluation.metrics.table import METRICS
from reapkit.evaluation.serving.serve_check import ask_vllm, vllm_python
from reapkit.model.causal_lm import input_weight
from reapkit.model.loading import load_model
from reapkit.recipe.schema import ThroughputSpec

REPEATS = 3
DEFAULT = ThroughputSpec()
NUMBERS = tuple(metric.name for metric in METRICS.values() if metric.kind == "throughput")


@dataclass(frozen=True)
class SpeedTest:
    """How one engine, by its key in `quantization.engines`, measures a model directory: the numbers of `throughput_of`.

    `run` raises a ReapkitError that says why where it cannot; `skips` and `note` are what transformers alone needs: the
    models it is not asked for, with the reason, and a remark on how it reads a directory.
    """

    engine: str
    run: Callable[[Path], dict[str, Any]]
    skips: Mapping[str, str] = field(default_factory=dict)
    note: Callable[[Path], str] = lambda path: ""


def measure_throughput(
    directories: Mapping[str, Path],
    spec: ThroughputSpec,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    skip: Mapping[str, str] | None = None,
    tests: Sequence[SpeedTest] | None = None,
) -> list[dict[str, Any]]:
    """A row per engine and model, transformers first, then vLLM where there is one; a speed that cannot be had never
    stops a run.

    A row: `{model, engine, version, device, prompt_tokens, new_tokens, repeats, prefill_tokens_per_s,
    decode_tokens_per_s, peak_bytes, idle_bytes, not_measured: why | None, note}`; numbers are None where `not_measured`
    says why. `skip`: models that transformers is not asked for, with the reason. `tests` None: of the engines found
    here.
    """
    tests = speed_tests(spec, device, trust_remote_code, skip or {}) if tests is None else tests
    return [_attempt(test, name, path) for test in tests for name, path in directories.items()]


def speed_tests(
    spec: ThroughputSpec, device: str, trust_remote_code: bool, skip: Mapping[str, str]
) -> tuple[SpeedTest, ...]:
    """The engines found here: transformers, and vLLM where `vllm_python` names a Python or says what is wrong with
    it."""
    by_transformers = SpeedTest(
        "transformers", lambda path: throughput_of(path, device, trust_remote_code, spec=spec), skip, _note
    )
    try:
        python = vllm_python()
    except ReapkitError as error:
        return by_transformers, SpeedTest("vllm", partial(_refuse, str(error)))
    if python is None:
        return (by_transformers,)
    return by_transformers, SpeedTest("vllm", lambda path: _by_vllm(python, path, spec, trust_remote_code))


def _refuse(why: str, path: Path) -> dict[str, Any]:
    raise UnusableError(why)


def _attempt(test: SpeedTest, name: str, path: Path) -> dict[str, Any]:
    row = {
        "model": name,
        "engine": test.engine,
        **dict.fromkeys((*NUMBERS, "idle_bytes")),
        "not_measured": test.skips.get(name),
        "note": "",
    }
    if row["not_measured"] is None:
        try:
            row |= test.run(path)
        except ReapkitError as error:
            row["not_measured"] = str(error)[:500]
    return row | {"note": test.note(path)}


def _note(path: Path) -> str:
    packed = Checkpoint.open(path).quantization
    return "loaded as it is evaluated, weights unpacked to the model's dtype" if packed else ""


def _by_vllm(python: Path, path: Path, spec: ThroughputSpec, trust_remote_code: bool) -> dict[str, Any]:
    """Raises StageFailed with vLLM's own words where it does not run the directory."""
    prompt = _prompt(_vocabulary(path), spec.prompt_tokens).squeeze(0).tolist()
    options = {"trust_remote_code": True} if trust_remote_code else {}
    answer = ask_vllm(python, [path], [prompt], spec.new_tokens, task="throughput", options=options)
    [found] = answer["results"]
    if "error" in found:
        raise StageFailed(f"vLLM {answer['version']} does not run it here: {found['error']}")
    return {
        "version": answer["version"],
        "device": answer["platform"],
        "prompt_tokens": spec.prompt_tokens,
        "new_tokens": spec.new_tokens,
        **found,
    }


def throughput_of(
    path: Path, device: str = "cpu", trust_remote_code: bool = False, *, spec: ThroughputSpec = DEFAULT
) -> dict[str, Any]:
    """`{engine, version, device, prompt_tokens, new_tokens, repeats, prefill_tokens_per_s, decode_tokens_per_s,
    peak_bytes, idle_bytes}`.

    One row of random tokens by transformers, medians over the repeats after a warm-up; the peak is the device's, on a
    CPU the process's, of which `idle_bytes` were there before the model. Raises StageFailed with the process's last
    words where it fails.
    """
    command = [
        sys.executable,
        "-m",
        "reapkit.evaluation.throughput",
        str(path),
        str(spec.prompt_tokens),
        str(spec.new_tokens),
        device,
        *(["--trust-remote-code"] if trust_remote_code else []),
    ]
    done = run_program(command)
    if done.code != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise StageFailed(f"throughput of {path}: the measuring process {done.how}: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    spec: ThroughputSpec = DEFAULT,
    idle_bytes: int = 0,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """The numbers of `throughput_of` for a loaded model, peak memory of this process included. `clock`: seconds."""
    import transformers

    device = input_weight(model).device
    prompt = _prompt(input_weight(model).shape[0], spec.prompt_tokens).to(device)
    _timed(model, prompt, spec.new_tokens, clock)
    repeats = [_timed(model, prompt, spec.new_tokens, clock) for _ in range(REPEATS)]
    prefill, decode = map(statistics.median, zip(*repeats, strict=True))
    return {
        "engine": "transformers",
        "version": transformers.__version__,
        "device": device.type,
        "prompt_tokens": spec.prompt_tokens,
        "new_tokens": spec.new_tokens,
        "repeats": REPEATS,
        "prefill_tokens_per_s": spec.prompt_tokens / prefill,
        "decode_tokens_per_s": spec.new_tokens / decode,
        "peak_bytes": _peak_bytes(device),
        "idle_bytes": idle_bytes,
    }


def _timed(model: PreTrainedModel, prompt: Tensor, new_tokens: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of the prompt `[1, tokens]` int64, and of `new_tokens` single tokens on its cache."""
    device, started = prompt.device, clock()
    out = model(input_ids=prompt, use_cache=True)
    _wait(device)
    prefilled = clock()
    for _ in range(new_tokens):
        out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    _wait(device)
    return prefilled - started, clock() - prefilled


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _prompt(vocabulary: int, tokens: int) -> Tensor:
    """Random ids `[1, tokens]` int64, the same every time."""
    return torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))


def _vocabulary(path: Path) -> int:
    from reapkit.checkpoint.architecture import text_config

    return int(text_config(Checkpoint.open(path).config)["vocab_size"])


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024  # getrusage would count the parent's peak as ours
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def main(arguments: list[str]) -> None:
    path, prompt, new, device = [argument for argument in arguments if argument != "--trust-remote-code"]
    idle = 0 if device.startswith("cuda") else _peak_bytes(torch.device("cpu"))
    model = load_model(path, device=device, trust_remote_code="--trust-remote-code" in arguments)
    print(json.dumps(measure(model, ThroughputSpec(prompt_tokens=int(prompt), new_tokens=int(new)), idle)))


if __name__ == "__main__":
    main(sys.argv[1:])
