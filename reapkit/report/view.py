"""Computes an observation under one cut, for the sections of the report."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property

import numpy as np
from numpy import ndarray

from reapkit.core.formatting import percent
from reapkit.observation.observation import Observation
from reapkit.recipe.schema import SaliencySpec
from reapkit.selection import statistics
from reapkit.selection.criteria.registry import described
from reapkit.selection.saliency import formula, saliency
from reapkit.selection.selection import Selection
from reapkit.selection.totals import Totals, add_sources, source_alphas, totals


@dataclass(frozen=True, eq=False)
class View:
    """An observation with saliency [L, E] and dropped [L, E] bool: a selection's own, or the least salient half."""

    observation: Observation
    selection: Selection | None
    mix: dict[str, Decimal] | None
    summed: Totals
    saliency: ndarray
    dropped: ndarray

    @classmethod
    def of(cls, observation: Observation, selection: Selection | None) -> View:
        if selection is None:
            values = saliency(observation, SaliencySpec())
            return cls(
                observation, None, None, totals(observation), values, _lowest(values, observation.num_experts // 2)
            )
        given = selection.details.get("mix")
        mix = None if given is None else {name: Decimal(weight) for name, weight in given.items()}
        ordered = [selection.layers[layer] for layer in observation.layers]
        values = np.array([layer.saliency for layer in ordered], np.float64)
        dropped = np.zeros(values.shape, bool)
        for row, layer in enumerate(ordered):
            dropped[row, list(layer.drop)] = True
        return cls(observation, selection, mix, totals(observation, mix), values, dropped)

    @property
    def layers(self) -> tuple[int, ...]:
        return self.observation.layers

    @property
    def experts(self) -> int:
        return self.observation.num_experts

    @property
    def removed_share(self) -> float:
        return float(self.dropped.mean())

    @property
    def cut(self) -> str:
        """The cut in words: `50 % of the experts removed`."""
        return f"{percent(self.removed_share, 0)} of the experts removed"

    @cached_property
    def spec(self) -> SaliencySpec:
        """The selection's criterion where it can be computed again from sums alone, else the default one."""
        if self.selection is None or not described(self.selection.criterion).from_sums:
            return SaliencySpec(mix=self.mix)
        details = self.selection.details
        return SaliencySpec(
            criterion=self.selection.criterion,
            reduction=details.get("reduction", "mean"),
            prior_count=float(details.get("prior_count", 0)),
            mix=self.mix,
        )

    @property
    def criterion(self) -> str:
        return SaliencySpec().criterion if self.selection is None else self.selection.criterion

    @property
    def formula(self) -> str:
        """What saliency is, in symbols."""
        return (
            formula(SaliencySpec())
            if self.selection is None
            else self.selection.details.get("formula", self.selection.criterion)
        )

    @cached_property
    def coactivation(self) -> ndarray | None:
        """float64 [L, E, E], sources weighed by the mix."""
        together = self.observation.coactivation
        return None if together is None else add_sources(together, source_alphas(self.observation, self.mix))

    @cached_property
    def counts(self) -> dict[int, int]:
        """Kept experts by layer."""
        return dict(zip(self.layers, (~self.dropped).sum(1).tolist(), strict=True))

    def dropped_without(self, source: str) -> ndarray:
        """What the same budget would drop, had the mix not held `source`; bool [L, E]."""
        mix = statistics.mix_without(self.observation, source, self.mix)
        values = saliency(self.observation, self.spec.model_copy(update={"mix": mix}))
        order = statistics.removal_order(values)
        dropped = np.zeros_like(self.dropped)
        for row, size in enumerate(self.dropped.sum(1).tolist()):
            dropped[row, order[row, :size]] = True
        return dropped


def decided_label(view: View) -> str:
    """How many experts per layer the selection drops."""
    sizes = set(view.dropped.sum(1).tolist())
    each = str(sizes.pop()) if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
    return f"{each} of {view.experts} ({percent(view.removed_share, 0)}), as decided"


def removal_rank(values: ndarray) -> ndarray:
    """Each expert's place in the order of removal, int64 [L, E], 0 for the first to go; `values` float64 [L, E], its
    saliency."""
    order = statistics.removal_order(values)
    return np.argsort(order, axis=1)


def _lowest(values: ndarray, size: int) -> ndarray:
    return removal_rank(values) < size
