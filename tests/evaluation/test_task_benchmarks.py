"""lm-eval on a local task file, where it is installed; a clear word where it is not."""

import importlib.util
import json
import math

import pytest
import torch

from reapkit.checkpoint.locate import MODEL_DIRECTORY
from reapkit.core.errors import StageFailed, UnusableError
from reapkit.evaluation import task_benchmarks
from reapkit.evaluation.task_benchmarks import run_benchmarks
from reapkit.model.loading import load_model, load_tokenizer

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the extra lm-eval is not installed"
)
TASK = """\
task: which_word
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
DOCUMENTS = [
    {"question": "def add(a, b):\n    return a", "choices": [" + b", " zebra"], "answer": 0},
    {"question": "import", "choices": [" umbrella,", " json"], "answer": 1},
    {"question": "The harbor was", "choices": [" closed", "][=="], "answer": 0},
]


@needs_lm_eval
def test_a_local_task_file_gives_the_accuracy_that_a_plain_forward_gives(tmp_path):
    data, task = tmp_path / "documents.jsonl", tmp_path / "which_word.yaml"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    task.write_text(TASK.format(data=data))
    found = run_benchmarks(MODEL_DIRECTORY, [str(task)], tmp_path / "out", limit=2)
    assert found["tasks"]["which_word"]["acc"] == pytest.approx(sum(map(_chosen, DOCUMENTS[:2])) / 2)
    assert found["limit"] == 2 and (tmp_path / "out" / found["output"]).is_file()


@torch.no_grad()
def _chosen(document):
    """Whether the likeliest choice is the answer."""
    model, tokenizer = load_model(MODEL_DIRECTORY), load_tokenizer(MODEL_DIRECTORY)
    scores = []
    for choice in document["choices"]:
        prompt, whole = (tokenizer(text).input_ids for text in (document["question"], document["question"] + choice))
        log_p = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
        scores.append(sum(log_p[t - 1, whole[t]].item() for t in range(len(prompt), len(whole))))
    return math.isclose(max(scores), scores[document["answer"]])


WRITING = """\
task: goes_on
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["NEVER WRITTEN"]
  do_sample: false
metric_list:
  - metric: exact_match
"""


@needs_lm_eval
def test_generation_stops_at_the_limit_that_was_set(tmp_path):
    data, task, new_tokens = tmp_path / "documents.jsonl", tmp_path / "goes_on.yaml", 9
    data.write_text(json.dumps({"question": "def add(a, b):", "answer": _written("def add(a, b):", new_tokens)}) + "\n")
    task.write_text(WRITING.format(data=data))
    found = run_benchmarks(MODEL_DIRECTORY, [str(task)], tmp_path / "out", max_new_tokens=new_tokens)
    assert found["tasks"]["goes_on"]["exact_match"] == 1.0 and found["max_new_tokens"] == new_tokens


@torch.no_grad()
def _written(text, new_tokens):
    """What the model goes on with, token by token."""
    model, tokenizer = load_model(MODEL_DIRECTORY), load_tokenizer(MODEL_DIRECTORY)
    ids = tokenizer(text).input_ids
    start = len(ids)
    for _ in range(new_tokens):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@needs_lm_eval
def test_its_failure_is_told_with_its_last_words(tmp_path):
    with pytest.raises(StageFailed, match=r"lm-eval on .*demo_model ended with code 1: .*no_such_task"):
        run_benchmarks(MODEL_DIRECTORY, ["no_such_task"], tmp_path)


def test_without_the_package_the_user_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(task_benchmarks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnusableError, match=r"needs the package lm-eval, which is not installed\. Run: pip install"):
        run_benchmarks(MODEL_DIRECTORY, ["arc_easy"], tmp_path)
