"""Checkpoints published in block FP8 and in MXFP4 compute, once pruned, what the original computes with the dropped
experts masked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.model.loading import load_model
from reapkit.model.masking import masked
from reapkit.pruning.checkpoint import prune_checkpoint
from reapkit.selection.selection import LayerSelection, Selection
from tests.support.tiny import build, save_hub_layout

torch.set_num_threads(1)
IDS = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(1))
BLOCK = 128


def rewrite(path: Path, tensors: dict[str, torch.Tensor], quantization: dict) -> Checkpoint:
    """The checkpoint with other tensors and a quantization config."""
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}, indent=2))
    return Checkpoint.open(path)


@torch.no_grad()
def assert_proven(source: Checkpoint, out: Path) -> None:
    layers = source.layout.layers
    groups = source.architecture.n_group
    keep = {
        index: tuple(e for e in range(layer.num_experts) if e % (layer.num_experts // groups) % 2 == index % 2)
        for index, layer in layers.items()
    }
    prune_checkpoint(source, Selection("x", {index: LayerSelection(kept, (), ()) for index, kept in keep.items()}), out)
    original, pruned = (
        load_model(path, dtype="float32").float() for path in (source.path, out)
    )  # MXFP4 is unpacked to bf16
    with masked(original, keep):
        expected = original(input_ids=IDS, use_cache=False).logits
    assert (pruned(input_ids=IDS, use_cache=False).logits - expected).abs().max() < 1e-5
    assert (original(input_ids=IDS, use_cache=False).logits - expected).abs().max() > 1e-3


def test_block_fp8(tmp_path):
    model = build("deepseek_v3", hidden_size=2 * BLOCK, moe_intermediate_size=BLOCK, num_hidden_layers=2)
    path = save_hub_layout(model, tmp_path / "source")
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if re.search(r"(experts|shared_experts)\..*proj\.weight$", name)]:
        weight = tensors.pop(name)
        blocks = weight.view(weight.shape[0] // BLOCK, BLOCK, weight.shape[1] // BLOCK, BLOCK)
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        tensors[name] = (blocks / scale[:, None, :, None]).view_as(weight).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    left = ["self_attn", "mlp.gate", "lm_head", "layers.0.mlp"]
    assert_proven(
        rewrite(
            path,
            tensors,
            {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [BLOCK, BLOCK],
                "modules_to_not_convert": left,
            },
        ),
        tmp_path / "out",
    )


def test_mxfp4(tmp_path):
    model = build("gpt_oss", hidden_size=64, intermediate_size=64)
    path = save_hub_layout(model, tmp_path / "source")
    tensors = load_file(path / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(
            name
        ).shape  # published outputs first, in blocks of 32 inputs, two per byte
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=draw).to(
            torch.uint8
        )
        tensors[f"{name}_scales"] = torch.randint(123, 127, (experts, outputs, inputs // 32), generator=draw).to(
            torch.uint8
        )
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    assert_proven(rewrite(path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": left}), tmp_path / "out")
