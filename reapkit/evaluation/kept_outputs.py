"""Writes what models said to disk and reads it back: final hidden states, signals of positions."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reapkit.core.atomic_files import replacing, reserve, sync, write_json
from reapkit.core.json_text import parse_json
from reapkit.evaluation.metrics.signals import PositionSignals

HIDDEN, SIGNALS = "hidden", "signals.safetensors"


def hidden_file(path: Path, positions: int, width: int, dtype: torch.dtype) -> Tensor:
    """`[positions, width]` of `dtype` that lives in a file instead of in memory. Raises OSError where the disk has no
    room for it."""
    reserve(path, positions * width * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=positions * width, dtype=dtype).view(-1, width)


def save_hidden(hidden: Tensor, directory: Path) -> None:
    """Hidden states `[n, width]` of any float dtype as raw numbers, shape and dtype beside them; a file that they live
    in is moved."""
    target, lives_in = directory / f"{HIDDEN}.bin", hidden.untyped_storage().filename
    if lives_in is not None:
        Path(lives_in).replace(target)
    else:
        positions, width = hidden.shape
        hidden_file(target, positions, width, hidden.dtype).copy_(hidden)
        sync(target)
    write_json(directory / f"{HIDDEN}.json", {"shape": list(hidden.shape), "dtype": str(hidden.dtype)})


def load_hidden(directory: Path) -> Tensor:
    """What `save_hidden` wrote, `[n, width]` in its dtype, mapped from its file."""
    facts = parse_json((directory / f"{HIDDEN}.json").read_text(encoding="utf-8"))
    positions, width = facts["shape"]
    dtype = getattr(torch, facts["dtype"].removeprefix("torch."))
    return torch.from_file(str(directory / f"{HIDDEN}.bin"), size=positions * width, dtype=dtype).view(-1, width)


def save_signals(found: PositionSignals, directory: Path) -> None:
    """The signals, each `[n]`, as safetensors under their names."""
    with replacing(directory / SIGNALS) as partial:
        save_file({field.name: getattr(found, field.name).contiguous() for field in fields(PositionSignals)}, partial)


def load_signals(directory: Path) -> PositionSignals:
    """What `save_signals` wrote."""
    return PositionSignals(**load_file(directory / SIGNALS))
