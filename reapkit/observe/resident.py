"""Observation of a model that is in memory, on one device or spread over several."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from reapkit.calibration.tokens import CalibrationTokens, batches
from reapkit.models import final_hidden
from reapkit.observation import Observation
from reapkit.observe.accumulate import GroupSums
from reapkit.observe.experts import intercepted
from reapkit.observe.partials import Partials
from reapkit.observe.session import BatchWatch, Session
from reapkit.progress import SILENT, Progress
from reapkit.recipe.schema import ObserveSpec


@torch.no_grad()
def observe(
    model: nn.Module,
    tokens: CalibrationTokens,
    spec: ObserveSpec,
    *,
    batch_tokens: int,
    work_directory: Path,
    identity: str | None = None,
    progress: Progress = SILENT,
) -> Observation:
    """The observation of `model` over `tokens`; killed and run again with the same arguments, it continues to the same bytes.

    Row groups' partial sums live under `work_directory` (the trace of the result too, so keep it until the result is saved).
    `identity` names the checkpoint. Raises UnusableError where experts cannot be watched or put out NaN or infinity.
    """
    device = model.get_input_embeddings().weight.device
    session = Session.open(
        model,
        tokens,
        spec,
        batch_tokens=batch_tokens,
        work_directory=work_directory,
        identity=identity,
        placement="resident",
        device=device,
    )
    partials = Partials(session.directory)
    todo = [group for group in range(len(tokens.groups)) if not partials.has(group)]
    with progress.task(
        "observe", total=sum(int(tokens.row_lengths[row]) for group in todo for row in tokens.groups[group]), unit="tokens"
    ) as task:
        for group in todo:
            sums, at = GroupSums(session.sites, len(tokens.sources)), session.trace_start[group] if spec.eaft else 0
            for batch in batches(tokens, tokens.groups[group], batch_tokens):
                watch = BatchWatch(session, batch, sums.add, at)
                _observe_batch(model, watch, device)
                sums.count_tokens(batch)
                at += watch.num_signals
                task.advance(int(batch.lengths.sum()))
            partials.write(group, sums.tensors())
    return session.observation(*partials.total(range(len(tokens.groups)), tokens.snapshots))


def _observe_batch(model: nn.Module, watch: BatchWatch, device: torch.device) -> None:
    positions = None if watch.batch.position_ids is None else watch.batch.position_ids.to(device)
    with intercepted(watch.session.sites, watch):
        hidden = final_hidden(model, watch.batch.input_ids.to(device), positions)
    if watch.session.trace is not None:
        for site in watch.session.sites:
            watch.write_routed(site.layer)
        watch.finish(model, hidden)
