"""Layers go to an accelerator through two pinned buffers into two blocks, and no copy overtakes who still reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from reapkit.model.loading import load_model
from reapkit.model.streaming import layers as layers_module
from reapkit.model.streaming.device_copies import Accelerator, StagedCopies
from reapkit.model.streaming.layer_memory import Arena, Arenas
from reapkit.model.streaming.layer_pass import in_turn
from reapkit.model.streaming.layers import LayeredModel
from reapkit.observation.resident import observe
from reapkit.observation.streamed import observe_streaming
from reapkit.recipe.schema import ObserveSpec
from tests.observation.test_streamed import assert_equal
from tests.support import tiny
from tests.support.layer_blocks import LateAccelerator, watched_blocks
from tests.support.tiny_tokens import tiny_tokens


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> LateAccelerator:
    """What every LayeredModel of the test takes for its device's accelerator."""
    late = LateAccelerator()
    monkeypatch.setattr(layers_module, "accelerator", lambda device: late)
    return late


def assert_ordered(device: LateAccelerator, layers: int) -> None:
    """Every copy was waited for, and each block's next copy waits for an event behind that, when its layer was
    dropped."""
    assert len(device.copies) == layers
    by_block: dict[int, list] = {}
    for copy in device.copies:
        by_block.setdefault(copy.target, []).append(copy)
    assert len(by_block) <= 2
    for copies in by_block.values():
        assert all(copy.after is not None for copy in copies)
        for earlier, later in pairwise(copies):
            assert earlier.event.reached < later.after.reached < later.event.reached
    buffers = [copy.source for copy in device.copies]
    assert len(set(buffers)) == 2 and all(one != other for one, other in pairwise(buffers)), "in turns"


def wait_until(so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_layers_arrive_whole_through_two_blocks_and_two_buffers(
    model_type: str, device: LateAccelerator, tmp_path: Path
):
    with tiny.quiet():
        path = tiny.save_hub_layout(tiny.build(model_type, num_hidden_layers=5), tmp_path / "model")
        expected = load_model(path).state_dict()
    layered = LayeredModel(path)
    layered.load_rest()
    rest = device.memories
    with watched_blocks() as blocks:
        for layer in in_turn(layered, range(5)):
            assert all(
                torch.equal(parameter, expected[f"{layered.prefix}.{layer}.{name}"])
                for name, parameter in layered.layers[layer].named_parameters()
            )
            if layer < 4:
                wait_until(lambda: len(blocks.in_use) == 2)  # the next layer is read meanwhile
    assert device.memories - rest == blocks.most_in_use == 2 and device.buffers == 2
    assert blocks.left_behind == 0 and not blocks.in_use
    assert_ordered(device, 5)


def test_an_observation_through_copies_that_come_late_is_the_resident_one(device: LateAccelerator, tmp_path: Path):
    with tiny.quiet():
        path = tiny.save_hub_layout(tiny.build("qwen3_moe", num_hidden_layers=5), tmp_path / "model")
        resident = load_model(path)
    tokens = tiny_tokens(tmp_path / "calibration")
    expected = observe(resident, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "resident")
    with watched_blocks() as blocks:
        got = observe_streaming(path, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "streaming")
    assert_equal(got, expected)
    assert blocks.most_in_use <= 2 and blocks.left_behind == 0
    assert_ordered(device, 5)


def test_a_layer_that_nobody_used_is_waited_for_before_its_block_is_filled_again(
    device: LateAccelerator, tmp_path: Path
):
    with tiny.quiet():
        layered = LayeredModel(tiny.save_hub_layout(tiny.build("qwen3_moe"), tmp_path / "model"))
    layered.load_ahead(0)
    assert device.copies[0].event.reached is None
    layered.drop(0)
    assert device.copies[0].event.reached is not None
    layered.load(1)
    assert device.copies[1].target == device.copies[0].target
    assert device.copies[0].event.reached < device.copies[1].after.reached


def test_a_buffer_is_read_into_once_its_last_bytes_have_left_it():
    device = LateAccelerator()
    staged, pool = StagedCopies(device, 64), Arenas(64, device.memory, device.mark)
    arenas = [pool.take() for _ in range(3)]
    for value, arena in enumerate(arenas):
        staged.buffer().fill_(value)
        assert [copy.event.reached is None for copy in device.copies] == [False] * (value - 1) + [True] * min(value, 1)
        staged.send(64, arena)
    for copy in device.copies:
        copy.event.synchronize()
    assert [int(arena.block[0]) for arena in arenas] == [0, 1, 2] and device.buffers == 2


def test_a_device_without_streams_has_copied_when_the_call_returns():
    device = Accelerator(torch.device("cpu"))
    staged, pool = StagedCopies(device, 64), Arenas(64, device.memory, device.mark)
    arena = pool.take()
    staged.buffer().fill_(3)
    assert staged.send(64, arena) is None and bool((arena.block[:64] == 3).all())
    address = arena.block.data_ptr()
    held = arena.tensor(torch.Size([4]), torch.uint8)
    pool.give_back(arena)
    assert pool.take().block.data_ptr() != address, "a tensor still looks at it"
    del held
    assert pool.take().block.data_ptr() == address


def test_blocks_without_bytes_are_counted_like_others():
    device = Accelerator(torch.device("meta"))
    staged, pool = StagedCopies(device, 64), Arenas(64, device.memory, device.mark)
    waiting: list[Arena] = []
    for _ in range(5):
        waiting.append(pool.take())
        staged.buffer()
        staged.send(64, waiting[-1])
        if len(waiting) == 2:
            pool.give_back(waiting.pop(0))
    assert pool.blocks == 2 and waiting[0].tensor(torch.Size([4]), torch.uint8).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_layers_pass_through_two_blocks_of_a_card(tmp_path: Path):
    with tiny.quiet():
        model = tiny.build("qwen3_moe", num_hidden_layers=6, hidden_size=256, moe_intermediate_size=512)
        path = tiny.save_hub_layout(model, tmp_path / "model")
        expected = load_model(path).state_dict()
    layered = LayeredModel(path, device="cuda")
    layered.load_rest()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, most = torch.cuda.memory_allocated(), 2 * layered._arenas.nbytes
    for layer in in_turn(layered, range(6)):
        own = {name: tensor.cpu() for name, tensor in layered.layers[layer].named_parameters()}
        assert all(torch.equal(tensor, expected[f"{layered.prefix}.{layer}.{name}"]) for name, tensor in own.items())
    assert layered._arenas.blocks <= 2
    assert torch.cuda.max_memory_allocated() - before <= most + (1 << 20)
