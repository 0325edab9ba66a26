"""Stores the units of the knock-outs, one layer on one batch of the sample, as they finish, and adds them up in row
order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reapkit.core.errors import UnusableError
from reapkit.evaluation.knockout.divergence import BaseLogits
from reapkit.evaluation.knockout.entry import leaves_more_behind
from reapkit.evaluation.knockout.layer_variants import NOTHING, Variants
from reapkit.evaluation.knockout.sample import KnockoutSample
from reapkit.model.routed_experts import RoutedExperts
from reapkit.observation.knockouts import Knockouts
from reapkit.observation.partial_files import load_partial, save_by_rename

FILES = 1
"""The file format of unfinished work. Raise it when the format changes, so that older work is not resumed."""
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Nats per position that rounding alone can make of a knock-out of nothing, by dtype."""
ROUNDING_ELSE = 0.1


class Unit:
    """What was found of one layer on one batch: by row and expert, and by row for the knock-out of nothing."""

    def __init__(self, rows: int, experts: int):
        self.kl = torch.zeros(rows, experts, dtype=torch.float64)
        self.floor = torch.zeros(rows, dtype=torch.float64)

    def take(self, variants: Variants, base: BaseLogits, hidden: Tensor) -> None:
        """Compares the variants' final hidden states, [n, t, hidden] in the model's dtype, with the base."""
        found = base.divergence(variants.row, hidden)
        nothing = variants.expert == NOTHING
        self.floor[variants.row[nothing]] = found[nothing]
        self.kl[variants.row[~nothing], variants.expert[~nothing]] = found[~nothing]


@dataclass(frozen=True, eq=False)
class Units:
    """All units of a measurement under `directory`, groups outermost."""

    sites: Sequence[RoutedExperts]
    sample: KnockoutSample
    directory: Path
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.sites) * len(self.sample.groups)

    def at(self, number: int) -> tuple[int, RoutedExperts]:
        """The group and the layer of a unit."""
        group, place = divmod(number, len(self.sites))
        return group, self.sites[place]

    def unfinished(self) -> list[int]:
        return [number for number in range(len(self)) if not self._file(*self.at(number)).exists()]

    def keep(self, group: int, site: RoutedExperts, unit: Unit) -> None:
        """Stores a finished unit. Raises UnusableError where numbers are not finite, or where taking out nothing
        changes more than rounding can."""
        if not (unit.kl.isfinite().all() and unit.floor.isfinite().all()):
            raise UnusableError(
                f"knockout: found NaN or infinity behind layer {site.layer}. Load the model in bfloat16 or float32, or"
                " download the checkpoint again."
            )
        positions = sum(int(self.sample.tokens.row(row).scored.sum()) for row in self.sample.groups[group])
        moved, most = float(unit.floor.sum()) / positions, ROUNDING.get(self.dtype, ROUNDING_ELSE)
        if moved > most:
            raise leaves_more_behind(
                site.layer, f"says something else (KL {moved:.3g} nats per position, more than rounding makes)"
            )
        save_by_rename({"kl": unit.kl, "floor": unit.floor}, self._file(group, site))

    def _file(self, group: int, site: RoutedExperts) -> Path:
        return self.directory / f"knockout-{site.layer:04d}-{group:05d}.safetensors"

    def result(self, meta: Mapping[str, Any]) -> Knockouts:
        """Every unit's rows, added by source in the order of the rows."""
        sample, experts = self.sample, max(site.num_experts for site in self.sites)
        place = torch.tensor([sample.rows.index(row) for group in sample.groups for row in group])
        kl, kl_sq, floor = [], [], []
        for site in self.sites:
            parts = [load_partial(self._file(group, site)) for group in range(len(sample.groups))]
            by_row = torch.empty(len(sample.rows), site.num_experts, dtype=torch.float64)
            by_row[place] = torch.cat([part["kl"] for part in parts])
            of_nothing = torch.empty(len(sample.rows), dtype=torch.float64)
            of_nothing[place] = torch.cat([part["floor"] for part in parts])
            wide = nn.functional.pad(by_row, (0, experts - site.num_experts))
            kl.append(self._by_source(wide))
            kl_sq.append(self._by_source(wide * wide))
            floor.append(self._by_source(of_nothing))
        counts = torch.bincount(sample.source, minlength=len(sample.tokens.sources))
        return Knockouts(
            tuple(site.layer for site in self.sites),
            sample.tokens.sources,
            counts.numpy(),
            self._by_source(sample.positions).numpy(),
            torch.stack(kl).numpy(),
            torch.stack(kl_sq).numpy(),
            torch.stack(floor).numpy(),
            dict(meta),
        )

    def _by_source(self, values: Tensor) -> Tensor:
        """Sums [S, ...] of [rows, ...], row after row."""
        sources = len(self.sample.tokens.sources)
        return values.new_zeros(sources, *values.shape[1:]).index_add_(0, self.sample.source, values)
