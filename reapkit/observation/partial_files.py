"""Tensors of an unfinished observation on disk, with the sha256 of their bytes: what was damaged is not added up."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reapkit.core.atomic_files import replacing
from reapkit.core.errors import StageFailed

PIECE = 1 << 24
"""Bytes that are hashed at once."""


def save_partial(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes tensors of any shape and dtype to a safetensors file."""
    held = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(held, file, {"sha256": _sha256(held)})


def save_by_rename(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes tensors of any shape and dtype by another name first: a file that exists is complete, and outlives a power
    cut."""
    with replacing(file) as partial:
        save_partial(tensors, partial)


def load_partial(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of such a file, of any shape and dtype, in memory of their own. A file of an earlier reapkit has no
    sha256.

    Raises StageFailed where they have other bytes than were written.
    """
    try:
        with safe_open(file, "pt") as opened:
            stated = (opened.metadata() or {}).get("sha256")
            held = {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise _damaged(file) from error
    if stated is not None and stated != _sha256(held):
        raise _damaged(file)
    return {name: tensor.to(device) for name, tensor in held.items()}


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Over names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for piece in tensor.reshape(-1).view(torch.uint8).split(PIECE):
            sha.update(piece.clone().numpy().data)  # memory that numpy has seen can no longer be freed and taken back
    return sha.hexdigest()


def _damaged(file: Path) -> StageFailed:
    work = next((parent for parent in file.parents if parent.name == "work"), file.parent)
    return StageFailed(
        f"{file}: this part of an unfinished observation has other bytes than were written. Delete {work} and run the"
        " same command again; the observation begins anew."
    )
