"""Model directories of published checkpoints from their public facts: real headers, holes for weights.

    name: "model.layers.{0..91}.self_attn.{k,v}_proj.weight", its value: [dtype, *shape]

Braces list words, numbers, ranges `a..b` (both ends) and `a..b..step`. The weights are holes in sparse files: a
terabyte of checkpoint costs its headers.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import yaml

from reapkit.core.dtypes import BITS
from tests.support.paths import TESTS

FACTS = TESTS / "published"
NAMES = tuple(sorted(path.stem for path in FACTS.glob("*.yaml")))

Shape = tuple[int, ...]


@cache
def facts(name: str) -> dict[str, Any]:
    """Config, tensor templates and published counts of one model."""
    return yaml.load((FACTS / f"{name}.yaml").read_text(), yaml.CSafeLoader)


def expand(templates: Mapping[str, list]) -> Iterator[tuple[str, str, Shape]]:
    """Name, dtype and shape of every tensor, in the order of the templates."""
    for template, (dtype, *shape) in templates.items():
        parts = re.split(r"\{([^}]*)\}", template)
        choices = [(part,) if i % 2 == 0 else tuple(_choices(part)) for i, part in enumerate(parts)]
        for chosen in product(*choices):
            yield "".join(chosen), dtype, tuple(shape)


def _choices(text: str) -> Iterator[str]:
    for item in text.split(","):
        first, *rest = item.split("..")
        if not rest:
            yield first
            continue
        last, step = int(rest[0]), int(rest[1]) if len(rest) > 1 else 1
        yield from map(str, range(int(first), last + 1, step))


def stored_numbers(name: str) -> int:
    """Every stored number, as the hub counts them: two per byte of MXFP4 blocks, scales of any format as they are."""
    return sum(
        prod(shape) * (2 if tensor.endswith("_blocks") else 1) for tensor, _, shape in expand(facts(name)["tensors"])
    )


def write(name: str, directory: Path, *, max_shard_bytes: int = 5_000_000_000) -> Path:
    """The model directory of one set of facts; `Checkpoint.open` accepts it."""
    return write_checkpoint(
        directory, facts(name)["config"], expand(facts(name)["tensors"]), max_shard_bytes=max_shard_bytes
    )


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Iterator[tuple[str, str, Shape]],
    *,
    max_shard_bytes: int | None = None,
    num_shards: int | None = None,
) -> Path:
    """config.json, index and sparse shards: filled up to a size, or that many with equally many tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    sized = [(name, dtype, shape, prod(shape) * BITS[dtype] // 8) for name, dtype, shape in tensors]
    shards = _by_count(sized, num_shards) if num_shards else _by_size(sized, max_shard_bytes)
    index: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / file, members)
        index |= {name: file for name, *_ in members}
    total = sum(nbytes for *_, nbytes in sized)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def _by_size(sized: list, max_shard_bytes: int) -> list[list]:
    shards, filled = [[]], 0
    for member in sized:
        if shards[-1] and filled + member[3] > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(member)
        filled += member[3]
    return shards


def _by_count(sized: list, num_shards: int) -> list[list]:
    each = len(sized) / num_shards
    return [sized[round(i * each) : round((i + 1) * each)] for i in range(num_shards)]


def _write_shard(path: Path, members: list) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, nbytes in members:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + position)
