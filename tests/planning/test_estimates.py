"""What a streamed run takes, counted by hand from a checkpoint's shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reapkit.core.errors import RecipeError
from reapkit.pipeline.planned import make_plan, plan
from reapkit.planning.estimates import Machine, estimate
from reapkit.recipe.loading import load
from tests.planning.test_quantization_memory import RECIPE
from tests.support.tiny import build, save_hub_layout


def test_an_accelerator_wants_a_second_layer_on_the_host_from_which_the_first_is_copied(tmp_path: Path) -> None:
    save_hub_layout(build("qwen3_moe", dtype=torch.bfloat16), tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(RECIPE % (tmp_path / "model", tmp_path / "store"))
    made = plan(load(tmp_path / "recipe.yaml"))
    alone, beside = (
        estimate(replace(made, machine=machine)).footprints["streaming"]
        for machine in (Machine(None, 10**12), Machine(10**10, 10**12))
    )
    attention, experts = 64 * 64 + 2 * 32 * 64 + 64 * 64, 16 * 3 * 64 * 32
    layer = 2 * (attention + experts + 16 * 64 + 2 * 64 + 2 * 16)
    assert beside.host - alone.host == layer and beside.device == alone.device


def test_limits_on_text_that_a_streamed_model_would_never_write_are_refused(tmp_path: Path) -> None:
    streaming = ("runtime.placement=streaming", f"output.directory={tmp_path}")
    for field in ("gates", "gates_quantized"):
        limit = f"evaluate.{field}={{preset: size-first, loop_share_delta: {{max: 0.1}}}}"
        with pytest.raises(RecipeError, match=f"evaluate.{field}.loop_share_delta") as refused:
            make_plan(load("demo", (*streaming, limit)))
        assert "generates none" in str(refused.value)
    make_plan(load("demo", (*streaming, "evaluate.gates=strict")))  # the preset's own limit on text is not required
