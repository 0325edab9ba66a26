"""Throughput is measured in a process of its own and fails loudly."""

import subprocess

import pytest

import tiny
from reapkit.errors import StageFailed
from reapkit.evaluate.throughput import NEW_TOKENS, PROMPT_TOKENS, measure, throughput_of


@pytest.mark.long
def test_a_directory_is_measured_in_a_fresh_process(tmp_path):
    tiny.save_hub_layout(tiny.build("qwen3_moe"), tmp_path / "model")
    found = throughput_of(tmp_path / "model")
    assert found["engine"] == "transformers" and found["device"] == "cpu"
    assert found["prompt_tokens"] == PROMPT_TOKENS and found["new_tokens"] == NEW_TOKENS
    assert found["prefill_tokens_per_s"] > found["decode_tokens_per_s"] > 0
    assert 10**7 < found["peak_bytes"] < 10**10


def test_decoding_reads_its_cache(monkeypatch):
    model, widths = tiny.build("qwen3_moe", num_hidden_layers=1), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: widths.append(inputs["input_ids"].shape[1]) or forward(**inputs))
    measure(model)
    assert set(widths) == {PROMPT_TOKENS, 1} and widths[1:1 + NEW_TOKENS] == [1] * NEW_TOKENS


def test_a_failing_process_is_reported_with_its_last_words(tmp_path, monkeypatch):
    ended = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nMemoryError: no more")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: ended)
    with pytest.raises(StageFailed, match="throughput of .* ended with 1: MemoryError: no more"):
        throughput_of(tmp_path)
