"""Headers and identity: what is read is what is stored, and a checkpoint's name follows its content."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from reapkit.checkpoint.checkpoint import HASHED_SHARD_BYTES, Checkpoint
from reapkit.core.errors import UnusableError
from reapkit.core.safetensors_header import FIRST_READ_BYTES, read_header
from tests.support.published_models import write_checkpoint

TENSORS = [(f"model.layers.0.mlp.experts.{expert}.up_proj.weight", "BF16", (4, 2)) for expert in range(3)]


def header(*entries: tuple[str, str]) -> str:
    return "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in entries) + "}"


def write_text(path: Path, text: str, payload: int) -> Path:
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + bytes(payload))
    return path


def entry(begin: int, shape: str = "[2]") -> str:
    return f'{{"dtype": "F32", "shape": {shape}, "data_offsets": [{begin}, {begin + 8}]}}'


def test_a_header_longer_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    count = FIRST_READ_BYTES // 50
    tensors = [(f"layer.{i}.weight", "U8", (i % 3,)) for i in range(count)]
    model = write_checkpoint(tmp_path / "model", {}, iter(tensors), num_shards=1)
    file = model / "model-00001-of-00001.safetensors"
    assert struct.unpack("<Q", file.read_bytes()[:8])[0] > FIRST_READ_BYTES
    assert {(t.name, t.dtype, t.shape) for t in read_header(file).values()} == set(tensors)


@pytest.mark.parametrize(
    "text",
    [
        header(("a", entry(0)), ("a", entry(0))),
        header(("a", entry(0)), ("b", entry(8)), ("a", entry(0))),
        '{"a": {"dtype": "F32", "shape": [2], "dtype": "F32", "data_offsets": [0, 8]}}',
        f'{{"\\u0061": {entry(0)}, "a": {entry(0)}}}',
        f'{{"__metadata__": {{"x": "1", "x": "1"}}, "a": {entry(0)}}}',
    ],
)
def test_a_name_given_twice_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UnusableError, match="a name appears twice"):
        read_header(write_text(tmp_path / "x.safetensors", text, 8))


@pytest.mark.parametrize(
    "text",
    [
        header(("a", entry(0))),
        header(("__metadata__", '{"format": "pt", "note": "a \\"quote\\""}'), ("a", entry(0))),
        header(("__metadata__", '{"count": 3}'), ("a", entry(0))),
        header(("__metadata__", "null"), ("a", entry(0))),
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "more": "x"}}',
    ],
)
def test_everything_else_that_a_header_may_say_is_read(tmp_path: Path, text: str) -> None:
    assert [t.shape for t in read_header(write_text(tmp_path / "x.safetensors", text, 8)).values()] == [(2,)]


@pytest.mark.parametrize("shape", ["[true, 2]", "[2.0]", '["2"]', "[-2, -1]"])
def test_a_shape_is_made_of_whole_numbers(tmp_path: Path, shape: str) -> None:
    with pytest.raises(UnusableError, match="of a wrong kind"):
        read_header(write_text(tmp_path / "x.safetensors", header(("a", entry(0, shape))), 8))


def test_the_identity_follows_config_headers_index_and_content(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", {"model_type": "x"}, iter(TENSORS), num_shards=2)
    again = write_checkpoint(tmp_path / "again", {"model_type": "x"}, iter(TENSORS), num_shards=2)
    seen = {Checkpoint.open(model).identity}
    assert Checkpoint.open(again).identity in seen  # the place does not matter

    def changed() -> bool:
        identity = Checkpoint.open(model).identity
        is_new = identity not in seen
        seen.add(identity)
        return is_new

    (model / "config.json").write_text(json.dumps({"model_type": "y"}))
    assert changed()
    shard = model / "model-00001-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"\1")
    assert changed()
    shard.write_bytes(content.replace(b'"BF16"', b'"F16" '))
    assert changed()
    index = model / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"metadata"', '"other"'))
    assert changed()


def test_large_shards_count_as_changed_when_touched_and_hub_shards_by_their_name(tmp_path: Path) -> None:
    large = [("a.weight", "U8", (HASHED_SHARD_BYTES + 1,))]
    model = write_checkpoint(tmp_path / "snapshots" / "revision", {}, iter(large), num_shards=1)
    shard, blob = model / "model-00001-of-00001.safetensors", tmp_path / "blobs" / ("0" * 64)
    first = Checkpoint.open(model).identity
    os.utime(shard, ns=(0, 0))
    assert Checkpoint.open(model).identity != first
    blob.parent.mkdir()
    shard.rename(blob)
    shard.symlink_to(blob)
    linked = Checkpoint.open(model).identity
    os.utime(blob, ns=(1, 1))
    assert Checkpoint.open(model).identity == linked != first
