"""The repair stage in a run: candidates are judged with the weights that are then written, and the result is proven."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from reapkit.core.errors import RecipeError
from reapkit.pipeline.planned import plan
from reapkit.pipeline.run import apply
from reapkit.recipe.loading import load
from tests.support import tiny

RECIPE = """version: 1
name: repaired
model: {{source: model}}
calibration:
  {{samples: 60, max_length: 64, packing: none, score: all, mix: [{{name: ids, source: ids.jsonl, format: tokens}}]}}
prune: {{candidates: {{ratio: [0.5, 0.25]}}, repair: ridge}}
evaluate:
  packs: {{samples: 16, lengths: [64]}}
  gates: {{kl_mean: {{max: 9}}}}
  generation: null
  throughput: null
  controls: [random]
quantize: {{scheme: null}}
output: {{directory: {root}/run, keep: [pruned]}}
runtime: {{store: {root}/store{placement}}}
"""


@pytest.fixture
def recipe(tmp_path: Path):
    draw = random.Random(0)
    (tmp_path / "ids.jsonl").write_text(
        "".join(json.dumps({"input_ids": [draw.randrange(5, 200) for _ in range(48)]}) + "\n" for _ in range(120))
    )

    def written(model_type: str, placement: str = "") -> Path:
        tiny.save_hub_layout(tiny.build(model_type), tmp_path / "model")
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=tmp_path, placement=placement))
        return tmp_path / "recipe.yaml"

    return written


@pytest.mark.parametrize(
    ("model_type", "placement"),
    [
        ("qwen3_moe", ""),
        pytest.param("gpt_oss", "", marks=pytest.mark.long),
        pytest.param("qwen3_moe", ", placement: streaming", marks=pytest.mark.long),
    ],
)
def test_what_was_judged_is_what_was_written(recipe, tmp_path: Path, model_type: str, placement: str) -> None:
    run = apply(load(recipe(model_type, placement)))
    evaluation = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    verified = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert all(proof["passed"] for proof in verified["proofs"])
    assert next(proof for proof in verified["proofs"] if proof["name"] == "logits")["detail"].count("re-fitted") == 1
    judged, measured = evaluation["confirm"]["metrics"]["64"]["all"], verified["metrics"]["pruned"]["64"]["all"]
    assert measured["kl_mean"]["value"] == pytest.approx(judged["kl_mean"]["value"], rel=1e-3)
    left = run.summary("repair")["error_left"]
    assert set(left) == {"reap-r0.5", "reap-r0.25", "random-beside-reap-r0.5", "random-beside-reap-r0.25"}
    assert all(part["fitted"] < 1 and part["held_out"] <= 1 for part in left.values())
    assert not apply(load(recipe(model_type, placement))).executed


def test_quantized_checkpoints_are_refused_in_the_plan(recipe, tmp_path: Path) -> None:
    path = recipe("qwen3_moe")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(
        RecipeError, match=r"prune\.repair: ridge re-fits plain weights, but this checkpoint is quantized"
    ):
        plan(load(path))
