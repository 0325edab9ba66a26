"""Measures candidates on one part of the packs, as masks on the loaded base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.core.progress import Progress
from reapkit.evaluation import generation
from reapkit.evaluation.metrics.rows import summarize_difference
from reapkit.evaluation.metrics.signals import PositionSignals
from reapkit.evaluation.outputs import (
    BaseOutputs,
    Pack,
    base_outputs,
    compare,
    describe_base,
    load_positions,
    measure,
    save_positions,
)
from reapkit.model.masking import masked
from reapkit.pruning.refitted_weights import RepairedWeights, repaired
from reapkit.recipe.schema import GenerationSpec
from reapkit.selection.selection import Selection


def packs_of_part(tokens: Mapping[int, CalibrationTokens], part: str) -> dict[int, Pack]:
    """The packs that have rows of this part, by length."""
    return {length: Pack.part(each, part, length) for length, each in tokens.items() if each.rows(part)}


@dataclass(frozen=True)
class MaskedCandidate:
    """A selection to try. `nbytes`: the pruned checkpoint's size; `control_of`: the candidate whose budget a control
    shares; `weights`: its re-fitted experts; `ratio`: how a recipe says its budget.
    """

    name: str
    selection: Selection
    nbytes: int | None = None
    control_of: str | None = None
    weights: RepairedWeights | None = None
    ratio: str | None = None

    @contextmanager
    def on(self, model: PreTrainedModel, layers: Collection[int] | None = None) -> Iterator[None]:
        """Inside the block `model` is this candidate; `layers`: only these are in memory, the others stay as they
        are."""
        keep = {layer: kept for layer, kept in self.selection.keep.items() if layers is None or layer in layers}
        with masked(model, keep, self.selection.experts_per_token), repaired(model, self.weights, layers):
            yield

    @property
    def kept(self) -> dict[int, int]:
        """Number of kept experts by layer."""
        return {layer: len(experts) for layer, experts in self.selection.keep.items()}

    @property
    def size(self) -> int:
        """What orders candidates: bytes where known, else kept experts."""
        return sum(self.kept.values()) if self.nbytes is None else self.nbytes

    def describe(self) -> dict[str, Any]:
        kept = self.kept
        low, high = min(kept.values()), max(kept.values())
        dropped = sum(len(layer.drop) for layer in self.selection.layers.values())
        return {
            "name": self.name,
            "criterion": self.selection.criterion,
            "kept": {str(layer): n for layer, n in kept.items()},
            "removed": dropped / (dropped + sum(kept.values())),
            "num_experts": (dropped + sum(kept.values())) // len(kept),
            "experts": str(low) if low == high else f"{low} to {high}",
            "experts_per_token": self.selection.experts_per_token,
            "bytes": self.nbytes,
            "control_of": self.control_of,
            "ratio": self.ratio,
        }


class Bench(ABC):
    """Candidates' numbers on one part of the packs, "decide" or "confirm"; where they come from is the subclass's."""

    packs: Mapping[int, Pack]
    eaft: Mapping[str, Any]
    bases: Mapping[int, BaseOutputs]
    measures_all = False
    """Whether every candidate has been measured anyway, so that none need be left untried."""

    @abstractmethod
    def positions(self, candidate: MaskedCandidate, length: int) -> PositionSignals:
        """The candidate's signals at the measured positions of the pack of this length, each `[n]` as `PositionSignals`
        says."""

    def base_metrics(self) -> dict[str, Any]:
        """The base's own numbers by length and group."""
        return {str(length): describe_base(self.bases[length], pack, self.eaft) for length, pack in self.packs.items()}

    def metrics(self, candidate: MaskedCandidate) -> dict[str, Any]:
        """The candidate's numbers by length and group."""
        return {
            str(length): compare(self.bases[length], self.positions(candidate, length), pack, self.eaft)
            for length, pack in self.packs.items()
        }

    def against(self, candidate: MaskedCandidate, other: MaskedCandidate) -> dict[str, Any]:
        """By how much `other` is further from the base than `candidate`, by length and group, paired row by row."""
        return {
            str(length): summarize_difference(
                self.positions(candidate, length), self.positions(other, length), pack.index
            )
            for length, pack in self.packs.items()
        }

    def generation(self, candidate: MaskedCandidate | None) -> dict[str, Any]:
        """`{"generation": shares over continuations by group | None, "examples": [...]}`; of the base itself for
        None."""
        return {"generation": None, "examples": []}


@dataclass(frozen=True, eq=False)
class MaskedBench(Bench):
    """Masks the loaded base for each candidate; what a killed run finished is read back from `work_directory`."""

    model: PreTrainedModel
    packs: Mapping[int, Pack]
    eaft: Mapping[str, Any]
    batch_tokens: int
    work_directory: Path | None
    progress: Progress
    writing: GenerationSpec | None = None
    tokenizer: Any = None

    @classmethod
    def of_part(
        cls,
        model: PreTrainedModel,
        tokens: Mapping[int, CalibrationTokens],
        part: str,
        work_directory: Path | None,
        **settings: Any,
    ) -> MaskedBench:
        return cls(
            model,
            packs_of_part(tokens, part),
            work_directory=None if work_directory is None else work_directory / part,
            **settings,
        )

    @cached_property
    def bases(self) -> dict[int, BaseOutputs]:
        """The base's outputs by length, computed once."""
        return {
            length: base_outputs(
                self.model,
                pack,
                batch_tokens=self.batch_tokens,
                top_k=self.eaft["top_k"],
                work_directory=self.work_directory,
                progress=self.progress,
            )
            for length, pack in self.packs.items()
        }

    def positions(self, candidate: MaskedCandidate, length: int) -> PositionSignals:
        path = None if self.work_directory is None else self.work_directory / f"{candidate.name}-{length}.safetensors"
        if path is not None and path.is_file():
            return load_positions(path)
        base = self.bases[length]
        with candidate.on(self.model):
            found = measure(
                self.model,
                self.packs[length],
                base,
                batch_tokens=self.batch_tokens,
                top_k=self.eaft["top_k"],
                title=f"evaluate {candidate.name}",
                progress=self.progress,
            )
        if path is not None:
            save_positions(found, path)
        return found

    @cached_property
    def prompts(self) -> list[generation.Prompt]:
        """Prompts from the longest pack, which cuts fewest samples."""
        return (
            generation.draw_prompts(self.packs[max(self.packs)], self.writing.prompts)
            if self.writing and self.packs
            else []
        )

    @cached_property
    def _base_written(self) -> generation.Written:
        return self._write("base")

    def _write(self, name: str) -> generation.Written:
        assert self.writing is not None, "prompts are drawn where continuations are asked for"
        return generation.write(
            self.model,
            self.prompts,
            max_new_tokens=self.writing.max_new_tokens,
            batch_tokens=self.batch_tokens,
            title=f"generate {name}",
            progress=self.progress,
        )

    def generation(self, candidate: MaskedCandidate | None) -> dict[str, Any]:
        """As `Bench.generation`; None where no generation was asked for or no prompt exists."""
        if not self.prompts:
            return super().generation(candidate)
        base, written = self._base_written, self._base_written
        if candidate is not None:
            with candidate.on(self.model):
                written = self._write(candidate.name)
        pack = self.packs[max(self.packs)]
        shares = generation.summarize(base, written, self.prompts, pack.tokens.sources, pack.outside, self.tokenizer)
        shown = (
            generation.examples(base, written, self.prompts, pack.tokens.sources, self.tokenizer)
            if self.tokenizer
            else []
        )
        return {"generation": shares, "examples": shown}
