"""Throughput is measured in a process of its own; what cannot be measured is said and stops nothing."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from reapkit.core.errors import StageFailed
from reapkit.evaluation.serving.serve_check import VARIABLE
from reapkit.evaluation.throughput import (
    NUMBERS,
    SpeedTest,
    _peak_bytes,
    measure,
    measure_throughput,
    speed_tests,
    throughput_of,
)
from reapkit.recipe.schema import ThroughputSpec
from tests.support import tiny

SHORT = ThroughputSpec(prompt_tokens=40, new_tokens=5)
VLLM = """#!{python}
import json, sys
if sys.argv[1] == "-c":  # whether there is a vLLM here
    sys.exit(0)
request = json.load(open(sys.argv[2]))
json.dump(request, open({asked!r}, "w"))
numbers = {{"prefill_tokens_per_s": 9.0, "decode_tokens_per_s": 3.0, "peak_bytes": 7, "repeats": 3}}
refused = request["directories"][0].endswith("refused")
results = [{{"error": "no kernel"}} if refused else numbers]
json.dump({{"version": "0.32", "platform": "cpu", "results": results}}, open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save_hub_layout(tiny.build("qwen3_moe", num_hidden_layers=1), tmp_path_factory.mktemp("m") / "model")


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """`vllm(script)`: the Python with vLLM is this script."""

    def of(script):
        python = tmp_path / "python"
        python.write_text(script)
        python.chmod(0o755)
        monkeypatch.setenv(VARIABLE, str(python))
        return speed_tests(SHORT, "cpu", False, {})

    return of


class Slow(torch.nn.Module):
    """A model whose prompt takes two seconds of its own clock and whose every token takes half a second."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(16, 4)
        self.seconds = 0.0
        self.calls = []

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache, past_key_values=None):
        width = input_ids.shape[1]
        self.calls.append((width, past_key_values))
        self.seconds += 2.0 if width > 1 else 0.5
        return SimpleNamespace(logits=torch.zeros(1, width, 16), past_key_values=(past_key_values or 0) + width)


@pytest.mark.long
def test_a_directory_is_measured_in_a_fresh_process(directory):
    found = throughput_of(directory, spec=SHORT)
    assert found["engine"] == "transformers" and found["device"] == "cpu"
    assert found["prompt_tokens"] == 40 and found["new_tokens"] == 5
    assert found["prefill_tokens_per_s"] > found["decode_tokens_per_s"] > 0
    assert 10**7 < found["idle_bytes"] <= found["peak_bytes"] < 10**10


def test_speeds_are_tokens_over_the_median_of_their_own_seconds():
    model = Slow()
    found = measure(model, SHORT, idle_bytes=11, clock=lambda: model.seconds)
    one = [(40, None), (1, 40), (1, 41), (1, 42), (1, 43), (1, 44)]
    assert model.calls == one * 4  # each repeat, and the warm-up, decodes on its cache
    assert found["prefill_tokens_per_s"] == 20 and found["decode_tokens_per_s"] == 2 and found["idle_bytes"] == 11


@pytest.mark.long
def test_memory_of_the_process_that_started_it_is_not_counted():
    large = bytearray(600_000_000)  # a parent's peak, which getrusage would hand on to its child
    large[::4096] = b"x" * len(large[::4096])
    code = (
        "import torch; from reapkit.evaluation.throughput import _peak_bytes; print(_peak_bytes(torch.device('cpu')))"
    )
    small = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0 < small < _peak_bytes(torch.device("cpu")) - len(large) // 2


def test_a_failing_process_is_reported_with_its_last_words(tmp_path):
    with pytest.raises(
        StageFailed, match=r"throughput of .* ended with code 1: .*UnusableError: .*there is no config\.json"
    ):
        throughput_of(tmp_path)


def test_what_cannot_be_measured_is_a_row_that_says_why(directory):
    asked = []

    def dies(path):
        asked.append(path)
        raise StageFailed("no memory for it")

    tests = [SpeedTest("transformers", dies, {"base": "it streams"}, note=lambda path: path.name)]
    base, result = measure_throughput({"base": directory, "pruned": directory}, SHORT, tests=tests)
    assert (base["model"], base["engine"], base["not_measured"]) == ("base", "transformers", "it streams")
    assert result["not_measured"] == "no memory for it" and asked == [directory]
    assert base["note"] == result["note"] == "model"
    assert not any(row[name] for row in (base, result) for name in NUMBERS)


def test_vllm_is_asked_where_there_is_one(directory, tmp_path, vllm):
    copied = tmp_path / "refused"
    copied.mkdir()
    (copied / "config.json").write_text((directory / "config.json").read_text())
    (copied / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    _, by_vllm = vllm(VLLM.format(python=sys.executable, asked=str(tmp_path / "asked.json")))
    by_transformers = SpeedTest("transformers", lambda path: {"version": "5"})
    rows = measure_throughput({"base": directory, "pruned": copied}, SHORT, tests=(by_transformers, by_vllm))
    assert [(row["model"], row["engine"]) for row in rows] == [
        ("base", "transformers"),
        ("pruned", "transformers"),
        ("base", "vllm"),
        ("pruned", "vllm"),
    ]
    asked = json.loads((tmp_path / "asked.json").read_text())
    assert (asked["task"], len(asked["prompts"][0]), asked["new_tokens"]) == ("throughput", 40, 5)
    assert rows[2]["prefill_tokens_per_s"] == 9.0 and rows[2]["version"] == "0.32" and rows[2]["not_measured"] is None
    assert rows[3]["not_measured"] == "vLLM 0.32 does not run it here: no kernel"


def test_a_python_without_vllm_is_said_not_raised(directory, vllm):
    tests = vllm("#!/bin/sh\nexit 1\n")
    assert [test.engine for test in tests] == ["transformers", "vllm"]
    [row] = measure_throughput({"base": directory}, SHORT, tests=tests[1:])
    assert row["not_measured"].endswith(f"or name another Python with --vllm-python or {VARIABLE}.")
    assert "has no vLLM. Install it there" in row["not_measured"]


def test_packed_weights_are_remarked_on(directory, tmp_path):
    [plain, *_] = speed_tests(SHORT, "cpu", False, {})
    assert plain.note(directory) == ""
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    assert plain.note(tmp_path) == "loaded as it is evaluated, weights unpacked to the model's dtype"
