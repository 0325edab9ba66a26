"""Layers go through two blocks of memory, whatever their number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reapkit.model.loading import load_model
from reapkit.model.streaming.layers import LayeredModel
from tests.support import tiny


def test_a_layer_that_is_in_memory_is_not_read_again(tmp_path: Path):
    with tiny.quiet():
        layered = LayeredModel(tiny.save_hub_layout(tiny.build("qwen3_moe"), tmp_path / "model"))
    layered.load(0)
    with pytest.raises(ValueError, match="layer 0 is in memory: drop it before it is read again"):
        layered.load(0)
    layered.drop(0)
    layered.load(0)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_vl_moe", "glm4_moe"])
def test_all_layers_pass_through_two_blocks_unconverted_by_transformers(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with tiny.quiet():
        path = tiny.save_hub_layout(tiny.build(model_type), tmp_path / "model")
        expected = load_model(path).state_dict()
    layered = LayeredModel(path)
    monkeypatch.setattr(
        layered, "_convert", lambda tensors: pytest.fail(f"left to transformers: {sorted(tensors)[:3]}")
    )
    layered.load_rest()
    layered.load(0)
    for layer in range(len(layered.layers)):
        if layer + 1 < len(layered.layers):
            layered.load(layer + 1)
        for name, tensor in layered.layers[layer].state_dict().items():
            assert torch.equal(tensor, expected[f"{layered.prefix}.{layer}.{name}"]), name
        del tensor
        layered.drop(layer)
    assert layered._arenas.blocks == 2


@pytest.mark.parametrize("scheme", ["fp8", "mxfp4"])
def test_experts_are_dequantized_in_their_place(scheme: str, tmp_path: Path):
    with tiny.quiet():
        if scheme == "fp8":
            path = tiny.as_block_fp8(
                tiny.save_hub_layout(
                    tiny.build("deepseek_v3", hidden_size=256, moe_intermediate_size=128), tmp_path / "m"
                )
            )
        else:
            path = tiny.as_mxfp4(tiny.save_hub_layout(tiny.build("gpt_oss", intermediate_size=64), tmp_path / "m"))
    layered = LayeredModel(path)
    placed = {filling.target for layer in range(len(layered.layers)) for filling in layered._fillings(layer)}
    experts = {
        name
        for name, _ in layered.model.named_parameters()
        if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    }
    assert experts and experts <= placed


def test_weights_of_another_dtype_are_cast_as_transformers_casts_them(tmp_path: Path):
    with tiny.quiet():
        path = tiny.save_hub_layout(tiny.build("qwen3_moe", dtype=torch.bfloat16), tmp_path / "model")
        expected = load_model(path, dtype="float32").state_dict()
    layered = LayeredModel(path, dtype="float32")
    layered.load(1)
    for name, tensor in layered.layers[1].state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[f"{layered.prefix}.1.{name}"])
