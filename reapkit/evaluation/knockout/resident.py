"""Measures the knock-outs of a model that is in memory, on one device or spread over several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reapkit.calibration.tokens import Batch, CalibrationTokens
from reapkit.core.progress import SILENT, Progress
from reapkit.core.ranks import ALONE, Alone
from reapkit.evaluation.head import check_head, hidden_states
from reapkit.evaluation.knockout.divergence import BaseLogits
from reapkit.evaluation.knockout.entry import hidden_behind
from reapkit.evaluation.knockout.layer_variants import LayerCall, Variants
from reapkit.evaluation.knockout.session import Measurement
from reapkit.evaluation.knockout.units import Unit
from reapkit.evaluation.linear import fast_linear
from reapkit.model.causal_lm import input_weight
from reapkit.model.routed_experts import RoutedExperts
from reapkit.observation.knockouts import Knockouts
from reapkit.observation.resident import Together


@torch.no_grad()
def measure_knockouts(
    model: PreTrainedModel,
    tokens: CalibrationTokens,
    count: int,
    *,
    batch_tokens: int,
    work_directory: Path,
    identity: str | None = None,
    progress: Progress = SILENT,
    ranks: Alone = ALONE,
) -> Knockouts | None:
    """The knock-outs of every expert of `model` on whole rows of `tokens` with about `count` scored positions; killed
    and run again with the same arguments, it continues to the same bytes.

    Units of one layer and one batch of rows are kept under `work_directory`. With several `ranks` each calls this with
    its own copy of the model; a unit is measured by whoever comes first, and rank 0 returns the result, the others
    None. Raises UnusableError where an expert cannot be taken out, or where a forward cannot begin behind a layer.
    """
    device = input_weight(model).device
    found = Measurement.open(
        model,
        tokens,
        count,
        batch_tokens=batch_tokens,
        work_directory=work_directory,
        identity=identity,
        placement="resident",
        device=device,
        ranks=ranks,
    )
    check_head(model, tokens.row(found.sample.rows[0]).input_ids)
    units, of_group = found.units, _LastGroup(model, found)
    todo = ranks.agreed("todo", units.unfinished)
    total = sum(units.at(number)[1].num_experts for number in todo)
    with fast_linear(model), progress.task("knockout", total=total, unit="experts") as task:
        done = Together(ranks, task)
        for number in (todo[place] for place in ranks.claims("unit", len(todo))):
            group, site = units.at(number)
            units.keep(group, site, of_group(group).without_each(site))
            done.advance(site.num_experts)
        ranks.meet("knockouts", found.directory, done.look)
    return None if ranks.rank else found.result()


class _LastGroup:
    """The base's forward of the group that was asked for last: units of a group follow each other."""

    def __init__(self, model: PreTrainedModel, found: Measurement):
        self._model, self._found = model, found
        self._group, self._base = -1, cast("_Base", None)

    def __call__(self, group: int) -> _Base:
        if group != self._group:
            self._base = _Base.of(self._model, self._found, self._found.sample.batch(group))
            self._group = group
        return self._base


@dataclass(frozen=True, eq=False)
class _Base:
    """What a batch's layers with experts were called with, and what the model says of it."""

    model: PreTrainedModel
    found: Measurement
    batch: Batch
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
    logits: BaseLogits

    @classmethod
    def of(cls, model: PreTrainedModel, found: Measurement, batch: Batch) -> _Base:
        calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        handles = [
            site.decoder_layer.register_forward_pre_hook(_noting(calls, site), with_kwargs=True) for site in found.sites
        ]
        try:
            hidden = hidden_states(model, batch.input_ids, batch.position_ids)
        finally:
            for handle in handles:
                handle.remove()
        return cls(model, found, batch, calls, BaseLogits(model, hidden, batch.scored))

    def without_each(self, site: RoutedExperts) -> Unit:
        """The layer's experts, each taken out alone."""
        args, kwargs = self.calls[site.layer]
        call = LayerCall(site, args, kwargs, reaching(self.batch))
        unit = Unit(len(self.batch.rows), site.num_experts)
        for variants in call.variants(range(site.num_experts), self.found.batch_tokens):
            unit.take(variants, self.logits, self._finished(site, call, variants))
        return unit

    def _finished(self, site: RoutedExperts, call: LayerCall, variants: Variants) -> Tensor:
        ids, positions = rows_of(self.batch, variants.row, input_weight(self.model).device)
        return hidden_behind(
            self.model, self.found.layers, site.layer, variants.hidden, ids, positions, returns_tuple=call.returns_tuple
        )


def reaching(batch: Batch) -> Tensor:
    """Positions at or before a row's last scored one, bool [b, t]: what happens later says nothing about it."""
    return batch.scored.flip(1).cummax(1).values.flip(1)


def rows_of(batch: Batch, row: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids int64 [n, t] and positions, where the batch has them, of some of its rows, int64 [n]."""
    positions = None if batch.position_ids is None else batch.position_ids[row].to(device)
    return batch.input_ids[row].to(device), positions


def _noting(calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]], site: RoutedExperts) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[site.layer] = args, dict(kwargs)

    return hook
