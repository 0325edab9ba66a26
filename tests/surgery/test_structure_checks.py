"""The layout agrees with the models that transformers builds, and a written directory with its record."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tests.tiny import build, save_hub_layout

from reapkit.checkpoint import Checkpoint
from reapkit.errors import UnusableError
from reapkit.layout import Layout, read_layout
from reapkit.selection import LayerSelection, Selection
from reapkit.surgery.check import confirm_layout, read_manifest, verify_shards
from reapkit.surgery.prune import prune_checkpoint


def half(layout: Layout) -> dict[int, tuple[int, ...]]:
    return {index: tuple(range(0, layer.num_experts, 2)) for index, layer in layout.layers.items()}


def test_a_row_that_was_overlooked_is_noticed(tmp_path):
    source = Checkpoint.open(save_hub_layout(build("minimax_m2"), tmp_path / "source"))
    layout = read_layout(source)
    stacked = {name: axis for name, axis in layout.layers[1].stacked.items() if "bias" not in name}
    wrong = dataclasses.replace(layout, layers={**layout.layers, 1: dataclasses.replace(layout.layers[1], stacked=stacked)})
    with pytest.raises(UnusableError, match="in layer 1 the checkpoint's names say that pruning removes"):
        confirm_layout(source, wrong, half(layout))


def test_what_transformers_does_not_know_cannot_be_confirmed(tmp_path):
    source = Checkpoint.open(save_hub_layout(build("mixtral"), tmp_path / "source"))
    strange = Checkpoint(source.path, {**source.config, "architectures": ["HomemadeForCausalLM"]}, source.tensors)
    assert not confirm_layout(strange, read_layout(source), half(read_layout(source)))


def test_shards_are_checked_against_their_record(tmp_path):
    source, out = Checkpoint.open(save_hub_layout(build("mixtral"), tmp_path / "source")), tmp_path / "out"
    keep = half(read_layout(source))
    written = prune_checkpoint(source, Selection("x", {i: LayerSelection(k, (), ()) for i, k in keep.items()}), out,
                               max_shard_bytes=300_000)
    assert verify_shards(out) == {name: shard["sha256"] for name, shard in written.shards.items()}
    assert read_manifest(out)["keep"] == {str(index): list(kept) for index, kept in keep.items()}
    shard = out / sorted(written.shards)[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UnusableError, match=f"{shard.name}: differs from what was written"):
        verify_shards(out)


def test_unfinished_and_foreign_directories_are_told_apart(tmp_path):
    with pytest.raises(UnusableError, match="was not pruned by reapkit"):
        verify_shards(tmp_path)
    (tmp_path / "reapkit.json").write_text(json.dumps({"complete": False, "shards": {}}))
    with pytest.raises(UnusableError, match="was not finished there"):
        verify_shards(tmp_path)
    (tmp_path / "reapkit.json").write_text("[]")
    with pytest.raises(UnusableError, match="unreadable"):
        verify_shards(tmp_path)
