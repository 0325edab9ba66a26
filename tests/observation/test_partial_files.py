"""Parts of an unfinished observation come back to the bit, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reapkit.core.errors import StageFailed
from reapkit.observation.partial_files import load_partial, save_by_rename
from tests.support.damage import append, flip_unseen, truncate

TENSORS = {
    "sums": torch.arange(24, dtype=torch.float64).reshape(2, 3, 4).transpose(0, 2),
    "hidden": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "count": torch.tensor(7),
    "nothing": torch.empty(0, 4),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "work" / "waves" / "layer-0000.safetensors"
    save_by_rename(TENSORS, path)
    return path


def test_what_was_saved_comes_back(file: Path) -> None:
    found = load_partial(file)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) and found[name].dtype == TENSORS[name].dtype for name in found)


@pytest.mark.parametrize("damage", [truncate, append, flip_unseen], ids=lambda each: each.__name__)
def test_a_damaged_part_is_not_added_up(file: Path, damage: object) -> None:
    damage(file)
    expected = (
        rf"^{file}: this part of an unfinished observation has other bytes than were written\. Delete"
        rf" {file.parents[1]} and run the same command again; the observation begins anew\.$"
    )
    with pytest.raises(StageFailed, match=expected):
        load_partial(file)


def test_each_flipped_byte_of_the_values_is_noticed(file: Path) -> None:
    content = file.read_bytes()
    values = sum(tensor.numel() * tensor.element_size() for tensor in TENSORS.values())
    for place in range(len(content) - values, len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(StageFailed, match="has other bytes than were written"):
            load_partial(file)


def test_parts_of_an_earlier_reapkit_are_used(tmp_path: Path) -> None:
    save_file({"count": TENSORS["count"]}, tmp_path / "group-00000.safetensors")
    assert load_partial(tmp_path / "group-00000.safetensors")["count"] == 7
