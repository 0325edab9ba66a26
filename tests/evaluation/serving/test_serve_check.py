"""What a serving check says, and what each outcome ends with; vLLM's part is answered by a stand-in process here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from reapkit.cli.main import main
from reapkit.core.errors import UnusableError
from reapkit.evaluation.serving.reference import Greedy, greedy, prompts_for
from reapkit.evaluation.serving.serve_check import ServeCheck, compare, serve_check, vllm_python
from tests.support.tiny import build, save_hub_layout

STAND_IN = """#!{python}
import json, sys
if sys.argv[1] == "-c":
    sys.exit(0)
question, answer = sys.argv[-2:]
request = json.load(open(question))
replies = json.load(open({replies!r}))
results = [replies[request["task"]]] * len(request["directories"])
json.dump({{"version": "9.9", "platform": "cpu", "plugin": "from file", "results": results}}, open(answer, "w"))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_hub_layout(build("qwen3_moe"), tmp_path_factory.mktemp("serving") / "model")


@pytest.fixture
def engine(tmp_path):
    """`engine(generate=..., formats=...)`: a Python whose vLLM gives these answers."""

    def answering(**replies: object) -> Path:
        (tmp_path / "replies.json").write_text(json.dumps(replies))
        script = tmp_path / "python"
        script.write_text(STAND_IN.format(python=sys.executable, replies=str(tmp_path / "replies.json")))
        script.chmod(0o755)
        return script

    return answering


def ended(*arguments: str) -> int:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as end:
        main(["serve-check", *arguments])
    return end.value.code


def check(model: Path, engine: Path, **options: object) -> ServeCheck:
    return serve_check(model, prompts=2, new_tokens=4, vllm=engine, **options)


def quantized(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that says it is quantized; its weights are plain, so that transformers still runs it."""
    import shutil

    import reapkit.evaluation.serving.serve_check as serving

    directory = Path(shutil.copytree(model, tmp_path / "quantized"))
    monkeypatch.setattr(serving, "_is_quantized", lambda path: path == directory)
    return directory


def test_equal_tokens(model, engine):
    own = greedy(model, prompts_for(model, 2), 4)
    found = check(model, engine(generate={"tokens": own.tokens}))
    assert [one.outcome for one in found.comparisons] == ["equal"] and found.exit_code == 0
    assert found.comparisons[0].detail == "all 8 greedy tokens are equal" and found.engines["vllm"] == "9.9 (cpu)"


def test_greedy_tokens_are_those_of_the_logits(model):
    own = greedy(model, [[5, 6, 7], [9, 8, 7, 6, 5]], 3)
    assert all(logits.argmax(-1).tolist() == tokens for logits, tokens in zip(own.logits, own.tokens, strict=True))
    assert [len(tokens) for tokens in own.tokens] == [3, 3]


def test_the_first_difference_is_named_and_judged(model, engine, capsys):
    own = greedy(model, prompts_for(model, 2), 4)
    other = [list(tokens) for tokens in own.tokens]
    other[1][2] = (other[1][2] + 1) % 256
    script = engine(generate={"tokens": other})
    assert ended(str(model), "--prompts", "2", "--new-tokens", "4", "--vllm-python", str(script)) == 4
    text = capsys.readouterr().out
    assert (
        f"prompt 1, token 2: transformers says {own.tokens[1][2]}, vLLM {other[1][2]}" in text and "not a tie" in text
    )
    assert ended(str(model), "--prompts", "2", "--new-tokens", "4", "--vllm-python", str(script), "--json") == 4
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 4 and found["comparisons"][0]["near_tie"] is False


def test_near_ties_are_told_from_errors():
    scores = torch.zeros(1, 10)
    scores[0, 3], scores[0, 4], scores[0, 5] = 1, 1 - 1e-6, 0.5
    mine = Greedy([[3]], [scores], torch.float32)
    tie, error = (compare(Path("d"), mine, [[token]]) for token in (4, 5))
    assert tie.near_tie and "a near-tie, within rounding" in tie.detail and not error.near_tie
    assert compare(Path("d"), mine, [[99]]).gap == float("inf")
    assert "0 tokens where transformers made 1" in compare(Path("d"), mine, [[]]).detail


def test_without_vllm_nothing_is_generated_and_nothing_passes(model, monkeypatch):
    monkeypatch.delenv("REAPKIT_VLLM_PYTHON", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    monkeypatch.setattr(f"{serve_check.__module__}.greedy", lambda *_, **__: pytest.fail("it generated"))
    with pytest.raises(UnusableError, match=r"nothing to compare with: this environment has no vLLM\. Name a Python"):
        serve_check(model, model, prompts=1, new_tokens=2)
    assert ended(str(model)) == 3


def test_formats_are_checked_where_no_kernel_runs_them(model, engine, tmp_path, monkeypatch):
    directory, refusal = quantized(model, tmp_path, monkeypatch), {"error": "NotImplementedError: no backend"}
    fits = check(directory, engine(generate=refusal, formats={"parameters": 5, "tensors": 7, "problems": []}))
    assert fits.exit_code == 0 and fits.comparisons[0].outcome == "format fits"
    assert "generation not measured" in fits.comparisons[0].detail and "all 7 tensors" in fits.comparisons[0].detail
    gap = check(
        directory, engine(generate=refusal, formats={"parameters": 5, "tensors": 7, "problems": ["w (3,): nothing"]})
    )
    assert gap.exit_code == 4 and gap.comparisons[0].problems == ("w (3,): nothing",)
    died = check(directory, engine(generate=refusal, formats={"error": "KeyError: 'w'"}))
    assert died.exit_code == 4 and "its loaders refuse the tensors: KeyError: 'w'" in died.comparisons[0].detail


def test_a_plain_directory_that_vllm_refuses(model, engine):
    found = check(model, engine(generate={"error": "ValueError: head_dim"}))
    assert (
        found.exit_code == 3 and found.comparisons[0].detail == "vLLM 9.9 (cpu) does not serve it: ValueError: head_dim"
    )


def test_pythons_without_vllm_are_refused(tmp_path, model, capsys):
    with pytest.raises(UnusableError, match="cannot be run"):
        vllm_python(tmp_path / "nothing")
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    os.chmod(tmp_path / "python", 0o755)
    with pytest.raises(UnusableError, match=r"has no vLLM\. Install it there"):
        vllm_python(tmp_path / "python")
    (tmp_path / "python").write_text('#!/bin/sh\nif [ "$1" = -c ]; then exit 0; fi\necho broken libc >&2; exit 7\n')
    assert ended(str(model), "--prompts", "1", "--new-tokens", "1", "--vllm-python", str(tmp_path / "python")) == 3
    assert "vLLM's process ended with code 7: broken libc" in capsys.readouterr().err


def test_directories_that_transformers_cannot_run_are_unusable(tmp_path, model):
    import shutil

    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"broken")
    assert ended(str(tmp_path / "model")) == 3
    assert ended(str(model), "--dtype", "int3") == 2
