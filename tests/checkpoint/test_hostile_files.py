"""Broken and forged headers and indexes end in an error that names the file, or are read as what they say; nothing else
happens."""

from __future__ import annotations

import json
import random
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import ReapkitError, UnusableError
from reapkit.pruning.checkpoint import prune_checkpoint
from reapkit.selection.selection import LayerSelection, Selection

NAMES = [f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in range(4)] + [
    "model.layers.0.mlp.gate.weight",
    "lm_head.weight",
]
ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**63,
    2**70,
    1.5,
    "",
    "x",
    "BF16",
    "../x",
    "/etc/passwd",
    "\0",
    "\ud800",
    [],
    [0],
    [0, 8],
    [8, 0],
    [-8, 0],
    {},
    {"a": 1},
    [2**40, 2**40],
    "experts.7.",
    "model.layers.0.mlp.experts.007.up_proj.weight",
    "٣",
]


def good_header() -> dict:
    return {
        "__metadata__": {"format": "pt"},
        **{
            name: {"dtype": "F32", "shape": [4, 2], "data_offsets": [32 * i, 32 * i + 32]}
            for i, name in enumerate(NAMES)
        },
    }


def write(path: Path, header: bytes, payload: bytes, length: int | None = None) -> None:
    (path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header) if length is None else length) + header + payload
    )


@pytest.fixture
def directory(tmp_path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps(
            {"model_type": "m", "num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 2}
        )
    )
    (path / "secret.safetensors").write_text("not to be read")
    return path


def mutated(value: object, draw: random.Random) -> object:
    """The same JSON with one part replaced, removed, doubled or renamed."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.15:
        return draw.choice(ODD)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, copy = draw.choice(list(keys)), (dict(value) if isinstance(value, dict) else list(value))
    action = draw.randrange(4)
    if action == 0:
        del copy[key]
    elif action == 1 and isinstance(copy, dict):
        name = draw.choice([odd for odd in ODD if isinstance(odd, str)])
        copy[name] = copy.pop(key)
    else:
        copy[key] = mutated(value[key], draw)
    return copy


def attempt(directory: Path, out: Path) -> bool:
    """Opens and prunes; True if it worked. Anything but an error meant for users escapes and fails the test, and so
    does a file that appears, changes or goes anywhere but in `out`, or an attempt that does not end."""
    before = everything_but(out)
    with deadline(20):
        try:
            source = Checkpoint.open(directory)
            layers = {
                index: LayerSelection(tuple(range(layer.num_experts - 1)), (), ())
                for index, layer in source.layout.layers.items()
            }
            prune_checkpoint(source, Selection("x", layers), out)
            Checkpoint.open(out)
            return True
        except ReapkitError:
            return False
        finally:
            assert everything_but(out) == before


def everything_but(out: Path) -> dict[Path, bytes]:
    """The files around `out` that an attempt could reach; the results of other attempts are known by their names
    alone."""
    around = [path for path in out.parent.rglob("*") if path.is_file() and out not in path.parents]
    return {path: b"" if "source" not in path.parts else path.read_bytes() for path in around}


class Hang(BaseException):
    """Not an OSError as TimeoutError is: those are turned into errors for users."""


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """What takes longer is interrupted and fails."""

    def late(*_: object) -> None:
        raise Hang(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def seeds(count: int, quick: int = 2) -> list[object]:
    """The first few always, the others with the long tests."""
    return [seed if seed < quick else pytest.param(seed, marks=pytest.mark.long) for seed in range(count)]


@pytest.mark.parametrize("seed", seeds(10))
def test_forged_headers(directory, tmp_path, seed):
    draw, worked = random.Random(seed), 0
    payload = bytes(range(192))
    for case in range(120):
        header: object = good_header()
        for _ in range(draw.randrange(1, 4)):
            header = mutated(header, draw)
        write(directory, json.dumps(header).encode(), payload)
        worked += attempt(directory, tmp_path / f"out{case}")
    assert worked < 120 and sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("out")) == [
        "source"
    ]


@pytest.mark.parametrize("seed", seeds(10))
def test_damaged_bytes(directory, tmp_path, seed):
    draw = random.Random(seed)
    whole = json.dumps(good_header()).encode()
    for case in range(100):
        header = bytearray(whole)
        for _ in range(draw.randrange(1, 5)):
            header[draw.randrange(len(header))] = draw.randrange(256)
        cut = bytes(header[: draw.randrange(len(header))]) if draw.random() < 0.2 else bytes(header)
        length = draw.choice([None, None, 0, 1, 7, len(whole) + 1, 2**31, 2**63 - 1, 2**64 - 1])
        write(directory, cut, bytes(192 if draw.random() < 0.8 else draw.randrange(300)), length)
        attempt(directory, tmp_path / f"out{case}")


@pytest.mark.parametrize("seed", seeds(5))
def test_forged_indexes(directory, tmp_path, seed):
    draw = random.Random(seed)
    write(directory, json.dumps(good_header()).encode(), bytes(192))
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    for case in range(100):
        index: object = {"metadata": {"total_size": 192}, "weight_map": dict.fromkeys(NAMES, "weights.safetensors")}
        for _ in range(draw.randrange(1, 4)):
            index = mutated(index, draw)
        text = json.dumps(index)
        (directory / "model.safetensors.index.json").write_text(
            text[: draw.randrange(len(text))] if draw.random() < 0.2 else text
        )
        attempt(directory, tmp_path / f"out{case}")


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", 7, None, "a\0b", "9" * 5000]
)
def test_an_index_reaches_no_file_outside_the_directory(directory, shard):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UnusableError, match="which is not a file of this directory"):
        Checkpoint.open(directory)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 0]}}',
        b'{"a": 1, "a": 2}',
        b"\xff\xfe",
        b"null",
    ],
)
def test_headers_that_break_parsers(directory, text):
    write(directory, text, b"")
    with pytest.raises(UnusableError, match="the header is not a valid safetensors header"):
        Checkpoint.open(directory)


def test_beside_the_single_file_other_files_and_an_index_are_not_read(directory):
    (directory / "secret.safetensors").unlink()
    write(directory, json.dumps(good_header()).encode(), bytes(192))
    (directory / "other.safetensors").write_bytes(b"no safetensors file")
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(NAMES, "other.safetensors")})
    )
    assert Checkpoint.open(directory).shards == ("model.safetensors",)
