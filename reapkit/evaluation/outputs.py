"""Computes a model's outputs at the measured positions of a pack: stores the base's once, and compares every
candidate's with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reapkit.calibration.tokens import CalibrationTokens, batches
from reapkit.core.atomic_files import sync, write_text
from reapkit.core.errors import StageFailed, UnusableError
from reapkit.core.hashing import digest
from reapkit.core.progress import SILENT, Progress
from reapkit.evaluation.head import (
    check_head,
    chunk_positions,
    embedding_weights,
    has_embeddings,
    hidden_states,
    logits,
    output_embeddings,
)
from reapkit.evaluation.kept_outputs import hidden_file
from reapkit.evaluation.metrics import rows, signals
from reapkit.evaluation.metrics.rows import RowIndex
from reapkit.evaluation.metrics.signals import PositionSignals

Head = Callable[[], AbstractContextManager]
EAFT = {"p_low": "0.15", "h_low": "0.15", "thresholds": "pooled", "top_k": 20}
"""Where confident conflict begins, unless a recipe says otherwise."""


@dataclass(frozen=True, eq=False)
class Pack:
    """Rows of one length, measured together; `outside` names sources that are not part of the calibration mix."""

    tokens: CalibrationTokens
    rows: tuple[int, ...]
    length: int
    outside: frozenset[str] = frozenset()

    @classmethod
    def part(cls, tokens: CalibrationTokens, part: str, length: int) -> Pack:
        """The rows of a prepared pack's part: "decide" or "confirm"; its extra packs are outside."""
        return cls(tokens, tuple(tokens.rows(part)), length, frozenset(tokens.summary.get("extra", ())))

    @cached_property
    def index(self) -> RowIndex:
        measured = [0, *(int(self.tokens.row(row).signal.sum()) for row in self.rows)]
        source = torch.tensor([int(self.tokens.row_source[row]) for row in self.rows], dtype=torch.int64)
        return RowIndex(torch.tensor(measured).cumsum(0), source, self.tokens.sources, self.outside)

    @cached_property
    def reference(self) -> Tensor:
        """The token that follows each measured position, int64 `[n]`."""
        return torch.cat([_reference(self.tokens.row(row)) for row in self.rows])

    @property
    def num_positions(self) -> int:
        return int(self.index.offsets[-1])

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.row_lengths[list(self.rows)].sum())


@dataclass(frozen=True, eq=False)
class BaseOutputs:
    """What others are compared with at a pack's measured positions: the base's final hidden states `[n, hidden]` (in
    memory or mapped from disk), reference tokens `[n]` int64, and the output embeddings that turn the hidden states
    into logits."""

    hidden: Tensor
    reference: Tensor
    embeddings: dict[str, Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel, pack: Pack, hidden: Tensor) -> BaseOutputs:
        """Of the base's own hidden states `[n, hidden]`, in its dtype, by its own output embeddings."""
        return cls(hidden, pack.reference, embedding_weights(model))


@torch.no_grad()
def base_hidden(
    model: PreTrainedModel,
    pack: Pack,
    *,
    batch_tokens: int,
    work_directory: Path | None = None,
    progress: Progress = SILENT,
) -> Tensor:
    """The base's final hidden states `[n, hidden]`, in its dtype, at the pack's measured positions. With a
    `work_directory` they live in a file there, and a killed run goes on where it was.

    Raises UnusableError where the pack measures nothing, or where the model's logits are not a function of its hidden
    states.
    """
    if pack.num_positions == 0:
        raise UnusableError(
            f"evaluate: the pack of {pack.length} tokens measures no position: its {len(pack.rows)} rows hold no"
            " scored token. Raise evaluate.packs.samples."
        )
    check_head(model, pack.tokens.row(pack.rows[0]).input_ids)
    return _kept_hidden(model, pack, batch_tokens, work_directory, progress)


@torch.no_grad()
def describe_hidden(model: PreTrainedModel, pack: Pack, hidden: Tensor, top_k: int = 20) -> PositionSignals:
    """The base's signals `[n]`, on the CPU, from its final hidden states `[n, hidden]`, in its dtype, at the pack's
    measured positions."""
    reference, step = pack.reference, chunk_positions(model)
    described = [
        _to_cpu(
            signals.describe(
                found := logits(model, hidden[at : at + step]), reference[at : at + step].to(found.device), top_k=top_k
            )
        )
        for at in range(0, len(reference), step)
    ]
    return PositionSignals.concatenate(described)


def base_head(model: PreTrainedModel, base: BaseOutputs) -> Head:
    """A context in which `model` has the base's output embeddings; compared once, because they may be large."""
    return nullcontext if has_embeddings(model, base.embeddings) else partial(output_embeddings, model, base.embeddings)


@torch.no_grad()
def compare_hidden(
    model: PreTrainedModel, hidden: Tensor, base: BaseOutputs, start: int, head: Head, top_k: int = 20
) -> PositionSignals:
    """The signals `[n]` of `model`'s final hidden states `[n, hidden]`, in its dtype, which belong to the base's
    positions from `start` on.

    `head` comes from `base_head`. The signals lie on the CPU.
    """
    step, parts = chunk_positions(model), []
    for at in range(0, len(hidden), step):
        of_base = slice(start + at, start + min(at + step, len(hidden)))
        found = logits(model, hidden[at : at + step])
        with head():
            expected = logits(model, base.hidden[of_base])
        parts.append(
            _to_cpu(signals.describe(found, base.reference[of_base].to(found.device), expected.to(found.device), top_k))
        )
    return PositionSignals.concatenate(parts)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    pack: Pack,
    base: BaseOutputs,
    *,
    batch_tokens: int,
    top_k: int = 20,
    title: str = "evaluate",
    progress: Progress = SILENT,
) -> PositionSignals:
    """What `model` (masked, or loaded from a directory) says at the pack's `n` measured positions, compared with the
    base: signals `[n]` on the CPU.

    Raises StageFailed where its logits are not finite.
    """
    parts, done, head = [], 0, base_head(model, base)
    with progress.task(f"{title}, {pack.length} tokens", total=pack.num_positions, unit="positions") as task:
        for hidden in _hidden(model, pack, batch_tokens):
            if len(hidden):
                parts.append(compare_hidden(model, hidden, base, done, head, top_k))
            done += len(hidden)
            task.advance(len(hidden))
    return refuse_broken(PositionSignals.concatenate(parts), title)


def refuse_broken(found: PositionSignals, title: str) -> PositionSignals:
    """`found` itself. Raises StageFailed where it holds numbers that are not finite."""
    if broken := int((~found.nll.isfinite() | ~found.kl.isfinite()).sum()):
        raise StageFailed(
            f"{title}: {broken} of {len(found)} measured positions have logits that are not finite, so nothing can be "
            "said of this model. Weights that overflow in float16 need bfloat16 or float32."
        )
    return found


def describe_base(base: PositionSignals, pack: Pack, eaft: Mapping[str, Any] = EAFT) -> dict[str, Any]:
    """The base's own numbers per group: `all` and each source (`rows.summarize_base`)."""
    return rows.summarize_base(base, pack.index, rows.regions(base, pack.index, eaft))


def compare(
    base: PositionSignals, candidate: PositionSignals, pack: Pack, eaft: Mapping[str, Any] = EAFT
) -> dict[str, Any]:
    """The candidate's numbers and distances per group, with paired intervals (`rows.summarize_candidate`)."""
    own, of_base = (rows.regions(positions, pack.index, eaft) for positions in (candidate, base))
    return rows.summarize_candidate(base, candidate, pack.index, of_base, own)


def _reference(row: Any) -> Tensor:
    return row.input_ids.roll(-1)[row.signal]


def _to_cpu(positions: PositionSignals) -> PositionSignals:
    return PositionSignals(**{field.name: getattr(positions, field.name).cpu() for field in fields(PositionSignals)})


def _hidden(model: PreTrainedModel, pack: Pack, batch_tokens: int, skip_batches: int = 0) -> Iterator[Tensor]:
    """Per batch the final hidden states `[n, hidden]` of its measured positions, rows in order."""
    for number, batch in enumerate(batches(pack.tokens, pack.rows, batch_tokens)):
        if number >= skip_batches:
            found = hidden_states(model, batch.input_ids, batch.position_ids)
            yield found[batch.signal.to(found.device)]


def _kept_hidden(
    model: PreTrainedModel, pack: Pack, batch_tokens: int, work_directory: Path | None, progress: Progress
) -> Tensor:
    with progress.task(f"evaluate base, {pack.length} tokens", total=pack.num_positions, unit="positions") as task:
        if work_directory is not None:
            return _hidden_on_disk(model, pack, batch_tokens, work_directory, task)
        parts = []
        for hidden in _hidden(model, pack, batch_tokens):
            parts.append(hidden.cpu())
            task.advance(len(hidden))
    return torch.cat(parts)


def _hidden_on_disk(model: PreTrainedModel, pack: Pack, batch_tokens: int, directory: Path, task: Any) -> Tensor:
    """A memory-mapped file that is filled batch by batch; `.json` beside it says how many batches and positions it
    holds."""
    probe = hidden_states(model, pack.tokens.row(pack.rows[0]).input_ids[:1].unsqueeze(0))
    width, dtype = probe.shape[-1], probe.dtype
    identity = {
        "rows": pack.rows,
        "length": pack.length,
        "batch_tokens": batch_tokens,
        "width": width,
        "dtype": str(dtype),
    }
    path = directory / f"base-{pack.length}-{digest(identity)[:12]}.bin"
    state = path.with_suffix(".json")
    directory.mkdir(parents=True, exist_ok=True)
    finished = (
        json.loads(state.read_text(encoding="utf-8"))
        if state.is_file() and path.is_file()
        else {"batches": 0, "positions": 0}
    )
    mapped = hidden_file(path, pack.num_positions, width, dtype)
    task.advance(finished["positions"])
    for hidden in _hidden(model, pack, batch_tokens, finished["batches"]):
        at = finished["positions"]
        mapped[at : at + len(hidden)] = hidden.cpu()
        finished = {"batches": finished["batches"] + 1, "positions": at + len(hidden)}
        sync(path)
        write_text(state, json.dumps(finished))
        task.advance(len(hidden))
    return mapped
