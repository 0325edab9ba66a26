"""A rounded checkpoint holds what quantizing by rounding to nearest and dequantizing the result gives."""

import pytest
import torch
from safetensors import safe_open

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.model.loading import load_model
from reapkit.quantization.checkpoint import quantize_checkpoint
from reapkit.quantization.dense import write_dense
from reapkit.quantization.formats import preset
from reapkit.quantization.rounded import rounded, write_rounded
from reapkit.quantization.targets import targets
from reapkit.recipe.schema import QuantizeSpec
from tests.support import tiny

SPEC = QuantizeSpec(scheme="W3A16", method="rtn", group_size=16)


def tensors(path):
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}
    return found


def naive(weight, bits=3, group=16):
    """Symmetric rounding by groups of input columns, written out: scale = 2·max|w| / (2^bits − 1)."""
    out = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for at in range(0, weight.shape[1], group):
            block = weight[row, at : at + group].float()
            scale = (2 * block.abs().max() / (2**bits - 1)).to(weight.dtype).float()
            out[row, at : at + group] = (
                (block / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
            ).to(weight.dtype)
    return out


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_equals_quantizing_and_dequantizing(name, tmp_path):
    tiny.save_hub_layout(tiny.build(name), tmp_path / "base")
    source = Checkpoint.open(tmp_path / "base")
    write_rounded(source, SPEC, tmp_path / "rounded")
    quantize_checkpoint(tmp_path / "base", tmp_path / "quantized", SPEC)
    write_dense(tmp_path / "base", tmp_path / "quantized", SPEC, tmp_path / "dense")
    mine, expected, before = tensors(tmp_path / "rounded"), tensors(tmp_path / "dense"), tensors(tmp_path / "base")
    assert mine.keys() == expected.keys()
    for key, value in mine.items():
        assert torch.equal(value, expected[key]), key
    changed = {key for key in mine if not torch.equal(mine[key], before[key])}
    assert changed == set(targets(source, SPEC).matrices)
    load_model(tmp_path / "rounded")


def test_a_matrix_is_rounded_as_written_out_by_hand(tmp_path):
    tiny.save_hub_layout(tiny.build("qwen3_moe"), tmp_path / "base")
    write_rounded(Checkpoint.open(tmp_path / "base"), SPEC, tmp_path / "rounded")
    key = "model.layers.0.mlp.experts.3.up_proj.weight"
    assert torch.allclose(tensors(tmp_path / "rounded")[key], naive(tensors(tmp_path / "base")[key]), atol=1e-6)


def test_stacks_are_rounded_along_their_inputs_whichever_way_round():
    scheme, stack = preset(SPEC), torch.randn(2, 32, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(stack, scheme)[1], rounded(stack[1], scheme))
    assert torch.equal(rounded(stack, scheme, inputs_first=True)[1], rounded(stack[1].T.contiguous(), scheme).T)
