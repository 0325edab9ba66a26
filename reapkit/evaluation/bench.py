"""Measures candidates on one part of the packs, as masks on the loaded base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.core.progress import Progress
from reapkit.evaluation import generation
from reapkit.evaluation.kept_outputs import load_hidden, load_signals, save_hidden, save_signals
from reapkit.evaluation.measures import BASE, Measures, Of
from reapkit.evaluation.metrics.rows import summarize_difference
from reapkit.evaluation.metrics.signals import PositionSignals
from reapkit.evaluation.outputs import BaseOutputs, Pack, base_hidden, compare, describe_base, describe_hidden, measure
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
    shares; `weights`: its re-fitted experts; `ratio`: how a recipe says its budget; `of`: what names the mask where
    measurements are kept.
    """

    name: str
    selection: Selection
    nbytes: int | None = None
    control_of: str | None = None
    weights: RepairedWeights | None = None
    ratio: str | None = None
    of: Of = ""

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
    measures_all = False
    """Whether every candidate has been measured anyway, so that none need be left untried."""

    @abstractmethod
    def positions(self, candidate: MaskedCandidate | None, length: int) -> PositionSignals:
        """The candidate's signals at the measured positions of the pack of this length, each `[n]` as `PositionSignals`
        says; of the base itself for None."""

    def base_metrics(self) -> dict[str, Any]:
        """The base's own numbers by length and group."""
        return {
            str(length): describe_base(self.positions(None, length), pack, self.eaft)
            for length, pack in self.packs.items()
        }

    def metrics(self, candidate: MaskedCandidate) -> dict[str, Any]:
        """The candidate's numbers by length and group."""
        return {
            str(length): compare(self.positions(None, length), self.positions(candidate, length), pack, self.eaft)
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
class BaseRuns:
    """A base that is loaded once something must be measured, on the packs of one part by length."""

    load: Callable[[], PreTrainedModel]
    part: str
    packs: Mapping[int, Pack]
    batch_tokens: int
    measures: Measures
    progress: Progress
    _signals: dict[int, PositionSignals] = field(default_factory=dict, init=False)
    _outputs: dict[int, BaseOutputs] = field(default_factory=dict, init=False)

    def signals(self, length: int) -> PositionSignals:
        """The base's own signals on the pack of this length."""
        if length not in self._signals:
            self._signals[length] = self.measures.kept.get(
                self.measures.signals(self.part, length, BASE, BASE),
                lambda work: describe_hidden(
                    self.load(), self.packs[length], self.outputs(length).hidden, self.measures.top_k
                ),
                save_signals,
                load_signals,
            )
        return self._signals[length]

    def outputs(self, length: int) -> BaseOutputs:
        """What others are compared with on the pack of this length."""
        if length not in self._outputs:
            pack = self.packs[length]
            hidden = self.measures.kept.get(
                self.measures.hidden(self.part, length),
                lambda work: base_hidden(
                    self.load(), pack, batch_tokens=self.batch_tokens, work_directory=work, progress=self.progress
                ),
                save_hidden,
                load_hidden,
            )
            self._outputs[length] = BaseOutputs.of(self.load(), pack, hidden)
        return self._outputs[length]


@dataclass(frozen=True, eq=False)
class MaskedBench(Bench):
    """Masks the base for each candidate; what was measured before is read where measurements are kept."""

    base: BaseRuns
    packs: Mapping[int, Pack]
    eaft: Mapping[str, Any]
    writing: GenerationSpec | None = None
    tokenizer: Any = None

    @classmethod
    def of_part(
        cls,
        load: Callable[[], PreTrainedModel],
        tokens: Mapping[int, CalibrationTokens],
        part: str,
        *,
        batch_tokens: int,
        measures: Measures,
        progress: Progress,
        **settings: Any,
    ) -> MaskedBench:
        packs = packs_of_part(tokens, part)
        return cls(BaseRuns(load, part, packs, batch_tokens, measures, progress), packs, **settings)

    def positions(self, candidate: MaskedCandidate | None, length: int) -> PositionSignals:
        if candidate is None:
            return self.base.signals(length)
        measures = self.base.measures
        return measures.kept.get(
            measures.signals(self.base.part, length, candidate.name, candidate.of),
            lambda work: self._measured(candidate, length),
            save_signals,
            load_signals,
        )

    def _measured(self, candidate: MaskedCandidate, length: int) -> PositionSignals:
        base, model = self.base.outputs(length), self.base.load()
        with candidate.on(model):
            return measure(
                model,
                self.packs[length],
                base,
                batch_tokens=self.base.batch_tokens,
                top_k=self.base.measures.top_k,
                title=f"evaluate {candidate.name}",
                progress=self.base.progress,
            )

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
        return self._written(None)

    def _written(self, candidate: MaskedCandidate | None) -> generation.Written:
        assert self.writing is not None, "prompts are drawn where continuations are asked for"
        name, of = (BASE, BASE) if candidate is None else (candidate.name, candidate.of)
        measures = self.base.measures
        return measures.kept.get(
            measures.continuations(max(self.packs), name, of, self.writing),
            lambda work: self._write(candidate, name),
            generation.save_continuations,
            generation.load_continuations,
        )

    def _write(self, candidate: MaskedCandidate | None, name: str) -> generation.Written:
        assert self.writing is not None, "prompts are drawn where continuations are asked for"
        model = self.base.load()
        with nullcontext() if candidate is None else candidate.on(model):
            return generation.write(
                model,
                self.prompts,
                max_new_tokens=self.writing.max_new_tokens,
                batch_tokens=self.base.batch_tokens,
                title=f"generate {name}",
                progress=self.base.progress,
            )

    def generation(self, candidate: MaskedCandidate | None) -> dict[str, Any]:
        """As `Bench.generation`; None where no generation was asked for or no prompt exists."""
        if not self.prompts:
            return super().generation(candidate)
        base = self._base_written
        written = base if candidate is None else self._written(candidate)
        pack = self.packs[max(self.packs)]
        shares = generation.summarize(base, written, self.prompts, pack.tokens.sources, pack.outside, self.tokenizer)
        shown = (
            generation.examples(base, written, self.prompts, pack.tokens.sources, self.tokenizer)
            if self.tokenizer
            else []
        )
        return {"generation": shares, "examples": shown}
