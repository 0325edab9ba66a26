"""What a streamed run takes, counted by hand from a checkpoint's shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from reapkit.pipeline.planned import plan
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
