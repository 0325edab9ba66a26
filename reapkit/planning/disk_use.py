"""The units in which disk space is planned: what a stage puts where, and the rows of tokens that decide how much.
From config and headers alone; torch-free.

Every file counts a block more than its bytes, as file systems give room.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from reapkit.calibration.packing import GROUP_TOKENS, MIN_GROUPS
from reapkit.checkpoint.architecture import hidden_width, text_config

if TYPE_CHECKING:
    from reapkit.planning.plan import Plan

STORE, RUN, OFFLOAD, HUB, TEMPORARY = (
    "runtime.store", "output.directory", "runtime.offload_directory", "HF_HUB_CACHE", "TMPDIR"
)  # fmt: skip
"""The places that a run writes to, by the setting that moves each."""
BLOCK_BYTES = 4096
SPLIT_ROWS = 4
"""Rows that a sample is counted as where longer ones are split into several."""
LEAST_TOKENS = 16
"""Tokens that a sample is counted as where the recipe counts tokens, not samples."""
TOKEN_BYTES = 4 + 1


@dataclass(frozen=True)
class DiskUse:
    """What a stage puts in one place, in bytes: `kept` stays, `meanwhile` is gone once the stage ends.

    `linked` and `copied`: what of it the run's directory shows, as links of safetensors (copies where the file systems
    differ) and as copies. `is_exact`: not counted from above, but for headers and small files.
    """

    place: str
    kept: int = 0
    meanwhile: int = 0
    linked: int = 0
    copied: int = 0
    is_exact: bool = False


def in_blocks(nbytes: int) -> int:
    """Bytes that one file takes on disk."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


def on_disk(nbytes: float, files: int = 1) -> int:
    """Bytes that so many files of together `nbytes` take at most."""
    return ceil(nbytes) + files * BLOCK_BYTES


# ---------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class TokenRows:
    """A calibration or pack before it is made, from above, or as it is: tokens, rows, samples, row groups, and
    positions that count."""

    tokens: int
    rows: int
    samples: int
    groups: int
    signals: int
    is_exact: bool = False

    @property
    def file_bytes(self) -> int:
        """tokens.safetensors."""
        return self.tokens * TOKEN_BYTES + self.rows * (8 + 2 + 1) + (self.rows + self.samples) * (8 + 4) + 4096


def _expected(samples: int, length: int, sources: int, overflow: str, tokens: int | None = None) -> TokenRows:
    if tokens is None:
        tokens = samples * (length + 1) * (SPLIT_ROWS if overflow == "split" else 1)
    else:
        samples = tokens // LEAST_TOKENS
    rows = max(samples, tokens // length) + sources
    groups = min(rows, MIN_GROUPS + tokens // max(1, GROUP_TOKENS - length) + 1)
    return TokenRows(tokens, rows, samples, groups, tokens)


def _prepared(directory: Path) -> TokenRows:
    told = json.loads((directory / "calibration.json").read_text(encoding="utf-8"))
    samples = sum(source["samples"] for source in told["sources"])
    return TokenRows(
        told["tokens"], told["rows"], samples, len(told["groups"]) - 1, told["signal_tokens"], is_exact=True
    )


def calibration_rows(plan: Plan) -> TokenRows:
    """The calibration's rows: as they are once it is prepared, else from above."""
    made, spec = plan.stage("calibrate").artifact, plan.recipe.calibration
    if made is not None and made.has_payload:
        return _prepared(made.payload)
    return _expected(spec.samples or 0, spec.max_length, len(spec.mix), spec.overflow, spec.tokens)


def pack_rows(plan: Plan) -> dict[int, TokenRows]:
    """The held-out rows, by their length."""
    made, evaluate = plan.stage("packs").artifact, plan.recipe.evaluate
    if made is not None and made.has_payload:
        return {length: _prepared(made.payload / str(length)) for length in evaluate.packs.lengths}
    mix, extra = len(plan.recipe.calibration.mix), len(evaluate.extra_packs)
    samples = ceil(evaluate.packs.samples * (mix + extra) / mix) + extra
    overflow = plan.recipe.calibration.overflow
    return {length: _expected(samples, length, mix + extra, overflow) for length in evaluate.packs.lengths}


def streams(plan: Plan) -> bool:
    """Whether layers go through memory one at a time."""
    return plan.estimates.placement == "streaming"


def offloads(plan: Plan) -> bool:
    """Whether the recipe names a directory for what waits."""
    return plan.recipe.runtime.offload_directory is not None


def hidden_itemsize(plan: Plan) -> int:
    """Bytes per number of the hidden states: those of the dtype that the config names, or that most weights have."""
    text = text_config(plan.checkpoint.config)
    named = text.get("dtype") or text.get("torch_dtype") or plan.checkpoint.config.get("torch_dtype")
    if named is None:
        largest = max(plan.checkpoint.tensors.values(), key=lambda tensor: tensor.nbytes)
        return 4 if largest.dtype == "F32" else 2
    return 4 if "float32" in str(named) else 2


def hidden_bytes(plan: Plan, positions: int) -> int:
    """Bytes of one hidden state at each of so many positions."""
    return positions * hidden_width(text_config(plan.checkpoint.config)) * hidden_itemsize(plan)
