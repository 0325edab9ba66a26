"""Layers that keep different numbers of experts: written, declared, loaded by plain transformers, equal to the masked
original."""

from __future__ import annotations

import json
import random
import types

import pytest
import torch
import transformers

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.parameter_counts import pruned_sizes
from reapkit.core.errors import UnusableError
from reapkit.model.masking import masked
from reapkit.model.ragged_modeling import expert_counts, ragged
from reapkit.model.ragged_vllm import _load_model, _make_layers
from reapkit.pruning.checkpoint import prune_checkpoint
from reapkit.selection.selection import LayerSelection, Selection
from tests.support.tiny import MULTIMODAL, build, quiet, save_hub_layout

torch.set_num_threads(1)
IDS = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(1))


def uneven(source: Checkpoint, *, mtp: bool = False) -> Selection:
    """Every layer keeps another number of experts, as many in every group."""
    draw, architecture, layout = random.Random(0), source.architecture, source.layout
    layers = {}
    for number, (index, layer) in enumerate({**layout.layers, **(layout.mtp if mtp else {})}.items()):
        group = layer.num_experts // architecture.n_group
        least = -(-architecture.least_experts // architecture.n_group)
        keep = sorted(
            first + e
            for first in range(0, layer.num_experts, group)
            for e in draw.sample(range(group), max(group - 1 - number, least))
        )
        layers[index] = LayerSelection(tuple(keep), (), ())
    assert len({len(layer.keep) for layer in layers.values()}) > 1
    return Selection("random", layers)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "model_type",
    [
        "qwen3_moe",
        "glm4_moe",
        "mixtral",
        "gpt_oss",
        "olmoe",
        "deepseek_v3",
        "qwen3_next",
        "qwen3_vl_moe",
        "llama4",
        "mistral3",
    ],
)
def test_ragged_checkpoints_load_in_transformers_and_equal_the_masked_original(tmp_path, model_type, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = Checkpoint.open(save_hub_layout(build(model_type), tmp_path / "source"))
    selection = uneven(source)
    written = prune_checkpoint(source, selection, tmp_path / "out", layout="ragged")
    pruned = Checkpoint.open(tmp_path / "out")
    assert {index: layer.num_experts for index, layer in pruned.layout.layers.items()} == written.kept
    assert pruned.numel == pruned_sizes(source, written.kept)[0] and pruned.architecture.num_experts == max(
        written.kept.values()
    )
    auto = transformers.AutoModelForImageTextToText if model_type in MULTIMODAL else transformers.AutoModelForCausalLM
    plain = MULTIMODAL.get(model_type, transformers.AutoModelForCausalLM)
    with quiet():
        original = plain.from_pretrained(source.path, dtype=torch.float32)
        model, info = auto.from_pretrained(
            tmp_path / "out", trust_remote_code=True, dtype=torch.float32, output_loading_info=True
        )
        own = ragged(type(original)).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == type(original).__name__
    with masked(original, selection.keep):
        expected = logits(original)
    assert (logits(model) - expected).abs().max() < 1.2e-5 and (logits(own) - expected).abs().max() < 1.2e-5


def test_what_is_declared(tmp_path):
    source = Checkpoint.open(save_hub_layout(build("glm4_moe"), tmp_path / "source", mtp=True))
    selection = uneven(source, mtp=True)
    prune_checkpoint(source, selection, tmp_path / "out", layout="ragged")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    counts = [len(selection.layers[index].keep) if index in selection.layers else 0 for index in range(4)]
    assert config["num_routed_experts_per_layer"] == counts and config["n_routed_experts"] == max(counts)
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_ragged.Glm4MoeForCausalLM"}
    assert config["architectures"] == ["Glm4MoeForCausalLM"] and (tmp_path / "out" / "modeling_ragged.py").is_file()


def test_a_ragged_checkpoint_can_be_pruned_again(tmp_path):
    source = Checkpoint.open(save_hub_layout(build("qwen3_moe"), tmp_path / "source"))
    prune_checkpoint(source, uneven(source), tmp_path / "once", layout="ragged")
    once = Checkpoint.open(tmp_path / "once")
    prune_checkpoint(once, uneven(once), tmp_path / "twice", layout="ragged")
    numbers = Checkpoint.open(tmp_path / "twice").config["num_routed_experts_per_layer"]
    assert numbers == [14, 12, 10]
    even = Selection("x", dict.fromkeys(range(3), LayerSelection((0, 1, 5, 7), (), ())))
    prune_checkpoint(once, even, tmp_path / "even")
    assert Checkpoint.open(tmp_path / "even").config["num_routed_experts_per_layer"] == [4, 4, 4]
    assert (tmp_path / "even" / "modeling_ragged.py").read_bytes() == (
        tmp_path / "once" / "modeling_ragged.py"
    ).read_bytes()


def test_equal_numbers_stay_an_ordinary_checkpoint(tmp_path):
    source = Checkpoint.open(save_hub_layout(build("mixtral"), tmp_path / "source"))
    selection = Selection("x", dict.fromkeys(range(3), LayerSelection((0, 1, 5), (), ())))
    prune_checkpoint(source, selection, tmp_path / "out", layout="ragged")
    assert not (tmp_path / "out" / "modeling_ragged.py").exists()
    assert "auto_map" not in Checkpoint.open(tmp_path / "out").config


def test_models_with_code_of_their_own_are_refused(tmp_path):
    path = save_hub_layout(build("mixtral"), tmp_path / "source")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}})
    )
    source = Checkpoint.open(path)
    with pytest.raises(UnusableError, match="modelling code of its own"):
        prune_checkpoint(source, uneven(source), tmp_path / "out", layout="ragged")


def test_transformers_own_list_is_understood():
    spec = types.SimpleNamespace(per_layer_overrides={1: {"num_experts": 3}, 2: {"sliding_window": 4}})
    assert expert_counts(types.SimpleNamespace(_heterogeneity_spec=spec)) == {1: 3, 2: None}


# ------------------------------------------------------------------------------- vLLM, as far as it can be without vLLM


def vllm_config(counts: list[int] | None, **parallel: bool) -> types.SimpleNamespace:
    text = types.SimpleNamespace(num_experts=9, num_hidden_layers=2, num_routed_experts_per_layer=counts)
    return types.SimpleNamespace(
        model_config=types.SimpleNamespace(hf_text_config=text, quantization=None),
        parallel_config=types.SimpleNamespace(**parallel),
        speculative_config=None,
    )


def built(config: types.SimpleNamespace) -> list[int]:
    def make_layers(number: int, layer_fn, prefix: str) -> list[int]:
        return [layer_fn(prefix=f"{prefix}.{index}") for index in range(number)]

    text = config.model_config.hf_text_config
    found = _make_layers(make_layers, lambda: config)(2, lambda prefix: text.num_experts, "model.layers")
    assert text.num_experts == 9
    return found


def test_vllm_builds_each_layer_with_its_own_number():
    assert built(vllm_config([5, 7])) == [5, 7]
    assert built(vllm_config([0, 7])) == [9, 7]
    assert built(vllm_config(None)) == [9, 9]


@pytest.mark.parametrize("field", ["enable_eplb", "enable_ep_weight_filter"])
def test_vllm_features_that_assume_one_number_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} needs the same number of experts"):
        built(vllm_config([5, 7], **{field: True}))
    assert built(vllm_config(None, **{field: True})) == [9, 9]


def test_vllm_builds_a_draft_with_the_number_of_its_block():
    config, draft = vllm_config([5, 7, 3]), object()
    config.speculative_config = types.SimpleNamespace(draft_model_config=draft)
    load = _load_model(lambda self, vllm_config, model_config: vllm_config.model_config.hf_text_config.num_experts)
    assert (load(None, config, draft), load(None, config, config.model_config)) == (3, 9)
