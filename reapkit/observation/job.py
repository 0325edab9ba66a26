"""Runs one observation on any number of ranks, each with its own model."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from reapkit.calibration.isolation import check_isolation
from reapkit.calibration.tokens import CalibrationTokens
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import UnusableError
from reapkit.core.progress import SILENT, Progress
from reapkit.core.ranks import ALONE, Alone
from reapkit.model.loading import final_hidden, load_model
from reapkit.observation.observation import Observation
from reapkit.observation.resident import observe
from reapkit.observation.streamed import observe_streaming
from reapkit.recipe.schema import ObserveSpec


@dataclass(frozen=True)
class Job:
    """Everything that decides what a rank does: directories (absolute, the same on every machine), the spec and the
    runtime.

    `hidden_bytes`: of one rank. `mtp`: multi-token-prediction layers that are observed too. `device`: "cpu", "cuda" or
    one of torch's; with several ranks, "cuda" is the rank's own.
    """

    model: str
    calibration: str
    work: str
    spec: ObserveSpec
    batch_tokens: int
    identity: str | None
    device: str
    placement: str
    trust_remote_code: bool
    checkpoint_minutes: float
    hidden_bytes: int | None
    offload_directory: str | None
    mtp: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(replace(self, spec=self.spec.model_dump(mode="json")))

    @classmethod
    def of_json(cls, fields: dict[str, Any]) -> Job:
        return cls(**{**fields, "spec": ObserveSpec.model_validate(fields["spec"]), "mtp": tuple(fields["mtp"])})

    def run(
        self, ranks: Alone = ALONE, *, progress: Progress = SILENT, reading: Callable[[list[str]], None] | None = None
    ) -> Observation | None:
        """The observation on rank 0, None on the others. `reading` is told the shards that are read next.

        Raises UnusableError where the model cannot be observed, or where a rank does not see what rank 0 sees.
        """
        require_shared(self.model, self.calibration, self.work)
        tokens = CalibrationTokens.load(self.calibration)
        common = {
            "batch_tokens": self.batch_tokens,
            "work_directory": Path(self.work),
            "identity": self.identity,
            "progress": progress,
            "ranks": ranks,
            "mtp": self.mtp,
        }
        device = own_device(self.device, ranks)
        if self.placement == "streaming":
            return observe_streaming(
                self.model,
                tokens,
                self.spec,
                device=device,
                trust_remote_code=self.trust_remote_code,
                checkpoint_minutes=self.checkpoint_minutes,
                hidden_bytes=self.hidden_bytes,
                reading=reading,
                offload_directory=self._offload(ranks),
                **common,
            )
        if device == "cuda" and torch.cuda.device_count() > 1:
            device = "auto"  # alone on a machine with several: the layers are spread over them
        model = load_model(self.model, device=device, trust_remote_code=self.trust_remote_code)
        if reading is not None:
            reading(sorted(Checkpoint.open(self.model).shards))
        if ranks.rank == 0:
            check_isolation(
                lambda ids, positions: final_hidden(model, ids.to(model.device), positions.to(model.device)).cpu(),
                tokens,
            )
        return observe(model, tokens, self.spec, **common)

    def _offload(self, ranks: Alone) -> Path | None:
        """Ranks of several machines may have the same process id, by which spooled files are told apart."""
        if self.offload_directory is None:
            return None
        return Path(self.offload_directory) / f"rank-{ranks.rank}" if ranks.world > 1 else Path(self.offload_directory)


def require_shared(*directories: str) -> None:
    """Raises UnusableError where a rank does not see what rank 0 works with."""
    for directory in directories:
        if not Path(directory).is_dir():
            raise UnusableError(
                f"{directory} does not exist on this machine, but rank 0 reads it. Put the checkpoint (for hub"
                " models HF_HOME) and runtime.store on a file system that all nodes mount at the same path."
            )


def own_device(device: str, ranks: Alone) -> str:
    """The rank's accelerator of this machine. Raises UnusableError where there are fewer than ranks."""
    if device != "cuda" or ranks.world == 1:
        return device
    if ranks.local_rank >= torch.cuda.device_count():
        raise UnusableError(
            f"{ranks.local_world} ranks on a machine with {torch.cuda.device_count()} GPUs. Start one rank per GPU: "
            f"torchrun --nproc-per-node {max(1, torch.cuda.device_count())}"
        )
    torch.cuda.set_device(ranks.local_rank)
    return f"cuda:{ranks.local_rank}"


def help_with(job: dict[str, Any], ranks: Alone) -> None:
    """A rank other than 0 does its share of the job, and frees what it took for it."""
    Job.of_json(job).run(ranks)
    let_go()


def let_go() -> None:
    """Frees the memory of a model that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
