"""One file per stage. Each `run(context)` reads its inputs, computes, writes its payload and returns a small summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reapkit.planning import Plan
from reapkit.progress import Progress
from reapkit.recipe.schema import Recipe
from reapkit.store import Artifact


@dataclass(frozen=True)
class Context:
    """What a stage gets: the plan, its finished inputs by stage name, an empty payload directory and a directory for partial work."""

    plan: Plan
    inputs: Mapping[str, Artifact]
    payload: Path
    work: Path
    progress: Progress
    candidate: str | None = None

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

    @property
    def model_directory(self) -> Path:
        return self.plan.checkpoint.path
