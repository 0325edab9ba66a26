"""Every quantized matrix is, in both placements, what its bytes stand for, counted out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.shard_reader import ShardReader
from reapkit.model.dequantizing import four_bits, unblocked
from reapkit.model.loading import load_model
from reapkit.model.stored_tensors import CheckpointTensors
from reapkit.model.streaming.layers import LayeredModel
from tests.support import quantized_sources, tiny

BF16_ROUNDING = 2**-7
"""The libraries compute in bfloat16, whose numbers lie this far apart, where scales are multiplied with each other."""


def read(path: Path) -> Iterator[tuple[str, torch.Tensor, tuple[int, ...]]]:
    tensors = CheckpointTensors(Checkpoint.open(path))
    with ShardReader(path) as reader:
        for name, info in tensors.items():
            if tensors.is_quantized(name):
                yield name, tensors.stored(name, reader)[...], info.shape


@pytest.mark.parametrize("name", [name for name in quantized_sources.NAMES if quantized_sources.is_read(name)])
def test_matrices_are_what_their_bytes_stand_for(name: str, tmp_path: Path) -> None:
    with tiny.quiet():
        path = quantized_sources.write(name, tmp_path)
        resident, layered = load_model(path), LayeredModel(path)
    expected = quantized_sources.naive(path)
    found = 0
    for matrix, value, shape in read(path):
        assert value.shape == expected[matrix].shape == shape
        assert ((value.float() - expected[matrix]).abs() <= BF16_ROUNDING * expected[matrix].abs() + 1e-9).all(), matrix
        found += 1
    assert found == quantized_sources.matrices(path)
    state = resident.state_dict()
    for layer in range(len(layered.layers)):
        layered.load(layer)
        for own, tensor in layered.layers[layer].state_dict().items():
            assert torch.equal(tensor, state[f"{layered.prefix}.{layer}.{own}"]), own
        layered.drop(layer)


def test_scales_of_blocks_that_overhang_belong_to_the_blocks_that_the_config_names() -> None:
    """A grid of 2 by 1 over 5 rows is not 2.5 rows each, nor 3 where the config says 4."""
    weight, scale = torch.ones(5, 3).to(torch.float8_e4m3fn), torch.tensor([[2.0], [8.0]])
    assert unblocked(weight, scale, (4, 4)).tolist() == [[2.0] * 3] * 4 + [[8.0] * 3]
    assert unblocked(weight, scale).tolist() == [[2.0] * 3] * 3 + [[8.0] * 3] * 2


@pytest.mark.parametrize("scale", [torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([[3.0]])])
def test_one_scale_is_for_all(scale: torch.Tensor) -> None:
    assert unblocked(torch.ones(2, 4), scale, (128, 128)).tolist() == [[3.0] * 4] * 2


def test_scales_of_rows_and_of_stacked_matrices_are_told_by_their_shape() -> None:
    stack = torch.ones(2, 3, 4)
    assert unblocked(stack[0], torch.tensor([1.0, 2.0, 3.0]))[:, 0].tolist() == [1.0, 2.0, 3.0]
    assert unblocked(stack, torch.tensor([1.0, 2.0]))[:, 0, 0].tolist() == [1.0, 2.0]
    assert unblocked(stack, torch.tensor([[127, 128, 129], [130, 131, 132]], dtype=torch.uint8))[:, :, 0].tolist() == [
        [1.0, 2.0, 4.0],
        [8.0, 16.0, 32.0],
    ]


def test_the_low_half_of_a_byte_comes_first() -> None:
    packed = torch.tensor([[0x21, 0xF9]], dtype=torch.uint8)
    assert four_bits(packed).tolist() == [[0.5, 1.0, -0.5, -6.0]]
    assert four_bits(packed.view(torch.int8)).tolist() == four_bits(packed).tolist()
