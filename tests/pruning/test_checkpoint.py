"""The proof of a pruned checkpoint: what it computes, what it holds, what it says."""

from __future__ import annotations

import contextlib
import filecmp
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.parameter_counts import pruned_sizes
from reapkit.core.errors import StageFailed, UnusableError
from reapkit.model.masking import masked
from reapkit.pruning import checkpoint as module
from reapkit.pruning.checkpoint import MANIFEST, prune_checkpoint
from reapkit.pruning.layout_check import confirm_layout
from reapkit.selection.selection import LayerSelection, Selection
from tests.support.damage import delete, flip_unseen, truncate
from tests.support.tiny import ARCHITECTURES, MULTIMODAL, build, quiet, save_hub_layout

torch.set_num_threads(1)
IDS = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(1))
EXPERT = re.compile(r"^(.*\.(\d+)\..*experts\.)(\d+)(\..*)$")


def select(
    source: Checkpoint, ratio: float = 0.5, experts_per_token: int | None = None, seed: int = 0, mtp: bool = False
) -> Selection:
    """Random experts kept, as many in every group of a grouped router."""
    draw, architecture, layout = random.Random(seed), source.architecture, source.layout
    layers = {}
    for index, layer in {**layout.layers, **(layout.mtp if mtp else {})}.items():
        group = layer.num_experts // architecture.n_group
        kept = group - int(group * ratio)
        keep = sorted(
            first + e for first in range(0, layer.num_experts, group) for e in draw.sample(range(group), kept)
        )
        drop = tuple(e for e in range(layer.num_experts) if e not in keep)
        layers[index] = LayerSelection(tuple(keep), drop, (0.0,) * layer.num_experts)
    return Selection("random", layers, experts_per_token)


def load(path: Path, model_type: str) -> torch.nn.Module:
    """The model, with proof that the loader missed nothing and met nothing unknown."""
    loader = MULTIMODAL.get(model_type, transformers.AutoModelForCausalLM)
    with quiet():
        model, info = loader.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_bit_equal(source: Checkpoint, out: Path, selection: Selection) -> None:
    """Every tensor of the result equals its slice of the source, and nothing else is there."""
    before, after, axes = tensors(source.path), tensors(out), {}
    for layer in source.layout.layers.values():
        axes |= {name: (axis, selection.layers[layer.index].keep) for name, axis in layer.stacked.items()}
    expected = {}
    for name, tensor in before.items():
        match = EXPERT.match(name)
        if match:
            keep = selection.layers[int(match[2])].keep
            if int(match[3]) in keep:
                expected[f"{match[1]}{keep.index(int(match[3]))}{match[4]}"] = tensor
        elif name in axes:
            axis, keep = axes[name]
            expected[name] = tensor.index_select(axis, torch.tensor(keep))
        else:
            expected[name] = tensor
    assert set(after) == set(expected)
    for name, tensor in expected.items():
        assert after[name].dtype == tensor.dtype and torch.equal(bits(after[name]), bits(tensor)), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor


@contextlib.contextmanager
def masked_softmax(model: torch.nn.Module, keep: Mapping[int, tuple[int, ...]]) -> Iterator[None]:
    """qwen3_moe whose routers score dropped experts minus infinity: an oracle that shares no code with surgery."""
    routers = {
        int(name.split(".")[2]): module
        for name, module in model.named_modules()
        if isinstance(module, Qwen3MoeTopKRouter)
    }
    weights = {layer: router.weight.data for layer, router in routers.items()}
    linear = torch.nn.functional.linear

    def scored(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = linear(x, weight, bias)
        for layer, mine in weights.items():
            if mine.data_ptr() == weight.data_ptr():
                dropped = torch.ones(out.shape[-1], dtype=torch.bool)
                dropped[list(keep[layer])] = False
                out = out.masked_fill(dropped, -torch.inf)
        return out

    torch.nn.functional.linear = scored
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Models saved once per architecture."""
    return {}


def saved(model_type: str, cache: dict[str, Path], tmp_path_factory, **options) -> Path:
    key = f"{model_type}-{sorted(options)}"
    if key not in cache:
        cache[key] = save_hub_layout(build(model_type), tmp_path_factory.mktemp(model_type) / "source", **options)
    return cache[key]


@pytest.mark.parametrize("experts_per_token", [None, 2])
def test_logits_equal_those_of_the_masked_original(tmp_path, checkpoints, tmp_path_factory, experts_per_token):
    path = saved("qwen3_moe", checkpoints, tmp_path_factory)
    source = Checkpoint.open(path)
    selection = select(source, 0.5, experts_per_token)
    prune_checkpoint(source, selection, tmp_path / "out")
    original = load(path, "qwen3_moe")
    for part in original.modules():
        if isinstance(part, Qwen3MoeTopKRouter) and experts_per_token:
            part.top_k = experts_per_token
    with masked_softmax(original, selection.keep):
        expected = logits(original)
    assert (logits(load(tmp_path / "out", "qwen3_moe")) - expected).abs().max() < 1e-5
    assert (logits(original) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_pruned_checkpoints_are_proven(tmp_path, checkpoints, tmp_path_factory, model_type, ratio):
    source = Checkpoint.open(saved(model_type, checkpoints, tmp_path_factory))
    selection = select(source, ratio)
    written = prune_checkpoint(source, selection, tmp_path / "out")
    assert_bit_equal(source, tmp_path / "out", selection)
    pruned = Checkpoint.open(tmp_path / "out")
    kept = len(next(iter(selection.keep.values())))
    assert pruned.architecture.num_experts == kept and {
        layer.num_experts for layer in pruned.layout.layers.values()
    } == {kept}
    assert (pruned.numel, pruned.nbytes) == pruned_sizes(source, written.kept)
    original = load(source.path, model_type)
    with masked(original, selection.keep):
        expected = logits(original)
    assert (logits(load(tmp_path / "out", model_type)) - expected).abs().max() < 1e-5
    assert (logits(original) - expected).abs().max() > 1e-3
    assert confirm_layout(source, source.layout, selection.keep)


FUSED = [
    name
    for name in ARCHITECTURES
    if name not in ("gpt_oss", "llama4_text", "granitemoe", "gemma4_text", "qwen3_vl_moe")
]


@pytest.mark.parametrize("model_type", FUSED)
def test_stacked_experts_hold_the_same_weights_as_per_expert_ones(tmp_path, checkpoints, tmp_path_factory, model_type):
    path = saved(model_type, checkpoints, tmp_path_factory)
    with quiet():
        load(path, model_type).save_pretrained(tmp_path / "fused", save_original_format=False)
    shutil.copy(path / "config.json", tmp_path / "fused" / "config.json")
    fused, source = Checkpoint.open(tmp_path / "fused"), Checkpoint.open(path)
    assert any(not layer.per_expert for layer in fused.layout.layers.values())
    selection = select(source)
    for checkpoint, out in ((fused, "a"), (source, "b")):
        prune_checkpoint(checkpoint, selection, tmp_path / out)
    assert_bit_equal(fused, tmp_path / "a", selection)
    assert (logits(load(tmp_path / "a", model_type)) - logits(load(tmp_path / "b", model_type))).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------ quantized sources


def synthetic(path: Path, weights: Mapping[str, torch.Tensor], **config: object) -> Checkpoint:
    """A checkpoint of made-up tensors in two shards with an index; a layer without any gets a norm."""
    path.mkdir()
    there = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    norms = {f"model.layers.{layer}.norm.weight": torch.ones(64) for layer in {"0", "1"} - there}
    weights = {**weights, **norms} if there else weights
    names = sorted(weights)
    half = len(names) // 2
    where = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, path / shard, metadata={"format": "pt"})
        where |= dict.fromkeys(part, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    (path / "config.json").write_text(
        json.dumps({"hidden_size": 64, "num_hidden_layers": 2, "num_experts_per_tok": 2, **config}, indent=2)
    )
    return Checkpoint.open(path)


def random_bytes(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return (
        torch.randint(0, 120, shape).to(torch.uint8).view(dtype)
        if dtype.itemsize == 1
        else torch.randint(-999, 999, shape).to(dtype)
    )


def test_block_fp8_scales_travel_with_their_weights(tmp_path):
    weights = {}
    for layer in (1,):
        for expert in range(8):
            for part in ("gate", "up", "down"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
                weights[f"{name}.weight"] = random_bytes(128, 128, dtype=torch.float8_e4m3fn)
                weights[f"{name}.weight_scale_inv"] = torch.rand(1, 1)
        weights[f"model.layers.{layer}.mlp.gate.weight"] = torch.rand(8, 64).bfloat16()
        weights[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = torch.rand(8)
        weights[f"model.layers.{layer}.mlp.shared_experts.up_proj.weight"] = random_bytes(
            8, 128, dtype=torch.float8_e4m3fn
        )
        weights[f"model.layers.{layer}.mlp.shared_experts.up_proj.weight_scale_inv"] = torch.rand(1, 1)
    source = synthetic(
        tmp_path / "source",
        weights,
        model_type="deepseek_v3",
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    )
    selection = select(source)
    prune_checkpoint(source, selection, tmp_path / "out")
    assert_bit_equal(source, tmp_path / "out", selection)


def test_mxfp4_blocks_scales_and_biases_are_sliced_alike(tmp_path):
    weights = {}
    for layer in range(2):
        site = f"model.layers.{layer}.mlp"
        for part in ("gate_up", "down"):
            weights[f"{site}.experts.{part}_proj_blocks"] = random_bytes(8, 64, 2, 16)
            weights[f"{site}.experts.{part}_proj_scales"] = random_bytes(8, 64, 2)
            weights[f"{site}.experts.{part}_proj_bias"] = torch.rand(8, 64).bfloat16()
        weights |= {
            f"{site}.router.weight": torch.rand(8, 64).bfloat16(),
            f"{site}.router.bias": torch.rand(8).bfloat16(),
        }
    source = synthetic(
        tmp_path / "source",
        weights,
        model_type="gpt_oss",
        num_local_experts=8,
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]},
    )
    selection = select(source)
    prune_checkpoint(source, selection, tmp_path / "out")
    assert_bit_equal(source, tmp_path / "out", selection)


def test_packed_experts_keep_scales_and_shapes_and_their_names_are_renumbered(tmp_path):
    weights = {}
    for layer in range(2):
        for expert in range(8):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj"
            weights |= {
                f"{name}.weight_packed": random_bytes(32, 8, dtype=torch.int32),
                f"{name}.weight_scale": torch.rand(32, 1).half(),
                f"{name}.weight_shape": torch.tensor([32, 64]),
            }
        weights[f"model.layers.{layer}.mlp.gate.weight"] = torch.rand(8, 64)
    del weights["model.layers.1.mlp.experts.3.up_proj.weight_packed"]
    weights["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.rand(32, 64)
    ignore = ["lm_head", "model.layers.1.mlp.experts.3.up_proj", "model.layers.1.mlp.experts.6.up_proj"]
    source = synthetic(
        tmp_path / "source",
        weights,
        model_type="qwen3_moe",
        num_experts=8,
        quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ignore},
    )
    keep = {0: (0, 1, 2, 3), 1: (1, 3, 4, 7)}
    selection = Selection("x", {layer: LayerSelection(kept, (), ()) for layer, kept in keep.items()})
    prune_checkpoint(source, selection, tmp_path / "out")
    assert_bit_equal(source, tmp_path / "out", selection)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head", "model.layers.1.mlp.experts.1.up_proj"]


def test_quantizer_files_are_renumbered_and_else_copied_byte_for_byte(tmp_path, checkpoints, tmp_path_factory):
    shutil.copytree(saved("qwen3_moe", checkpoints, tmp_path_factory), tmp_path / "source")
    other = b'{ "quantization": {"exclude_modules": ["lm_head","model.layers.0.mlp.experts.15.up_proj" ] } }'
    (tmp_path / "source" / "hf_quant_config.json").write_bytes(other)
    (tmp_path / "source" / "quantize_config.json").write_bytes(b'{"bits":  4 }')
    source = Checkpoint.open(tmp_path / "source")
    keep = tuple(range(8, 16))
    prune_checkpoint(source, Selection("x", dict.fromkeys(range(3), LayerSelection(keep, (), ()))), tmp_path / "out")
    expected = other.replace(
        b'"lm_head","model.layers.0.mlp.experts.15.up_proj" ', b'"lm_head", "model.layers.0.mlp.experts.7.up_proj"'
    )
    assert (tmp_path / "out" / "hf_quant_config.json").read_bytes() == expected
    assert (tmp_path / "out" / "quantize_config.json").read_bytes() == b'{"bits":  4 }'


def test_a_correction_bias_of_shape_one_by_experts_is_sliced_on_its_second_axis(
    tmp_path, checkpoints, tmp_path_factory
):
    source = Checkpoint.open(saved("ernie4_5_moe", checkpoints, tmp_path_factory))
    layer = source.layout.layers[1]
    assert layer.stacked == {
        "model.layers.1.mlp.gate.weight": 0,
        "model.layers.1.mlp.moe_statics.e_score_correction_bias": 1,
    }


# ------------------------------------------------------------------------------------------ multi-token prediction


@pytest.fixture
def with_mtp(tmp_path) -> Checkpoint:
    return Checkpoint.open(save_hub_layout(build("glm4_moe"), tmp_path / "source", mtp=True))


def test_multi_token_prediction_is_dropped_with_its_field(tmp_path, with_mtp, capsys):
    selection = select(with_mtp)
    written = prune_checkpoint(with_mtp, selection, tmp_path / "out")
    assert written.mtp_dropped
    pruned = Checkpoint.open(tmp_path / "out")
    assert not any(name.startswith("model.layers.3.") for name in pruned.tensors)
    assert pruned.config["num_nextn_predict_layers"] == 0 and pruned.config["n_routed_experts"] == 8
    assert pruned.numel == pruned_sizes(with_mtp, written.kept)[0]
    load(tmp_path / "out", "glm4_moe")


def test_multi_token_prediction_that_was_observed_is_pruned_like_a_layer(tmp_path, with_mtp):
    selection = select(with_mtp, mtp=True)
    written = prune_checkpoint(with_mtp, selection, tmp_path / "out", mtp="observe")
    pruned = Checkpoint.open(tmp_path / "out")
    assert not written.mtp_dropped and pruned.config["num_nextn_predict_layers"] == 1
    assert pruned.layout.mtp[3].num_experts == 8
    before, after = tensors(with_mtp.path), tensors(tmp_path / "out")
    for new, old in enumerate(selection.layers[3].keep):
        name = "model.layers.3.mlp.experts.{}.up_proj.weight"
        assert torch.equal(after[name.format(new)], before[name.format(old)])
    assert torch.equal(after["model.layers.3.eh_proj.weight"], before["model.layers.3.eh_proj.weight"])


def test_multi_token_prediction_with_numbers_of_its_own_is_pruned_and_renamed_apart_from_the_decoder(tmp_path):
    weights = {}
    for block in ("model.layers.0", "model.layers.1", "mtp.layers.0"):
        weights |= {f"{block}.mlp.experts.{expert}.up_proj.weight": torch.rand(4, 64) for expert in range(4)}
        weights |= {f"{block}.mlp.gate.weight": torch.rand(4, 64)}
    weights["mtp.fc.weight"] = torch.rand(64, 128)
    ignore = [f"{block}.mlp.experts.3.up_proj" for block in ("model.layers.0", "model.layers.1", "mtp.layers.0")] + [
        "mtp.fc"
    ]
    source = synthetic(
        tmp_path / "source",
        weights,
        model_type="qwen3_next",
        num_experts=4,
        mtp_num_hidden_layers=1,
        quantization_config={"ignore": ignore},
    )
    keep = {0: (0, 1), 1: (2, 3), 2: (1, 3)}
    chosen = {layer: LayerSelection(kept, (), ()) for layer, kept in keep.items()}
    prune_checkpoint(source, Selection("x", chosen), tmp_path / "kept")
    after = tensors(tmp_path / "kept")
    assert torch.equal(
        after["mtp.layers.0.mlp.experts.0.up_proj.weight"], weights["mtp.layers.0.mlp.experts.1.up_proj.weight"]
    )
    assert torch.equal(after["mtp.layers.0.mlp.gate.weight"], weights["mtp.layers.0.mlp.gate.weight"][[1, 3]])
    config = Checkpoint.open(tmp_path / "kept").config
    assert config["quantization_config"]["ignore"] == [
        "model.layers.1.mlp.experts.1.up_proj",
        "mtp.layers.0.mlp.experts.1.up_proj",
        "mtp.fc",
    ]
    assert config["mtp_num_hidden_layers"] == 1
    prune_checkpoint(source, Selection("x", chosen), tmp_path / "dropped", mtp="drop")
    config = Checkpoint.open(tmp_path / "dropped").config
    assert not any(name.startswith("mtp") for name in tensors(tmp_path / "dropped"))
    assert config["quantization_config"]["ignore"] == ["model.layers.1.mlp.experts.1.up_proj"]
    assert config["mtp_num_hidden_layers"] == 0


def test_observed_multi_token_prediction_needs_a_selection(tmp_path, with_mtp):
    with pytest.raises(
        UnusableError, match=r"multi-token-prediction layers \[3\]. Observe them, or set prune.mtp to drop"
    ):
        prune_checkpoint(with_mtp, select(with_mtp), tmp_path / "out", mtp="observe")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ files


def test_everything_else_is_copied_byte_for_byte_and_stale_things_are_not(tmp_path, checkpoints, tmp_path_factory):
    path = tmp_path / "source"
    shutil.copytree(saved("qwen3_moe", checkpoints, tmp_path_factory), path)
    copied = {
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ x }}\r\n",
        "generation_config.json": b'{"a":1}',
        "modeling_x.py": b"x",
        "speech/model.safetensors": b"other",
        "a b/\u00fc.txt": b"",
        ".gitattributes": b"*.bin",
    }
    left = {
        ".git/HEAD": b"",
        "__pycache__/x.pyc": b"",
        ".cache/huggingface/x": b"",
        "pytorch_model.bin": b"",
        "original/model.safetensors": b"",
        "pytorch_model.bin.index.json": b"",
        "model.safetensors.index.json": b'{"weight_map": {}}',
        "consolidated.00.pth": b"",
    }
    for name, content in {**copied, **left}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    (path / "blob").write_bytes(b"linked")
    (path / "merges.txt").symlink_to(path / "blob")
    (path / "model.safetensors.index.json").unlink()
    source = Checkpoint.open(path)
    written = prune_checkpoint(source, select(source), tmp_path / "out")
    for name, content in copied.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert not any((tmp_path / "out" / name).exists() for name in left)
    assert (tmp_path / "out" / "merges.txt").read_bytes() == b"linked" and not (
        tmp_path / "out" / "merges.txt"
    ).is_symlink()
    assert set(written.left_out) == {
        "pytorch_model.bin",
        "original/model.safetensors",
        "pytorch_model.bin.index.json",
        "consolidated.00.pth",
    }
    before, after = (path / "config.json").read_text(), (tmp_path / "out" / "config.json").read_text()
    assert after == before.replace('"num_experts": 16', '"num_experts": 8')


def test_shards_stay_below_their_size_and_the_index_adds_up(tmp_path, checkpoints, tmp_path_factory):
    source = Checkpoint.open(saved("qwen3_moe", checkpoints, tmp_path_factory))
    limit = 100_000
    written = prune_checkpoint(source, select(source), tmp_path / "out", max_shard_bytes=limit)
    pruned = Checkpoint.open(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == pruned.nbytes and set(index["weight_map"]) == set(pruned.tensors)
    sizes = {shard: sum(t.nbytes for t in pruned.tensors.values() if t.shard == shard) for shard in pruned.shards}
    assert max(sizes.values()) <= limit and len(sizes) > 5 and set(sizes) == set(written.shards)
    assert all(
        name == f"model-{number:05d}-of-{len(sizes):05d}.safetensors" for number, name in enumerate(sorted(sizes), 1)
    )
    load(tmp_path / "out", "qwen3_moe")


def test_shards_that_lose_nothing_are_the_same_bytes(tmp_path):
    weights = {f"model.layers.1.mlp.experts.{expert}.up_proj.weight": torch.rand(64, 64) for expert in range(8)}
    weights |= {"model.layers.1.mlp.gate.weight": torch.rand(8, 64)}
    source = synthetic(tmp_path / "source", weights, model_type="qwen3_moe", num_experts=8)
    save_file(
        {"a.weight": torch.rand(200, 64)},
        tmp_path / "source" / "model-extra.safetensors",
        metadata={"format": "pt", "by": "me"},
    )
    index = json.loads((tmp_path / "source" / "model.safetensors.index.json").read_text())
    index["weight_map"]["a.weight"] = "model-extra.safetensors"
    (tmp_path / "source" / "model.safetensors.index.json").write_text(json.dumps(index))
    source = Checkpoint.open(tmp_path / "source")
    prune_checkpoint(source, select(source), tmp_path / "out", max_shard_bytes=60_000)
    where = Checkpoint.open(tmp_path / "out").tensors["a.weight"].shard
    assert filecmp.cmp(tmp_path / "out" / where, tmp_path / "source" / "model-extra.safetensors", shallow=False)


def test_mixed_item_sizes_stay_aligned(tmp_path):
    weights = {
        f"model.layers.1.mlp.experts.{expert}.up_proj.{kind}": value
        for expert in range(8)
        for kind, value in {
            "weight": random_bytes(3, 5),
            "scale": torch.rand(1),
            "weight_shape": torch.tensor([3, 5]),
        }.items()
    }
    weights["model.layers.1.mlp.gate.weight"] = torch.rand(8, 64).half()
    source = synthetic(tmp_path / "source", weights, model_type="qwen3_moe", num_experts=8)
    selection = select(source, 0.25)
    prune_checkpoint(source, selection, tmp_path / "out")
    assert_bit_equal(source, tmp_path / "out", selection)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_second_run_writes_no_shard_and_an_interrupted_one_goes_on(
    tmp_path, checkpoints, tmp_path_factory, monkeypatch
):
    source = Checkpoint.open(saved("qwen3_moe", checkpoints, tmp_path_factory))
    selection, options = select(source), dict(max_shard_bytes=200_000)
    prune_checkpoint(source, selection, tmp_path / "whole", **options)
    written: list[str] = []
    resumed: list[str] = []
    write = module.write_shards

    def write_two(source_path, out, shards, task, finished):
        written.extend(shard.name for shard in shards[:2])
        write(source_path, out, shards[:2], task, finished)
        raise StageFailed("killed")

    def write_rest(source_path, out, shards, task, finished):
        resumed.extend(shard.name for shard in shards)
        write(source_path, out, shards, task, finished)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shards", write_two)
        with pytest.raises(StageFailed, match="killed"):
            prune_checkpoint(source, selection, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "config.json").exists()
    assert not json.loads((tmp_path / "out" / MANIFEST).read_text())["complete"]
    monkeypatch.setattr(module, "write_shards", write_rest)
    prune_checkpoint(source, selection, tmp_path / "out", **options)
    assert resumed and not set(resumed) & set(written)
    resumed.clear()
    prune_checkpoint(source, selection, tmp_path / "out", **options)
    assert not resumed
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert filecmp.cmpfiles(tmp_path / "whole", tmp_path / "out", names, shallow=False)[0] == names


@pytest.mark.parametrize("damage", [flip_unseen, truncate, delete], ids=lambda each: each.__name__)
def test_a_shard_that_was_damaged_since_an_interrupted_run_wrote_it_is_written_again(
    tmp_path, checkpoints, tmp_path_factory, damage
):
    source = Checkpoint.open(saved("qwen3_moe", checkpoints, tmp_path_factory))
    selection, options = select(source), dict(max_shard_bytes=200_000)
    prune_checkpoint(source, selection, tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    record = json.loads((tmp_path / "out" / MANIFEST).read_text())
    (tmp_path / "out" / MANIFEST).write_text(json.dumps({**record, "complete": False}))
    damage(sorted((tmp_path / "out").glob("*.safetensors"))[1])
    prune_checkpoint(source, selection, tmp_path / "out", **options)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert filecmp.cmpfiles(tmp_path / "whole", tmp_path / "out", names, shallow=False)[0] == names


# ------------------------------------------------------------------------------------------ refusals


def refused(source: Checkpoint, out: Path, keep: Mapping[int, tuple[int, ...]], top_k: int | None = None) -> str:
    with pytest.raises(UnusableError) as error:
        prune_checkpoint(
            source, Selection("x", {layer: LayerSelection(kept, (), ()) for layer, kept in keep.items()}, top_k), out
        )
    assert not out.exists()
    return str(error.value)


def test_selections_that_do_not_fit_are_refused(tmp_path, checkpoints, tmp_path_factory):
    source = Checkpoint.open(saved("deepseek_v3", checkpoints, tmp_path_factory))
    good = tuple(range(0, 16, 2))
    out = tmp_path / "out"
    assert "layers [0]" in refused(source, out, {0: good, 1: good, 2: good})
    assert "different experts from 0 to 15" in refused(source, out, {1: good, 2: (*good[:-1], 16)})
    assert "ascending order" in refused(source, out, {1: good, 2: (2, 0, *good[2:])})
    assert "keeps 3 experts in layer 1, but each token is routed to 4" in refused(source, out, {1: (0, 1, 2), 2: good})
    assert "unequal numbers of experts in the 4 groups of layer 2" in refused(
        source, out, {1: good, 2: tuple(range(8))}
    )
    assert "between 4 and 8 experts per layer" in refused(source, out, {1: good, 2: (0, 4, 8, 12)})


def test_a_layer_that_routes_by_table_only_stays_whole(tmp_path):
    site = "model.layers.0.mlp"
    weights = {
        f"{site}.gate.weight": torch.rand(8, 64),
        f"{site}.gate.tid2eid": torch.zeros(9, 2, dtype=torch.int64),
        f"{site}.experts.down_proj": torch.rand(8, 64, 4),
    }
    source = synthetic(tmp_path / "source", weights, model_type="deepseek_v4", n_routed_experts=8)
    assert "layer 0 assigns tokens to experts by a fixed table" in refused(source, tmp_path / "out", {0: (0, 1, 2)})
    prune_checkpoint(source, Selection("x", {0: LayerSelection(tuple(range(8)), (), ())}), tmp_path / "whole")
    after = tensors(tmp_path / "whole")
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())


def test_another_checkpoint_in_the_way_is_not_overwritten(tmp_path, checkpoints, tmp_path_factory):
    source = Checkpoint.open(saved("qwen3_moe", checkpoints, tmp_path_factory))
    prune_checkpoint(source, select(source), tmp_path / "out")
    with pytest.raises(StageFailed, match="already holds another checkpoint"):
        prune_checkpoint(source, select(source, seed=1), tmp_path / "out")
    with pytest.raises(StageFailed, match="is the source itself"):
        prune_checkpoint(source, select(source), source.path)


KILLED = """
import os, signal, sys
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.selection.selection import LayerSelection, Selection
from reapkit.pruning.checkpoint import prune_checkpoint

source, out, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
copy = os.preadv

def killed(*arguments):
    global calls
    calls -= 1
    if not calls:
        os.kill(os.getpid(), signal.SIGKILL)
    return copy(*arguments)

os.preadv = killed
keep = LayerSelection(tuple(range(0, 16, 2)), (), ())
prune_checkpoint(Checkpoint.open(source), Selection("x", dict.fromkeys(range(3), keep)), out, max_shard_bytes=200_000)
"""


def test_a_killed_process_leaves_what_the_next_one_completes(tmp_path, checkpoints, tmp_path_factory):
    source = Checkpoint.open(saved("qwen3_moe", checkpoints, tmp_path_factory))
    for calls in (5, 20, 10**6):
        command = [sys.executable, "-c", KILLED, str(source.path), str(tmp_path / "out"), str(calls)]
        assert subprocess.run(command).returncode == (0 if calls == 10**6 else -9)
        assert (tmp_path / "out" / "config.json").exists() == (calls == 10**6)
    chosen = Selection("x", dict.fromkeys(range(3), LayerSelection(tuple(range(0, 16, 2)), (), ())))
    prune_checkpoint(source, chosen, tmp_path / "whole", max_shard_bytes=200_000)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert filecmp.cmpfiles(tmp_path / "whole", tmp_path / "out", names, shallow=False)[0] == names
