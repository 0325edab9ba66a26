"""One file per stage. Each `run(context)` reads its inputs, computes, writes its payload and returns a small
summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reapkit.core.artifact_store import Artifact
from reapkit.core.measurements import KEPT_NOWHERE, Measurements
from reapkit.core.progress import Progress
from reapkit.core.ranks import ALONE, Alone
from reapkit.planning.plan import Plan
from reapkit.recipe.schema import Recipe


@dataclass(frozen=True)
class Context:
    """What a stage gets: the plan, its finished inputs by stage name, an empty payload directory and a directory for
    partial work.

    `measurements`: where what was measured before is found. `hashes`: where it notes the sha256 (hex) of files that it
    took while it wrote them, by their path in the payload: they are not read again.
    """

    plan: Plan
    inputs: Mapping[str, Artifact]
    payload: Path
    work: Path
    progress: Progress
    ranks: Alone = ALONE
    hashes: dict[str, str] = field(default_factory=dict)
    measurements: Measurements = KEPT_NOWHERE

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def device(self) -> str:
        """The recipe's device; `auto` is the accelerator where there is one."""
        if self.recipe.runtime.device != "auto":
            return self.recipe.runtime.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @contextmanager
    def sample_cache(self) -> Iterator[Path]:
        """Where tokenized samples stay between runs, by the content of their source; one preparation at a time."""
        store = self.plan.store
        with store.locked("samples", "cache", lambda: self.progress.say("another run is preparing samples; waiting")):
            yield store.root / "samples"

    @property
    def streams(self) -> bool:
        """Whether layers go through memory one at a time instead of staying there."""
        return self.plan.estimates.placement == "streaming"

    @property
    def streaming(self) -> dict[str, Any]:
        """Where waiting hidden states go, as the streaming functions take it."""
        directory = self.recipe.runtime.offload_directory
        return {
            "hidden_bytes": self.plan.estimates.host_budget,
            "offload_directory": Path(directory) if directory else None,
        }

    @property
    def model_directory(self) -> Path:
        return self.plan.checkpoint.path
