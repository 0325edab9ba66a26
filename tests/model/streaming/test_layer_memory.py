"""A block has one owner at a time, and a tensor that outlives its owner keeps the block."""

from __future__ import annotations

import mmap

import pytest
import torch

from reapkit.model.streaming.layer_memory import Arena, Arenas, host_memory


def arenas() -> Arenas:
    return Arenas(1000, host_memory)


def a_tensor(arena: Arena) -> torch.Tensor:
    return arena.tensor(torch.Size([10]), torch.float32)


def test_a_block_is_handed_out_again_once_it_was_given_back():
    pool = arenas()
    first, second = pool.take(), pool.take()
    address = first.block.data_ptr()
    assert second.block.data_ptr() != address
    assert pool.take().block.data_ptr() != address, "its owner has dropped every tensor, but not given it back"
    pool.give_back(first)
    assert pool.take().block.data_ptr() == address
    assert pool.blocks == 3


def test_tensors_lie_behind_each_other_at_their_phase():
    arena = arenas().take()
    first, second = a_tensor(arena), arena.tensor(torch.Size([2, 5]), torch.float32, phase=8)
    assert first.data_ptr() == arena.block.data_ptr() and arena.block.data_ptr() % mmap.PAGESIZE == 0
    assert second.data_ptr() == first.data_ptr() + 64 + 8 and second.shape == (2, 5)
    with pytest.raises(ValueError, match="40128 bytes for a block of 4096"):
        arena.tensor(torch.Size([10_000]), torch.float32)


def test_a_tensor_that_outlives_its_owner_keeps_its_bytes():
    pool = arenas()
    arena = pool.take()
    row = a_tensor(arena).fill_(7).detach()[2:3]
    pool.give_back(arena)
    other = pool.take()
    a_tensor(other).fill_(1)
    assert row.item() == 7 and pool.blocks == 2
    address = row.data_ptr() & -mmap.PAGESIZE
    pool.give_back(other)
    del row
    assert {pool.take().block.data_ptr(), pool.take().block.data_ptr()} >= {address} and pool.blocks == 2


def test_a_block_is_given_back_once():
    pool = arenas()
    arena = pool.take()
    pool.give_back(arena)
    with pytest.raises(ValueError, match="given back twice"):
        pool.give_back(arena)
    with pytest.raises(ValueError, match="bytes for a block of 0"):
        a_tensor(arena)
