"""Observes a model that is in memory, on one device or spread over several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from numpy import ndarray
from torch import Tensor
from transformers import PreTrainedModel

from reapkit.calibration.tokens import CalibrationTokens, batches
from reapkit.core.progress import SILENT, Progress, Task
from reapkit.core.ranks import ALONE, Alone
from reapkit.model.causal_lm import input_weight
from reapkit.model.expert_calls import intercepted
from reapkit.model.expert_pairs import observed_forward
from reapkit.model.loading import final_hidden
from reapkit.model.routed_experts import Experts, RoutedExperts, find_experts
from reapkit.observation.accumulate import GroupSums
from reapkit.observation.eaft_cells import PILOT_POSITIONS
from reapkit.observation.group_sums import Partials
from reapkit.observation.mtp_blocks import MtpBlocks
from reapkit.observation.observation import Observation
from reapkit.observation.session import BatchWatch, Session
from reapkit.recipe.schema import ObserveSpec


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    tokens: CalibrationTokens,
    spec: ObserveSpec,
    *,
    batch_tokens: int,
    work_directory: Path,
    identity: str | None = None,
    progress: Progress = SILENT,
    ranks: Alone = ALONE,
    mtp: Sequence[int] = (),
) -> Observation | None:
    """The observation of `model` over `tokens`; killed and run again with the same arguments, it continues to the same
    bytes.

    Row groups' partial sums live under `work_directory` (the trace of the result too, so keep it until the result is
    saved). `identity` names the checkpoint. `mtp`: multi-token-prediction layers of its files that are observed too.
    With several `ranks` each calls this with its own copy of the model; a row group is summed by whoever comes first,
    and rank 0 returns the sum of all in group order, the others None. Raises UnusableError where experts cannot be
    watched or put out NaN or infinity.
    """
    device = input_weight(model).device
    blocks = MtpBlocks(model, mtp, next(find_experts(model)[-1].module.parameters()).device) if mtp else None
    session = Session.open(
        model,
        tokens,
        spec,
        batch_tokens=batch_tokens,
        work_directory=work_directory,
        identity=identity,
        placement="resident",
        device=device,
        ranks=ranks,
        mtp=blocks,
    )
    if session.table is not None:
        if ranks.rank == 0 and not session.table.has_edges:
            session.table.set_edges(*_pilot(model, session, batch_tokens, device))
        ranks.meet("edges", session.directory)
    partials = Partials(session.directory)
    todo = ranks.agreed("todo", lambda: [group for group in range(len(tokens.groups)) if not partials.has(group)])
    count = sum(int(tokens.row_lengths[row]) for group in todo for row in tokens.groups[group])
    with session.sampling(), progress.task("observe", total=count, unit="tokens") as task:
        done = Together(ranks, task)
        for group in (todo[number] for number in ranks.claims("group", len(todo))):
            partials.write(group, _sum_group(model, session, group, batch_tokens, done.advance))
            if session.table is not None:
                session.table.drop(group)
        ranks.meet("sums", session.directory, done.look)
    if session.sample is not None:
        session.sample.finish_all(progress, ranks)
        ranks.meet("sample", session.directory)
    return None if ranks.rank else session.observation(*partials.total(range(len(tokens.groups)), tokens.snapshots))


def _sum_group(
    model: PreTrainedModel, session: Session, group: int, batch_tokens: int, advance: Callable[[int], None]
) -> dict[str, Tensor]:
    tokens, device = session.tokens, input_weight(model).device
    sums, at = GroupSums(session.sites, len(tokens.sources)), session.trace_start[group] if session.spec.eaft else 0
    for batch in batches(tokens, tokens.groups[group], batch_tokens):
        watch = BatchWatch(session, batch, sums.add, at)
        _observe_batch(model, watch, device)
        sums.count_tokens(batch)
        at += watch.num_signals
        advance(int(batch.lengths.sum()))
    session.keep_sample(group, [site.layer for site in session.sites])
    return sums.tensors() | ({} if session.table is None else session.table.tensors(group))


def _pilot(
    model: PreTrainedModel, session: Session, batch_tokens: int, device: torch.device
) -> tuple[ndarray, ndarray, ndarray]:
    """p, H and source at the signal positions of the first rows, whatever rows are observed later: every attempt gets
    the same."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    rows = [row for group in session.tokens.groups for row in group]
    for batch in batches(session.tokens, rows, batch_tokens):
        if sum(len(source) for _, _, source in seen) >= PILOT_POSITIONS:
            break
        watch = BatchWatch(session, batch, lambda *_: None)
        positions = None if batch.position_ids is None else batch.position_ids.to(device)
        with intercepted(session.sites, _unwatched):  # the pass's own kernels, for its own bits
            hidden = final_hidden(model, batch.input_ids.to(device), positions)
        p, h, source = watch.signals(model, hidden)
        seen.append((p.cpu(), h.cpu(), source))
    p, h, source = (torch.cat(parts).numpy() for parts in zip(*seen, strict=True))
    return p, h, source


def _unwatched(site: RoutedExperts, hidden: Tensor, index: Tensor, gates: Tensor, inner: Experts) -> Tensor:
    return observed_forward(site, hidden, index, gates)[0]


class Together:
    """Shows what all ranks have done."""

    def __init__(self, ranks: Alone, task: Task):
        self._ranks, self._task, self._shown = ranks, task, 0

    def advance(self, tokens: int) -> None:
        total = self._ranks.add("tokens", tokens) if self._ranks.world > 1 else self._shown + tokens
        self._task.advance(total - self._shown)
        self._shown = total

    def look(self) -> None:
        self.advance(0)


def _observe_batch(model: PreTrainedModel, watch: BatchWatch, device: torch.device) -> None:
    positions = None if watch.batch.position_ids is None else watch.batch.position_ids.to(device)
    with watch.session.watching(lambda: watch):
        hidden = final_hidden(model, watch.batch.input_ids.to(device), positions)
        watch.predict_further(hidden)
    for site in watch.session.sites:
        watch.write_routed(site.layer)
    watch.finish(model, hidden)
