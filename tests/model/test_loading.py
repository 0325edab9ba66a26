"""Checkpoints in the hub's layout load to the model they were saved from; the two halves make the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reapkit.core.errors import UnusableError
from reapkit.model.loading import final_hidden, head_logits, load_model
from tests.support import tiny

IDS = torch.randint(3, 250, (2, 18), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", list(tiny.ARCHITECTURES))
def test_hub_layout_loads_to_the_same_logits(model_type: str, tmp_path: Path):
    model = tiny.build(model_type)
    with tiny.quiet(), torch.no_grad():
        loaded = load_model(tiny.save_hub_layout(model, tmp_path))
        if model_type != "llama4_text":
            model.set_experts_implementation("eager")
        gap = (loaded(IDS, use_cache=False).logits - model(IDS, use_cache=False).logits).abs().max()
    assert gap == 0 or (model_type == "qwen3_vl_moe" and gap < 1e-5), "the latter's weights come transposed from disk"
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("model_type", list(tiny.ARCHITECTURES))
def test_head_of_final_hidden_states_is_the_models_logits(model_type: str):
    model = tiny.build(model_type)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        hidden = final_hidden(model, IDS)
        got = head_logits(model, hidden.reshape(-1, hidden.shape[-1]))
        assert torch.equal(got, expected.reshape(got.shape))
        assert torch.equal(model(IDS, use_cache=False).logits, expected), "the decoder is back in place"


def test_missing_tensors_are_refused(tmp_path: Path):
    tiny.save_hub_layout(tiny.build("qwen3_moe"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.gate.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UnusableError,
        match=r"1 tensors that Qwen3MoeForCausalLM needs are missing, such as model\.layers\.1\.mlp\.gate\.weight",
    ):
        load_model(tmp_path)


def test_mtp_block_is_on_disk_and_left_alone(tmp_path: Path):
    model = tiny.build("glm4_moe")
    loaded = load_model(tiny.save_hub_layout(model, tmp_path, mtp=True))
    assert any(name.startswith("model.layers.3.mlp.experts.") for name in load_file(tmp_path / "model-mtp.safetensors"))
    assert loaded.config.num_nextn_predict_layers == 1
    model.set_experts_implementation("eager")
    with torch.no_grad():
        assert torch.equal(loaded(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


@torch.no_grad()
def test_norms_that_are_kept_in_float32_feed_layers_in_the_models_dtype(tmp_path: Path):
    """deepseek_v4 in bfloat16, as its dequantized weights are: transformers' own forward stops at the first layer."""
    path = tiny.save_hub_layout(tiny.build("deepseek_v4", dtype=torch.bfloat16), tmp_path)
    with tiny.quiet():
        loaded, plain = load_model(path), load_model(path, dtype="float32")
    assert loaded.model.layers[0].input_layernorm.weight.dtype == torch.float32
    assert final_hidden(loaded, IDS).dtype == torch.bfloat16
    exact, rounded = (model(IDS, use_cache=False).logits.float() for model in (plain, loaded))
    assert (exact - rounded).norm() <= 0.1 * exact.norm()
