"""Throughput is measured in a process of its own; what cannot be measured is said and stops nothing."""

import subprocess
import sys

import pytest
import torch

from reapkit.core.errors import StageFailed, UnusableError
from reapkit.evaluation import throughput as module
from reapkit.evaluation.throughput import measure, measure_throughput, throughput_of
from reapkit.recipe.schema import ThroughputSpec
from tests.support import tiny

SHORT = ThroughputSpec(prompt_tokens=40, new_tokens=5)
SPEEDS = {
    "engine": "transformers",
    "version": "1",
    "device": "cpu",
    "prefill_tokens_per_s": 9.0,
    "decode_tokens_per_s": 3.0,
    "peak_bytes": 7,
}


@pytest.fixture
def directory(tmp_path):
    tiny.save_hub_layout(tiny.build("qwen3_moe", num_hidden_layers=1), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.long
def test_a_directory_is_measured_in_a_fresh_process(directory):
    found = throughput_of(directory, spec=SHORT)
    assert found["engine"] == "transformers" and found["device"] == "cpu"
    assert found["prompt_tokens"] == 40 and found["new_tokens"] == 5
    assert found["prefill_tokens_per_s"] > found["decode_tokens_per_s"] > 0
    assert 10**7 < found["idle_bytes"] <= found["peak_bytes"] < 10**10


def test_speeds_are_tokens_over_the_median_of_their_own_seconds(monkeypatch):
    model, widths, clock = tiny.build("qwen3_moe", num_hidden_layers=1), [], [0.0]
    forward = model.forward

    def slow(**inputs):
        widths.append(inputs["input_ids"].shape[1])
        clock[0] += 2.0 if widths[-1] > 1 else 0.5  # seconds of the prompt, of a token
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", slow)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    found = measure(model, SHORT, idle_bytes=11)
    assert widths == [40, 1, 1, 1, 1, 1] * 4  # each repeat, and the warm-up, decodes on its cache
    assert found["prefill_tokens_per_s"] == 20 and found["decode_tokens_per_s"] == 2 and found["idle_bytes"] == 11


def test_memory_of_the_process_that_started_it_is_not_counted():
    large = bytearray(600_000_000)  # a parent's peak, which getrusage would hand on to its child
    large[::4096] = b"x" * len(large[::4096])
    code = (
        "import torch; from reapkit.evaluation.throughput import _peak_bytes; print(_peak_bytes(torch.device('cpu')))"
    )
    small = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0 < small < module._peak_bytes(torch.device("cpu")) - len(large) // 2


def test_a_failing_process_is_reported_with_its_last_words(tmp_path, monkeypatch):
    ended = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nMemoryError: no more")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: ended)
    with pytest.raises(StageFailed, match=r"throughput of .* ended with 1: MemoryError: no more"):
        throughput_of(tmp_path)


def test_what_cannot_be_measured_is_a_row_that_says_why(directory, monkeypatch):
    def one_dies(path, *args, **kwargs):
        raise StageFailed("no memory for it")

    monkeypatch.setattr(module, "throughput_of", one_dies)
    monkeypatch.setattr(module, "vllm_python", lambda: None)
    base, result = measure_throughput({"base": directory, "pruned": directory}, SHORT, skip={"base": "it streams"})
    assert (base["model"], base["engine"], base["not_measured"]) == ("base", "transformers", "it streams")
    assert result["not_measured"] == "no memory for it" and result["prefill_tokens_per_s"] is None


def test_vllm_is_asked_where_there_is_one(directory, monkeypatch):
    asked = []

    def ask(python, directories, prompts, new_tokens, *, task, options):
        asked.append((str(python), task, len(prompts[0]), new_tokens))
        result = (
            {"error": "no kernel"}
            if len(asked) == 2
            else {name: SPEEDS[name] for name in module.NUMBERS} | {"repeats": 3}
        )
        return {"version": "0.32", "platform": "cpu", "results": [result]}

    monkeypatch.setattr(module, "throughput_of", lambda *args, **kwargs: SPEEDS)
    monkeypatch.setattr(module, "vllm_python", lambda: sys.executable)
    monkeypatch.setattr(module, "ask_vllm", ask)
    rows = measure_throughput({"base": directory, "pruned": directory}, SHORT)
    assert [(row["model"], row["engine"]) for row in rows] == [
        ("base", "transformers"),
        ("pruned", "transformers"),
        ("base", "vllm"),
        ("pruned", "vllm"),
    ]
    assert asked == [(sys.executable, "throughput", 40, 5)] * 2
    assert rows[2]["prefill_tokens_per_s"] == 9.0 and rows[2]["version"] == "0.32" and rows[2]["not_measured"] is None
    assert rows[3]["not_measured"] == "vLLM 0.32 does not run it here: no kernel"


def test_a_python_without_vllm_is_said_not_raised(directory, monkeypatch):
    def none():
        raise UnusableError("python3: has no vLLM.")

    monkeypatch.setattr(module, "throughput_of", lambda *args, **kwargs: SPEEDS)
    monkeypatch.setattr(module, "vllm_python", none)
    assert measure_throughput({"base": directory}, SHORT)[1]["not_measured"] == "python3: has no vLLM."
