"""Measures knock-outs on any number of ranks, each with its own model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.core.progress import SILENT, Progress
from reapkit.core.ranks import ALONE, Alone
from reapkit.evaluation.knockout.resident import measure_knockouts
from reapkit.model.loading import load_model
from reapkit.observation.job import own_device, require_shared
from reapkit.observation.knockouts import Knockouts

KIND = "knockout"


@dataclass(frozen=True)
class KnockoutJob:
    """Everything that decides what a rank does: directories (absolute, the same on every machine), how many scored
    positions, and the runtime. `device`: "cpu", "cuda" or one of torch's; with several ranks, "cuda" is the rank's own.
    """

    model: str
    calibration: str
    work: str
    count: int
    batch_tokens: int
    identity: str | None
    device: str
    placement: str
    trust_remote_code: bool

    def as_json(self) -> dict[str, Any]:
        """With its kind, by which other ranks know what they are asked for."""
        return asdict(self) | {"kind": KIND}

    @classmethod
    def of_json(cls, fields: dict[str, Any]) -> KnockoutJob:
        return cls(**{name: value for name, value in fields.items() if name != "kind"})

    def run(self, ranks: Alone = ALONE, *, progress: Progress = SILENT) -> Knockouts | None:
        """The knock-outs on rank 0, None on the others. Raises UnusableError where they cannot be measured, or where a
        rank does not see what rank 0 sees."""
        require_shared(self.model, self.calibration, self.work)
        device = own_device(self.device, ranks)
        if device == "cuda" and torch.cuda.device_count() > 1:
            device = "auto"  # alone on a machine with several: the layers are spread over them
        return measure_knockouts(
            load_model(self.model, device=device, trust_remote_code=self.trust_remote_code),
            CalibrationTokens.load(self.calibration),
            self.count,
            batch_tokens=self.batch_tokens,
            work_directory=Path(self.work),
            identity=self.identity,
            progress=progress,
            ranks=ranks,
        )
