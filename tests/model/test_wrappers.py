"""Where the decoder lies in wrappers of towers is found by what it is; what their tensors are called on either side."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from reapkit.core.errors import UnusableError
from reapkit.model.causal_lm import decoder, text_model
from reapkit.model.expert_calls import intercepted
from reapkit.model.expert_pairs import observed_forward
from reapkit.model.loaded_names import LoadedNames
from reapkit.model.loading import final_hidden, head_logits, load_config, load_model, model_class
from reapkit.model.masking import masked
from reapkit.model.routed_experts import decoder_layers, find_experts
from reapkit.model.streaming.layers import LayeredModel
from tests.support import tiny

IDS = torch.randint(3, 250, (2, 18), generator=torch.Generator().manual_seed(1))
LISTS = {
    "llama4": "language_model.model.layers",
    "qwen3_5_moe": "model.language_model.layers",
    "gemma4": "model.language_model.layers",
    "mistral3": "model.language_model.layers",
    "step3p7": "model.language_model.layers",
}
"""Wrapper -> the list of its decoder layers."""


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {wrapper: tiny.build(wrapper) for wrapper in tiny.WRAPPERS}


@pytest.fixture(scope="module")
def saved(models: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {wrapper: tiny.save_hub_layout(model, tmp_path_factory.mktemp(wrapper)) for wrapper, model in models.items()}


@pytest.mark.parametrize("wrapper", tiny.WRAPPERS)
@torch.no_grad()
def test_the_decoder_and_its_layers_are_found_beside_the_towers(models: dict[str, nn.Module], wrapper: str):
    model = models[wrapper]
    expected = model(input_ids=IDS, use_cache=False).logits
    hidden = final_hidden(model, IDS)
    assert torch.equal(head_logits(model, hidden.reshape(-1, 64)), expected.reshape(-1, 256))
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected), "the decoder is back in place"
    name, layers = decoder_layers(model)
    assert (name, len(layers)) == (LISTS[wrapper], 3)
    assert text_model(model) is model.get_submodule(name.rpartition(".")[0])
    towers = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 3]
    assert len(towers) > 1, "another list is as long"


@pytest.mark.parametrize("wrapper", tiny.WRAPPERS)
@torch.no_grad()
def test_watching_a_wrapper_does_not_change_it(models: dict[str, nn.Module], wrapper: str):
    model, seen = models[wrapper], set()

    def watch(site, hidden, index, gates, inner):
        seen.add(site.layer)
        return observed_forward(site, hidden, index, gates)[0]

    before = model(input_ids=IDS, use_cache=False).logits
    sites = find_experts(model)
    with intercepted(sites, watch):
        watched = model(input_ids=IDS, use_cache=False).logits
    assert seen == {site.layer for site in sites}
    torch.testing.assert_close(watched, before, rtol=1e-4, atol=5e-5)
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, before)


@pytest.mark.parametrize("wrapper", tiny.WRAPPERS)
@torch.no_grad()
def test_a_streamed_wrapper_is_the_resident_one(saved: dict[str, Path], wrapper: str):
    whole, layered = load_model(saved[wrapper]), LayeredModel(saved[wrapper])
    layered.load_rest()
    for layer, (streamed, resident) in enumerate(zip(layered.layers, decoder_layers(whole)[1].children(), strict=True)):
        layered.load(layer)
        pairs = zip(streamed.state_dict().items(), resident.state_dict().items(), strict=True)
        assert all(one == other and torch.equal(a, b) for (one, a), (other, b) in pairs)
        layered.drop(layer)


@torch.no_grad()
def test_experts_that_transformers_does_not_dispatch_are_masked_too(models: dict[str, nn.Module]):
    """step's blocks loop over their experts themselves."""
    model = models["step3p7"]
    assert all(site.own_loop for site in find_experts(model))
    keep = {1: list(range(0, 16, 2)), 2: list(range(8))}
    gates = {layer: model.get_submodule(f"model.language_model.layers.{layer}.mlp.gate") for layer in keep}
    biases = {layer: gate.e_score_correction_bias.clone() for layer, gate in gates.items()}
    with masked(model, keep):
        got = model(input_ids=IDS, use_cache=False).logits
    for layer, gate in gates.items():  # the independent oracle: no chance for what is dropped
        gate.e_score_correction_bias[[expert for expert in range(16) if expert not in keep[layer]]] = -torch.inf
    expected = model(input_ids=IDS, use_cache=False).logits
    for layer, gate in gates.items():
        gate.e_score_correction_bias.copy_(biases[layer])
    assert (got - expected).abs().max() <= 1e-5
    assert not torch.allclose(expected, model(input_ids=IDS, use_cache=False).logits)


def test_a_model_without_a_head_is_named():
    with pytest.raises(UnusableError, match="Qwen3MoeModel: found no output head beside a decoder"):
        decoder(tiny.build("qwen3_moe").model)


@pytest.fixture
def misnamed(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A llama4 wrapper's checkpoint that holds the text model alone, under the text model's names."""
    tensors = load_file(saved["llama4"] / "model.safetensors")
    text = {name.removeprefix("language_model."): t for name, t in tensors.items() if "vision" not in name}
    save_file({n: t for n, t in text.items() if "projector" not in n}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((saved["llama4"] / "config.json").read_text())
    return tmp_path


@pytest.mark.parametrize("load", [load_model, lambda path: LayeredModel(path).load_rest()], ids=["whole", "streamed"])
def test_a_wrapper_whose_names_do_not_match_says_which_class_they_fit(misnamed: Path, load):
    with pytest.raises(UnusableError) as caught:
        load(misnamed)
    text = str(caught.value)
    assert re.search(r"\d+ tensors that Llama4ForConditionalGeneration needs are missing, such as ", text)
    assert 'Set "architectures": ["Llama4ForCausalLM"] and text_config in the place of the whole config' in text
    assert "Download" not in text
    config = json.loads((misnamed / "config.json").read_text())
    repaired = config["text_config"] | {"architectures": ["Llama4ForCausalLM"]}
    (misnamed / "config.json").write_text(json.dumps(repaired))
    assert type(load_model(misnamed)).__name__ == "Llama4ForCausalLM"


def test_what_no_class_finds_is_missing(saved: dict[str, Path], tmp_path: Path):
    tensors = load_file(saved["llama4"] / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("down_proj"))
    save_file({n: t for n, t in tensors.items() if n != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((saved["llama4"] / "config.json").read_text())
    with pytest.raises(UnusableError, match=f"such as {re.escape(lost)}; .* Download the checkpoint again"):
        load_model(tmp_path)


@pytest.mark.parametrize("wrapper", tiny.WRAPPERS)
def test_every_parameter_is_filled_by_the_names_on_disk(saved: dict[str, Path], wrapper: str):
    config = load_config(saved[wrapper])
    names = LoadedNames.of_class(model_class(config), config)
    on_disk = load_file(saved[wrapper] / "model.safetensors")
    assert not names.unfilled(on_disk)
    assert names.unfilled(list(on_disk)[1:]), "each of them counts"


def test_a_fused_matrix_becomes_several(saved: dict[str, Path]):
    config = load_config(saved["step3p7"])
    names = LoadedNames.of_class(model_class(config), config)
    layer = "vision_model.transformer.resblocks.0.attn"
    assert names.targets(f"{layer}.in_proj_weight") == {
        f"model.vision_model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"
    }
