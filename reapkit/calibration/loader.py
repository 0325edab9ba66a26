"""Turns the batches of llm-compressor's data loader into a reapkit calibration."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from reapkit.calibration.tokens import SUMMARY_FILE, TOKENS_FILE, CalibrationTokens
from reapkit.core.atomic_files import write_text
from reapkit.core.errors import UnusableError
from reapkit.core.mapped_safetensors import create_tensors

GROUPS = 32
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


def tokens_of_loader(
    batches: Iterable[Mapping[str, Any]], directory: Path, source: str = "calibration"
) -> CalibrationTokens:
    """Every row of the batches without its padding, in order; every position counts, or those that a `loss_mask` marks.

    A batch holds `input_ids` int64 [batch, tokens] and may hold `attention_mask` (0: padding) and `loss_mask` (the
    position is part of what the model should say) of the same shape. Raises UnusableError where there are no token ids
    or no tokens, or where a row has a hole in it.
    """
    ids: list[np.ndarray] = []
    said: list[np.ndarray] = []
    masked = False
    for batch in batches:
        if "input_ids" not in batch:
            raise UnusableError(
                f"the calibration data has no input_ids (found {', '.join(batch) or 'nothing'}), so the model cannot"
                " be observed on it. Give oneshot a text dataset."
            )
        tokens = batch["input_ids"]
        attention, loss = batch.get("attention_mask"), batch.get("loss_mask")
        masked = masked or loss is not None
        for row in range(len(tokens)):
            real = _positions(attention[row]) if attention is not None else np.arange(tokens.shape[1])
            if len(real):
                ids.append(tokens[row].cpu().numpy()[real])
                said.append(
                    np.ones(len(real), np.uint8)
                    if loss is None
                    else (loss[row].cpu().numpy()[real] != 0).astype(np.uint8)
                )
    if not ids:
        raise UnusableError(
            "the calibration data contains no token. Give oneshot a dataset with num_calibration_samples above 0."
        )
    return _written(ids, said, directory, source, "completion" if masked else "all")


def _positions(mask: Tensor) -> np.ndarray:
    real = np.flatnonzero(mask.cpu().numpy())
    if len(real) and real[-1] - real[0] + 1 != len(real):
        raise UnusableError(
            "a calibration row has padding between its tokens, which is not supported, since positions could not be"
            " numbered. Pad at one end."
        )
    return real


def _written(
    ids: list[np.ndarray], said: list[np.ndarray], directory: Path, source: str, score: str
) -> CalibrationTokens:
    rows, offsets = len(ids), np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    directory.mkdir(parents=True, exist_ok=True)
    file = create_tensors(
        directory / TOKENS_FILE,
        {
            "input_ids": ("int32", int(offsets[-1])),
            "assistant": ("uint8", int(offsets[-1])),
            "row_offsets": ("int64", rows + 1),
            "row_source": ("int16", rows),
            "sample_offsets": ("int64", rows + 1),
            "part_sample": ("int32", rows),
        },
    )
    file["input_ids"][:], file["assistant"][:] = np.concatenate(ids), np.concatenate(said)
    file["row_offsets"][:] = file["sample_offsets"][:] = offsets
    file["row_source"][:], file["part_sample"][:] = 0, np.arange(rows)
    for tensor in file.values():
        tensor.flush()
    groups = min(GROUPS, rows)
    bounds = [rows * number // groups for number in range(groups + 1)]
    snapshots = [max(done for done in range(groups + 1) if bounds[done] <= rows * share) for share in SHARES]
    summary = {
        "sources": [{"name": source}],
        "score": score,
        "packing": "none",
        "groups": bounds,
        "snapshots": snapshots,
    }
    write_text(directory / SUMMARY_FILE, json.dumps(summary))
    return CalibrationTokens.load(directory)
