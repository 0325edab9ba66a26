"""One running measurement of knock-outs: which experts on which rows, and where its units are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.core.errors import UnusableError
from reapkit.core.hashing import digest
from reapkit.core.ranks import Alone
from reapkit.evaluation.knockout.sample import KnockoutSample
from reapkit.evaluation.knockout.units import FILES, Units
from reapkit.model.expert_pairs import kernels_on
from reapkit.model.masking import has_table, without_expert
from reapkit.model.routed_experts import RoutedExperts, decoder_layers, find_experts
from reapkit.observation.knockouts import Knockouts


@dataclass(frozen=True, eq=False)
class Measurement:
    """What every placement shares: the model's layers and routed experts (but for layers that a fixed table routes,
    which lose none), the sampled rows, the files that survive a kill."""

    sites: tuple[RoutedExperts, ...]
    layers: nn.ModuleList
    units: Units
    batch_tokens: int
    meta: Mapping[str, Any]

    @classmethod
    def open(
        cls,
        model: PreTrainedModel,
        tokens: CalibrationTokens,
        count: int,
        *,
        batch_tokens: int,
        work_directory: Path,
        identity: str | None,
        placement: str,
        device: torch.device,
        ranks: Alone,
    ) -> Measurement:
        """Raises UnusableError where an expert cannot be taken out, where no row holds a scored position, or where a
        rank would compute in another way than rank 0."""
        sites = tuple(site for site in find_experts(model) if not has_table(site))
        for site in sites:
            _refuse_unfit(site)
        sample = KnockoutSample.of(tokens, count, batch_tokens)
        if not sample.rows:
            raise UnusableError(
                "knockout: no row of the calibration holds a scored position. Raise calibration.samples."
            )
        meta = {
            "model": identity,
            "placement": placement,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "kernels": kernels_on(device),
            "batch_tokens": batch_tokens,
            "tokens": sample.num_tokens,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        ranks.same("how", meta)
        how = digest({"meta": meta, "rows": sample.rows, "layers": [site.layer for site in sites], "files": FILES})[:12]
        directory = Path(work_directory) / f"units-{how}"  # units measured in another way are not mixed with these
        directory.mkdir(parents=True, exist_ok=True)
        return cls(sites, decoder_layers(model)[1], Units(sites, sample, directory, model.dtype), batch_tokens, meta)

    @property
    def sample(self) -> KnockoutSample:
        return self.units.sample

    @property
    def directory(self) -> Path:
        return self.units.directory

    def result(self) -> Knockouts:
        """Once every unit is there."""
        return self.units.result(self.meta)


def _refuse_unfit(site: RoutedExperts) -> None:
    with without_expert(site, 0):  # raises where a router has no row to leave out
        pass
