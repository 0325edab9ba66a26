"""The example that turns on every kind of evidence plans, and leaves nothing out."""

import json

import yaml

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.evaluation.equal_bytes import equal_bytes
from reapkit.pipeline.planned import make_plan
from reapkit.recipe.loading import load
from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples" / "evaluation"


def test_it_plans_with_everything_on():
    plan = make_plan(load(EXAMPLE / "recipe.yaml"))
    spec = plan.recipe.evaluate
    assert len(plan.candidates) == 3 and len(spec.packs.lengths) == 2 and 0 < spec.packs.confirm < 1
    assert all(
        (
            spec.extra_packs,
            spec.controls,
            spec.generation,
            spec.throughput,
            spec.lm_eval,
            spec.equal_bytes,
            spec.gates_quantized,
        )
    )
    assert plan.stage("verify").spec["task_files"].keys() == {"next_word.yaml"}
    for candidate in plan.candidates[1:]:  # those that may win have the control at the same bytes
        assert (
            equal_bytes(
                Checkpoint.open(plan.checkpoint.path), plan.recipe.quantize, plan.quantized_nbytes(candidate)
            ).spec
            is not None
        )


def test_its_task_has_documents_with_an_answer_among_the_choices():
    task = yaml.safe_load((EXAMPLE / "next_word.yaml").read_text())
    documents = [json.loads(line) for line in (ROOT / task["dataset_kwargs"]["data_files"]).read_text().splitlines()]
    assert documents and all(0 <= document["answer"] < len(document["choices"]) for document in documents)
