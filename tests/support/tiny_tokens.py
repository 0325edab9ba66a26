"""Small calibrations written straight to disk, without datasets or a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from reapkit.calibration.tokens import SUMMARY_FILE, TOKENS_FILE, CalibrationTokens
from reapkit.core.mapped_safetensors import create_tensors


def tiny_tokens(
    path: Path,
    *,
    sources: Sequence[str] = ("code", "prose"),
    lengths: Sequence[int] = (24, 17, 1, 20, 9, 24, 13, 22),
    groups: int = 4,
    score: str = "completion",
    vocabulary: int = 256,
    seed: int = 0,
) -> CalibrationTokens:
    """Random rows of the given lengths, sources in turn, two samples per row where it is long enough, every third token
    not assistant's.

    Row groups are as even as they come, and the snapshots are those that the groups allow.
    """
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, vocabulary, (length,), generator=draw).numpy() for length in lengths]
    assistant = [(np.arange(length) % 3 != 0).astype(np.uint8) for length in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    boundaries = sorted(
        {int(start) for start in offsets}
        | {int(start + length // 2) for start, length in zip(offsets[:-1], lengths, strict=True) if length > 8}
    )
    shapes = {
        "input_ids": ("int32", int(offsets[-1])),
        "assistant": ("uint8", int(offsets[-1])),
        "row_offsets": ("int64", len(offsets)),
        "row_source": ("int16", len(lengths)),
        "sample_offsets": ("int64", len(boundaries)),
        "part_sample": ("int32", len(boundaries) - 1),
    }
    path.mkdir(parents=True, exist_ok=True)
    file = create_tensors(path / TOKENS_FILE, shapes)
    file["input_ids"][:] = np.concatenate(ids)
    file["assistant"][:] = np.concatenate(assistant)
    file["row_offsets"][:] = offsets
    file["row_source"][:] = np.arange(len(lengths)) % len(sources)
    file["sample_offsets"][:] = boundaries
    file["part_sample"][:] = np.arange(len(boundaries) - 1)
    bounds = [len(lengths) * number // groups for number in range(groups + 1)]
    snapshots = [
        max(done for done in range(groups + 1) if bounds[done] <= len(lengths) * share)
        for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    ]
    summary = {
        "sources": [{"name": name} for name in sources],
        "score": score,
        "packing": "none",
        "groups": bounds,
        "snapshots": snapshots,
    }
    (path / SUMMARY_FILE).write_text(json.dumps(summary))
    for tensor in file.values():
        if isinstance(tensor, np.memmap):
            tensor.flush()
    return CalibrationTokens.load(path)
