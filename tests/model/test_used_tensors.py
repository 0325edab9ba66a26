"""A tensor that the model's class would leave out in silence refuses the model before a token runs, in both
placements."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import UnusableError
from reapkit.model.loading import load_model, skeleton
from reapkit.model.streaming.layers import LayeredModel
from tests.support import quantized_sources, tiny

LOADERS: list[Callable] = [load_model, LayeredModel, lambda path: skeleton(Checkpoint.open(path))]
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with tiny.quiet():
        return tiny.save_hub_layout(tiny.build("qwen3_moe", num_hidden_layers=2), tmp_path_factory.mktemp("plain"))


def with_tensors(source: Path, path: Path, **more: torch.Tensor) -> Path:
    path.mkdir()
    (path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / FILE) | {name.replace("__", "."): tensor for name, tensor in more.items()}
    save_file(tensors, path / FILE, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.3.up_proj.weight_global_scale",
        "model.layers.0.self_attn.sinks",
        "model.layers.1.mlp.experts.2.down_proj.weight_g_idx",
        "lm_head.weight_scale",
    ],
)
def test_a_tensor_without_a_place_refuses_the_model(plain: Path, tmp_path: Path, load: Callable, name: str) -> None:
    path = with_tensors(plain, tmp_path / "model", **{name: torch.ones(4)})
    with pytest.raises(
        UnusableError,
        match=rf"Qwen3MoeForCausalLM of transformers \S+ has no place for 1 tensors: {name}\. The weights",
    ):
        load(path)


@pytest.mark.parametrize("load", LOADERS)
def test_tables_that_every_class_computes_and_strangers_outside_the_decoder_are_left_aside(
    plain: Path, tmp_path: Path, load: Callable
) -> None:
    harmless = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "speech_tower.proj.weight": torch.ones(4),
    }
    load(with_tensors(plain, tmp_path / "model", **harmless))


def test_blocks_of_multi_token_prediction_are_left_aside(tmp_path: Path) -> None:
    with tiny.quiet():
        path = tiny.save_hub_layout(tiny.build("glm4_moe", num_hidden_layers=2), tmp_path, mtp=1)
        LayeredModel(path)
        load_model(path)


@pytest.mark.parametrize("load", LOADERS)
def test_a_tensor_of_another_shape_is_refused(plain: Path, tmp_path: Path, load: Callable) -> None:
    path = with_tensors(plain, tmp_path / "model", **{"model.layers.0.input_layernorm.weight": torch.ones(32)})
    with pytest.raises(
        UnusableError, match=r"input_layernorm\.weight has shape \[32\], but Qwen3MoeForCausalLM .* wants \[64\]"
    ):
        load(path)


@pytest.mark.parametrize("load", LOADERS)
def test_the_format_of_what_is_left_out_is_named(tmp_path: Path, load: Callable) -> None:
    with tiny.quiet():
        path = quantized_sources.write("compressed-tensors W4A16", tmp_path / "source")
    name = "model.layers.1.mlp.experts.3.up_proj.weight_rotation"
    path = with_tensors(path, tmp_path / "model", **{name: torch.ones(4)})
    with pytest.raises(UnusableError, match=rf"{name}\. The weights are quantized \(compressed-tensors\); .* release"):
        load(path)


@pytest.mark.parametrize("where", ["", "text_config"])
def test_quantized_weights_are_read_wherever_the_config_says_how(tmp_path: Path, where: str) -> None:
    """The wrappers of multimodal models say it in the language model's section."""
    with tiny.quiet():
        path = quantized_sources.write("fp8 by block", tmp_path / "m", "qwen3_vl_moe")
    config = json.loads((path / "config.json").read_text())
    if where:
        config[where]["quantization_config"] = config.pop("quantization_config")
        (path / "config.json").write_text(json.dumps(config))
    stored = load_file(path / FILE)
    name = "language_model.layers.1.self_attn.q_proj.weight"
    key = next(key for key in stored if key.endswith(name))
    plain = stored[key].float() * stored[f"{key}_scale_inv"].repeat_interleave(32, 0).repeat_interleave(32, 1)
    with tiny.quiet():
        resident, layered = load_model(path), LayeredModel(path)
    layered.load(1)
    for model in (resident, layered.model):
        found = next(parameter for own, parameter in model.named_parameters() if own.endswith(name))
        assert torch.equal(found, plain.to(found.dtype))
