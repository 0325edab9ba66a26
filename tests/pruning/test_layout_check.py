"""The layout agrees with the models that transformers builds, and a written directory with its record."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.expert_layout import Layout
from reapkit.core.errors import UnusableError
from reapkit.pruning.checkpoint import prune_checkpoint
from reapkit.pruning.layout_check import confirm_layout
from reapkit.pruning.manifest import check_directory, read_manifest, seal
from reapkit.selection.selection import LayerSelection, Selection
from tests.support.tiny import build, save_hub_layout


def half(layout: Layout) -> dict[int, tuple[int, ...]]:
    return {index: tuple(range(0, layer.num_experts, 2)) for index, layer in layout.layers.items()}


def test_a_row_that_was_overlooked_is_noticed(tmp_path):
    source = Checkpoint.open(save_hub_layout(build("minimax_m2"), tmp_path / "source"))
    layout = source.layout
    stacked = {name: axis for name, axis in layout.layers[1].stacked.items() if "bias" not in name}
    wrong = dataclasses.replace(
        layout, layers={**layout.layers, 1: dataclasses.replace(layout.layers[1], stacked=stacked)}
    )
    with pytest.raises(UnusableError, match="in layer 1 the checkpoint's names say that pruning removes"):
        confirm_layout(source, wrong, half(layout))


def test_what_transformers_does_not_know_cannot_be_confirmed(tmp_path):
    source = Checkpoint.open(save_hub_layout(build("mixtral"), tmp_path / "source"))
    strange = Checkpoint(source.path, {**source.config, "architectures": ["HomemadeForCausalLM"]}, source.tensors)
    assert not confirm_layout(strange, source.layout, half(source.layout))


def pruned(tmp_path):
    source, out = Checkpoint.open(save_hub_layout(build("mixtral"), tmp_path / "source")), tmp_path / "out"
    keep = half(source.layout)
    return (
        prune_checkpoint(
            source,
            Selection("x", {i: LayerSelection(k, (), ()) for i, k in keep.items()}),
            out,
            max_shard_bytes=300_000,
        ),
        out,
        keep,
    )


def failed(out):
    return {finding.name: finding.detail for finding in check_directory(out) if not finding.passed}


def test_a_directory_is_checked_against_its_record_wherever_it_lies(tmp_path):
    written, out, keep = pruned(tmp_path)
    out = shutil.copytree(out, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "source")
    assert [finding.name for finding in check_directory(out)] == [
        "config, index, headers",
        "shards as recorded",
        "experts, config",
        "other files",
        "sha256",
    ]
    assert not failed(out) and read_manifest(out)["keep"] == {str(index): list(kept) for index, kept in keep.items()}
    resealed = seal(out, {"keep": read_manifest(out)["keep"]})
    assert {name: shard["sha256"] for name, shard in resealed["shards"].items()} == {
        name: shard["sha256"] for name, shard in written.shards.items()
    }
    shard = out / sorted(written.shards)[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert list(failed(out)) == [f"sha256 {shard.name}"]
    shard.write_bytes(content[:-1])
    assert failed(out).keys() == {
        "config, index, headers",
        "shards as recorded",
        "experts, config",
        f"sha256 {shard.name}",
    }
    shard.unlink()
    assert failed(out)[f"sha256 {shard.name}"] == "missing"


def test_a_config_that_counts_other_experts_and_a_stray_shard_are_seen(tmp_path):
    _, out, keep = pruned(tmp_path)
    config = out / "config.json"
    config.write_text(
        config.read_text().replace(f'"num_local_experts": {len(keep[0])}', f'"num_local_experts": {2 * len(keep[0])}')
    )
    assert failed(out).keys() == {"experts, config"}
    shutil.copy(next(out.glob("*.safetensors")), out / "stray.safetensors")
    assert failed(out)["shards as recorded"] == "stray.safetensors: not recorded, not in the index, there"


def test_unfinished_and_foreign_directories_are_told_apart(tmp_path):
    with pytest.raises(UnusableError, match="reapkit did not write this directory"):
        check_directory(tmp_path)
    (tmp_path / "reapkit.json").write_text(json.dumps({"complete": False, "shards": {}}))
    with pytest.raises(UnusableError, match="was not finished there"):
        check_directory(tmp_path)
    for damaged in ("[]", '{"complete": true, "shards": {"a": 3}}', '{"complete": true, "shards": []}'):
        (tmp_path / "reapkit.json").write_text(damaged)
        with pytest.raises(UnusableError, match="the record cannot be read"):
            check_directory(tmp_path)
