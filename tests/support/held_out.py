"""Small packs written straight to disk: rows with a part each, some of a source outside the mix."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from reapkit.calibration.tokens import SUMMARY_FILE, TOKENS_FILE, CalibrationTokens
from reapkit.core.mapped_safetensors import create_tensors, map_tensors
from tests.support.tiny_tokens import tiny_tokens

LENGTHS = (24, 17, 20, 20, 9, 24, 13, 22, 18, 24, 16, 23, 21, 19, 24, 15, 1, 24)


def held_out(
    path: Path,
    *,
    sources: tuple[str, ...] = ("code", "prose", "french"),
    extra: tuple[str, ...] = ("french",),
    lengths: tuple[int, ...] = LENGTHS,
    parts: str = "alternating",
    **settings,
) -> CalibrationTokens:
    """Rows of the sources in turn; every other row of a source confirms, or none with `parts="decide"`."""
    tiny_tokens(path, sources=sources, lengths=lengths, **settings)
    old = {name: np.array(tensor) for name, tensor in map_tensors(path / TOKENS_FILE).items()}
    old["row_part"] = (np.arange(len(lengths)) // len(sources) % 2 * (parts == "alternating")).astype(np.uint8)
    (path / TOKENS_FILE).unlink()
    file = create_tensors(path / TOKENS_FILE, {name: (str(tensor.dtype), len(tensor)) for name, tensor in old.items()})
    for name, tensor in old.items():
        file[name][:] = tensor
        if isinstance(file[name], np.memmap):
            file[name].flush()
    summary = json.loads((path / SUMMARY_FILE).read_text())
    (path / SUMMARY_FILE).write_text(json.dumps(summary | {"kind": "packs", "extra": list(extra)}))
    return CalibrationTokens.load(path)
