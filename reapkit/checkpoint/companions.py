"""Says which files of a model directory travel with its weights, and which are other weights of it. Torch-free.

What the loader does not read and yet holds weights of the model (its files in another format or precision, stale ones,
an adapter for it) would keep the experts that are dropped: it is named and left out. Everything else travels:
tokenizer, templates, processor, video and audio configs, code, licences, weights of other models that it brings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.projection_names import expert_modules
from reapkit.checkpoint.weight_files import OTHER_FORMATS, is_stray
from reapkit.core.errors import UnusableError
from reapkit.core.formatting import listed
from reapkit.core.safetensors_header import read_header

UNFINISHED = (".incomplete", ".lock", ".partial")
OF_OTHER_FORMATS = ("original", "metal", "onnx", "gguf")
"""Folders in which models are published in other formats."""


def companions(source: Checkpoint, written: Collection[str] = ()) -> tuple[list[str], tuple[str, ...]]:
    """(files that travel, strays to leave out), relative to the source and in the order of their names.

    `written`: files that whoever asks writes itself. A folder that holds weights of this model is left out whole, and
    named with a slash behind it.
    """
    read = {*source.shards, *source.weights.shards, source.weights.index}
    copies: list[str] = []
    strays: list[str] = []
    for directory, folders, files in os.walk(source.path):
        folder = Path(directory).relative_to(source.path).as_posix()
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        names = [
            name if folder == "." else f"{folder}/{name}" for name in sorted(files) if not name.endswith(UNFINISHED)
        ]
        if folder != "." and _holds_this_model(source, [name for name in names if name.endswith(".safetensors")]):
            folders.clear()
            strays.append(f"{folder}/")
            continue
        for name in names:
            if name in written or name in read or not _is_file(source, name):
                continue
            (strays if _is_stray(name, folder) else copies).append(name)
    return copies, tuple(strays)


def stray_note(strays: Collection[str]) -> list[str]:
    """What the user should hear of them, before anything runs."""
    if not strays:
        return []
    return [
        f"Not read by the loader, and left out of what is written: {listed(strays)}. They hold weights of the model"
        " beside those that transformers takes."
    ]


def unheld_note(source: Checkpoint) -> list[str]:
    """What the user should hear of an index that names more than there is."""
    if not source.unheld:
        return []
    return [
        f"{source.weights.index} names {len(source.unheld)} tensors that no shard holds, such as {source.unheld[0]}."
        " transformers does not look for them; where the model needs one, it is refused before a token runs."
    ]


def _is_file(source: Checkpoint, name: str) -> bool:
    return (source.path / name).is_file()


def _is_stray(name: str, folder: str) -> bool:
    if folder == ".":
        return is_stray(name, (), None)
    if folder.split("/")[0] in OF_OTHER_FORMATS and name.endswith(".safetensors"):
        return True
    return name.endswith(OTHER_FORMATS) or (".bin.index" in name and name.endswith(".json"))


def _holds_this_model(source: Checkpoint, files: Collection[str]) -> bool:
    """Whether one of them has a tensor of the model's, or one of its experts'."""
    expert = re.compile(rf"\.(?:{'|'.join(map(re.escape, expert_modules()))})\.")
    for name in files:
        try:
            found = read_header(source.path / name)
        except (UnusableError, OSError):
            continue  # no safetensors file, so none of the model's
        if any(tensor in source.tensors or expert.search(tensor) for tensor in found):
            return True
    return False
