"""The whole chain on other architectures and layouts, from tokens alone: no tokenizer, no chat template, no code per
model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from reapkit.pipeline.run import apply
from reapkit.recipe.loading import load
from tests.support import tiny

RECIPE = """version: 1
name: {name}
model: {{source: model}}
calibration: {{samples: 60, max_length: 64, packing: none, mix: [{{name: ids, source: ids.jsonl, format: tokens}}]}}
prune: {{ratio: 0.25}}
evaluate: {{packs: {{samples: 12, lengths: [64]}}, gates: {{kl_mean: {{max: 9}}}}, generation: null, throughput: null}}
quantize: {{scheme: W4A16, method: rtn, group_size: 16}}
output: {{directory: {root}/run}}
runtime: {{store: {root}/store}}
"""
SHORT = ("gpt_oss",)  # glm4_moe: test_run_mtp
LONG = ("glm4_moe", "mixtral", "deepseek_v3", "qwen3_next", "granitemoe", "minimax_m2", "ernie4_5_moe", "nemotron_h")


@pytest.mark.parametrize("model_type", [*SHORT, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_from_tokens_to_a_proven_quantized_model(model_type: str, tmp_path: Path) -> None:
    tiny.save_hub_layout(tiny.build(model_type), tmp_path / "model")
    draw = random.Random(0)
    rows = [[draw.randrange(5, 200) for _ in range(draw.randrange(20, 60))] for _ in range(120)]
    (tmp_path / "ids.jsonl").write_text(
        "".join(
            json.dumps({"input_ids": row, "assistant_mask": [i > 9 for i in range(len(row))]}) + "\n" for row in rows
        )
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(name=model_type, root=tmp_path))
    run = apply(load(tmp_path / "recipe.yaml"))
    proofs = json.loads((tmp_path / "run" / "verify.json").read_text())["proofs"]
    assert {proof["directory"] for proof in proofs} == {"pruned", "quantized"} and all(
        proof["passed"] for proof in proofs
    )
    base, pruned, quantized = run.summary("verify")["rows"]
    assert quantized["bytes"] < pruned["bytes"] < base["bytes"]
    assert 0 <= pruned["kl_mean"] < quantized["kl_mean"] < 1  # 0 where every expert that went had never been routed to
    assert (tmp_path / "run" / "report.html").is_file()
