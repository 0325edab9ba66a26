"""Measures a model directory on disk against the base, for the numbers that the verify stage publishes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.core.progress import SILENT, Progress
from reapkit.evaluation import generation
from reapkit.evaluation.bench import BaseRuns
from reapkit.evaluation.kept_outputs import load_signals, save_signals
from reapkit.evaluation.measures import BASE, Measures, Of
from reapkit.evaluation.metrics.signals import PositionSignals
from reapkit.evaluation.outputs import EAFT, BaseOutputs, Pack, compare, describe_base, measure
from reapkit.model.loading import load_model
from reapkit.recipe.schema import GenerationSpec

FoundBase = tuple[PositionSignals, BaseOutputs]
"""The base's own signals at a pack's positions, and what others are compared with there."""


def final_packs(tokens: Mapping[int, CalibrationTokens]) -> dict[int, tuple[str, Pack]]:
    """By length the part and rows of the final numbers: the confirm rows, or all where none confirm."""
    parts = {length: "confirm" if each.rows("confirm") else "decide" for length, each in tokens.items()}
    return {length: (part, Pack.part(tokens[length], part, length)) for length, part in parts.items()}


@dataclass(frozen=True, eq=False)
class Yardstick:
    """The base on the rows of the final numbers, found once something must be compared with it and kept so that
    directories can be measured after the base has left memory. `find`: by part and length of every pack."""

    places: Mapping[int, tuple[str, Pack]]
    find: Callable[[Mapping[tuple[str, int], Pack]], Mapping[tuple[str, int], FoundBase]]
    eaft: Mapping[str, Any]
    batch_tokens: int
    measures: Measures

    @classmethod
    def of(
        cls,
        load: Callable[[], PreTrainedModel],
        tokens: Mapping[int, CalibrationTokens],
        *,
        eaft: Mapping[str, Any] = EAFT,
        batch_tokens: int = 16384,
        measures: Measures | None = None,
        progress: Progress = SILENT,
    ) -> Yardstick:
        """Of the base that `load` gives, on the confirm rows of each length's pack; on all its rows where it confirms
        nothing."""
        used = measures or Measures(top_k=eaft["top_k"])

        def find(places: Mapping[tuple[str, int], Pack]) -> dict[tuple[str, int], FoundBase]:
            once, found = cache(load), {}
            for (part, length), pack in places.items():
                base = BaseRuns(once, part, {length: pack}, batch_tokens, used, progress)
                found[part, length] = (base.signals(length), base.outputs(length))
            return found

        return cls(final_packs(tokens), find, eaft, batch_tokens, used)

    @cached_property
    def _bases(self) -> dict[int, FoundBase]:
        found = self.find({(part, length): pack for length, (part, pack) in self.places.items()})
        return {length: base for (_, length), base in found.items()}

    @cached_property
    def _of_base(self) -> dict[int, PositionSignals]:
        named = {length: self.measures.signals(part, length, BASE, BASE) for length, (part, _) in self.places.items()}
        kept = {length: self.measures.kept.find(each, load_signals) for length, each in named.items()}
        if all(found is not None for found in kept.values()):
            return {length: found for length, found in kept.items() if found is not None}
        # found before they are kept: finding them may keep the same
        bases = self._bases
        return self.signals(BASE, BASE, lambda: {length: found for length, (found, _) in bases.items()})

    def base(self, length: int) -> BaseOutputs:
        """What others are compared with on the pack of this length."""
        return self._bases[length][1]

    @property
    def base_metrics(self) -> dict[str, Any]:
        """The base's own numbers: `{length: {group: metrics}}`."""
        return {
            str(length): describe_base(self._of_base[length], pack, self.eaft)
            for length, (_, pack) in self.places.items()
        }

    def signals(
        self, name: str, of: Of, measure: Callable[[], Mapping[int, PositionSignals]]
    ) -> dict[int, PositionSignals]:
        """What was measured of `of` before, by length; else what `measure` finds now of all lengths together."""
        named = {length: self.measures.signals(part, length, name, of) for length, (part, _) in self.places.items()}
        once = cache(measure)
        return {
            length: self.measures.kept.get(each, lambda work, length=length: once()[length], save_signals, load_signals)
            for length, each in named.items()
        }

    def metrics(self, found: Mapping[int, PositionSignals]) -> dict[str, Any]:
        """A model's numbers and distances from the base: `{length: {group: metrics}}`, what `gates.judge` reads."""
        return {
            str(length): compare(self._of_base[length], found[length], pack, self.eaft)
            for length, (_, pack) in self.places.items()
        }

    def measure(
        self, model: PreTrainedModel, *, title: str = "verify", progress: Progress = SILENT
    ) -> dict[int, PositionSignals]:
        """What a loaded model says at the measured positions, by length."""
        return {
            length: measure(
                model,
                pack,
                self.base(length),
                batch_tokens=self.batch_tokens,
                top_k=self.eaft["top_k"],
                title=title,
                progress=progress,
            )
            for length, (_, pack) in self.places.items()
        }

    def measure_directory(
        self,
        path: Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        title: str | None = None,
        progress: Progress = SILENT,
    ) -> dict[int, PositionSignals]:
        """Loads the directory, measures it, lets it go. Raises UnusableError where its weights do not fit its class."""
        _ = self._bases  # the base leaves memory before another model is loaded
        model = load_model(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        try:
            return self.measure(model, title=title or f"measure {path.name}", progress=progress)
        finally:
            del model
            gc.collect()


def continued(
    find: Callable[[], Path],
    base: Callable[[], PreTrainedModel],
    pack: Pack,
    spec: GenerationSpec,
    tokenizer: Any = None,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    batch_tokens: int = 16384,
    measures: Measures | None = None,
    of: Of = "",
    title: str = "generate",
    progress: Progress = SILENT,
) -> dict[str, Any] | None:
    """What the model of the directory that `find` gives writes after the prompts that `evaluate` drew from the pack,
    beside what `base` wrote: `{"generation": {group: shares over continuations}, "examples": [{"source", "prompt",
    "text"}]}`; None where the pack gives no prompt. A model is loaded only where `measures` does not find what it wrote
    before, one at a time. Examples need a tokenizer.
    """
    prompts = generation.draw_prompts(pack, spec.prompts)
    if not prompts:
        return None
    used = measures or Measures()

    def written(name: str, of: Of, load: Callable[[], PreTrainedModel]) -> generation.Written:
        def write(work: Path | None) -> generation.Written:
            model = load()
            try:
                return generation.write(
                    model,
                    prompts,
                    max_new_tokens=spec.max_new_tokens,
                    batch_tokens=batch_tokens,
                    title=f"generate {name}",
                    progress=progress,
                )
            finally:
                del model
                gc.collect()

        measure = used.continuations(pack.length, name, of, spec)
        return used.kept.get(measure, write, generation.save_continuations, generation.load_continuations)

    of_base = written(BASE, BASE, base)
    own = written(
        title.removeprefix("generate "),
        of,
        lambda: load_model(find(), device=device, trust_remote_code=trust_remote_code),
    )
    sources = pack.tokens.sources
    shares = generation.summarize(of_base, own, prompts, sources, pack.outside, tokenizer)
    shown = generation.examples(of_base, own, prompts, sources, tokenizer) if tokenizer else []
    return {
        "generation": shares,
        "examples": [{"source": each["source"], "prompt": each["prompt"], "text": each["candidate"]} for each in shown],
    }
