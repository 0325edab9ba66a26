"""Evaluates a model of any size in one pass: base and candidates go through each decoder layer while it is in
memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reapkit.calibration.packing import PARTS
from reapkit.calibration.tokens import Batch, CalibrationTokens, batches
from reapkit.core.progress import SILENT, Progress
from reapkit.evaluation.bench import Bench, MaskedCandidate, packs_of_part
from reapkit.evaluation.candidates import give_verdict
from reapkit.evaluation.directory import FoundBase, Yardstick, final_packs
from reapkit.evaluation.gates import Gate
from reapkit.evaluation.head import require_same_logits
from reapkit.evaluation.kept_outputs import hidden_file, load_hidden, load_signals, save_hidden, save_signals
from reapkit.evaluation.linear import fast_linear
from reapkit.evaluation.measures import BASE, Measures
from reapkit.evaluation.metrics.signals import PositionSignals
from reapkit.evaluation.outputs import (
    EAFT,
    BaseOutputs,
    Pack,
    base_head,
    compare_hidden,
    describe_hidden,
    refuse_broken,
)
from reapkit.model.loading import final_hidden, head_logits
from reapkit.model.streaming.layer_pass import LayerPass
from reapkit.model.streaming.layers import LayeredModel
from reapkit.model.streaming.lockstep import Forward

PROBE_TOKENS = 16
Place = tuple[str, int]
"""Part and row length of a pack."""


@dataclass(frozen=True, eq=False)
class StreamedBench(Bench):
    """Numbers of a pass that has measured the base and every candidate."""

    part: str
    packs: Mapping[int, Pack]
    eaft: Mapping[str, Any]
    found: Mapping[tuple[str, Place], PositionSignals]
    measures_all = True

    def positions(self, candidate: MaskedCandidate | None, length: int) -> PositionSignals:
        return self.found[BASE if candidate is None else candidate.name, (self.part, length)]


@dataclass(frozen=True)
class Streaming:
    """How passes go: positions at a time, bytes of waiting hidden states that the host holds, where the others wait."""

    batch_tokens: int = 16384
    hidden_bytes: int | None = None
    offload_directory: Path | None = None
    progress: Progress = SILENT


def evaluate_streaming(
    load: Callable[[], LayeredModel],
    packs: Mapping[int, CalibrationTokens],
    candidates: Sequence[MaskedCandidate],
    gates: Sequence[Gate],
    *,
    controls: Sequence[MaskedCandidate] = (),
    eaft: Mapping[str, Any] = EAFT,
    pack_samples: int | None = None,
    steps: Mapping[str, Any] = MappingProxyType({}),
    measures: Measures | None = None,
    **how: Any,
) -> dict[str, Any]:
    """As `candidates.evaluate`, with one or two decoder layers in memory; generation is not measured. `how`: the
    fields of `Streaming`.

    Every weight is read once, for what `measures` does not find. Waiting hidden states of base and candidates take
    (1 + candidates) x tokens x hidden numbers, on the host and, beyond `hidden_bytes`, in `offload_directory`. A killed
    pass begins again.
    """
    by_part = {part: packs_of_part(packs, part) for part in PARTS}
    places = {(part, length): pack for part, of_part in by_part.items() for length, pack in of_part.items()}
    tried = {each.name: each for each in (*candidates, *controls)}
    found = _found(load, places, tried, measures or Measures(top_k=eaft["top_k"]), Streaming(**how))
    decide, confirm = (StreamedBench(part, by_part[part], eaft, found) for part in PARTS)
    return give_verdict(decide, confirm, candidates, gates, controls=controls, pack_samples=pack_samples, steps=steps)


def _found(
    load: Callable[[], LayeredModel],
    places: Mapping[Place, Pack],
    tried: Mapping[str, MaskedCandidate],
    measures: Measures,
    how: Streaming,
) -> dict[tuple[str, Place], PositionSignals]:
    """The signals of the base and of everything that is tried, by name and pack: in one pass those that nobody has
    measured yet."""
    of = {BASE: BASE} | {name: each.of for name, each in tried.items()}
    named = {(name, place): measures.signals(*place, name, of[name]) for name in of for place in places}
    sought = {at: measures.kept.find(each, load_signals) for at, each in named.items()}
    known = {at: positions for at, positions in sought.items() if positions is not None}
    missing = {name for name, place in named if (name, place) not in known}
    if not missing:
        return known
    candidates = {name: each for name, each in tried.items() if name in missing}
    bases, measured = _PackPass(load(), places, candidates, measures, how).run()
    return known | measured | {(BASE, place): positions for place, (positions, _) in bases.items()}


def yardstick_streaming(
    load: Callable[[], LayeredModel],
    packs: Mapping[int, CalibrationTokens],
    *,
    eaft: Mapping[str, Any] = EAFT,
    measures: Measures | None = None,
    **how: Any,
) -> Yardstick:
    """As `Yardstick.of`, of a base that never is in memory as a whole. `how`: the fields of `Streaming`."""
    used, settings = measures or Measures(top_k=eaft["top_k"]), Streaming(**how)

    def find(places: Mapping[Place, Pack]) -> dict[Place, FoundBase]:
        return _PackPass(load(), places, {}, used, settings).run()[0]

    return Yardstick(final_packs(packs), find, eaft, settings.batch_tokens, used)


def measure_streaming(yardstick: Yardstick, layered: LayeredModel, **how: Any) -> dict[int, PositionSignals]:
    """As `Yardstick.measure`, of a model that never is in memory as a whole. `how`: the fields of `Streaming`."""
    places = {(part, length): pack for length, (part, pack) in yardstick.places.items()}
    settings = Streaming(**{"batch_tokens": yardstick.batch_tokens, **how})
    own, _ = _PackPass(layered, places, {}, Measures(top_k=yardstick.eaft["top_k"]), settings).run()
    found = {}
    for (_, length), (_, outputs) in own.items():
        base = yardstick.base(length)
        positions = compare_hidden(
            layered.model, outputs.hidden, base, 0, base_head(layered.model, base), yardstick.eaft["top_k"]
        )
        found[length] = refuse_broken(positions, f"verify {layered.path.name}")
    return found


@dataclass(eq=False)
class _PackBatch:
    """One batch of a pack, on its way through the base (`name` None) or a candidate."""

    name: str | None
    place: Place
    batch: Batch
    forward: Forward = field(init=False)
    hidden: Tensor = field(init=False)


class _PackPass:
    """Every batch of every pack through the base and all candidates, layer by layer; not through a base whose hidden
    states are kept."""

    def __init__(
        self,
        layered: LayeredModel,
        places: Mapping[Place, Pack],
        candidates: Mapping[str, MaskedCandidate],
        measures: Measures,
        how: Streaming,
    ):
        self.layered, self.places, self.candidates, self.measures, self.how = layered, places, candidates, measures, how
        self.layer_pass = LayerPass(layered, how.hidden_bytes, how.offload_directory)
        kept = {place: measures.kept.find(measures.hidden(*place), load_hidden) for place in places}
        self.kept = {place: hidden for place, hidden in kept.items() if hidden is not None}
        names = (*(() if len(self.kept) == len(places) else (None,)), *candidates)
        self.variants: dict[str | None, list[_PackBatch]] = {name: list(self._items(name)) for name in names}

    def _items(self, name: str | None) -> Iterator[_PackBatch]:
        for place, pack in self.places.items():
            for batch in batches(pack.tokens, pack.rows, self.how.batch_tokens):
                yield _PackBatch(name, place, batch)

    @torch.no_grad()
    def run(self) -> tuple[dict[Place, FoundBase], dict[tuple[str, Place], PositionSignals]]:
        """The base by pack, each candidate's signals by name and pack."""
        layered, last = self.layered, len(self.layered.layers) - 1
        layered.load_rest()
        found: dict[tuple[str, Place], PositionSignals] = {}
        bases: dict[Place, FoundBase] = {}
        if None not in self.variants:
            bases = {place: self._described(place, hidden) for place, hidden in self.kept.items()}
        if not self.variants:
            return bases, found
        with (
            self.layer_pass as layer_pass,
            self.how.progress.task("evaluate", total=last + 1, unit="layers") as task,
            fast_linear(layered.model),
        ):
            probe = _Probe(layer_pass, layered.model, self._probe_ids())
            for item in (item for items in self.variants.values() for item in items):
                item.forward = layer_pass.begin(lambda item=item: self._finish(item))
            for layer in layer_pass.through(range(last + 1), task):
                probe.advance()
                for name, items in self.variants.items():
                    with self._as_candidate(name, layer):
                        for item in items:
                            layer_pass.advance(item.forward)
                    if layer == last:
                        self._collect(name, items, bases, found)
        return bases, found

    def _probe_ids(self) -> Tensor:
        pack = next(iter(self.places.values()))
        return pack.tokens.row(pack.rows[0]).input_ids[:PROBE_TOKENS].unsqueeze(0).to(self.layered.device)

    def _as_candidate(self, name: str | None, layer: int) -> AbstractContextManager:
        """The mask of a candidate, over the one layer that has weights."""
        if name is None:
            return nullcontext()
        return self.candidates[name].on(self.layered.model, (layer,))

    def _finish(self, item: _PackBatch) -> None:
        """A batch's own forward: pauses before every layer, then leaves the hidden states of its measured positions."""
        batch, device = item.batch, self.layered.device
        positions = None if batch.position_ids is None else batch.position_ids.to(device)
        hidden = final_hidden(self.layered.model, batch.input_ids.to(device), positions)
        item.hidden = hidden[batch.signal.to(hidden.device)].cpu()

    def _collect(
        self,
        name: str | None,
        items: Sequence[_PackBatch],
        bases: dict[Place, FoundBase],
        found: dict[tuple[str, Place], PositionSignals],
    ) -> None:
        for place in self.places:
            mine = [item for item in items if item.place == place]
            hidden = torch.cat([item.hidden for item in mine])
            for item in mine:
                del item.hidden
            if name is None:
                bases[place] = self._described(place, self._kept(hidden, place))
            else:
                found[name, place] = self._compared(name, place, hidden, bases[place][1])

    def _compared(self, name: str, place: Place, hidden: Tensor, base: BaseOutputs) -> PositionSignals:
        def compared(work: Path | None) -> PositionSignals:
            model = self.layered.model
            positions = compare_hidden(model, hidden, base, 0, base_head(model, base), self.measures.top_k)
            return refuse_broken(positions, f"evaluate {name}")

        measure = self.measures.signals(*place, name, self.candidates[name].of)
        return self.measures.kept.get(measure, compared, save_signals, load_signals)

    def _described(self, place: Place, hidden: Tensor) -> FoundBase:
        """The base, from its hidden states, which stay until the last candidate is compared."""
        model, pack = self.layered.model, self.places[place]
        positions = self.measures.kept.get(
            self.measures.signals(*place, BASE, BASE),
            lambda work: describe_hidden(model, pack, hidden, self.measures.top_k),
            save_signals,
            load_signals,
        )
        return positions, BaseOutputs.of(model, pack, hidden)

    def _kept(self, hidden: Tensor, place: Place) -> Tensor:
        """The base's hidden states, out of memory where there is a place for them."""
        measures, directory = self.measures, self.how.offload_directory
        if measures.kept.keeps:
            return measures.kept.get(measures.hidden(*place), lambda work: hidden, save_hidden, load_hidden)
        if directory is None:
            return hidden
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"base-{place[0]}-{place[1]}.bin"
        mapped = hidden_file(path, len(hidden), hidden.shape[-1], hidden.dtype)
        path.unlink()  # the mapping keeps the bytes until it is gone
        return mapped.copy_(hidden)


class _Probe:
    """A few tokens whose logits the model makes itself, beside those made of their hidden states: proof that they
    suffice."""

    def __init__(self, layer_pass: LayerPass, model: PreTrainedModel, input_ids: Tensor):
        self.layer_pass, self.model, self.made = layer_pass, model, {}

        def logits() -> None:
            self.made["logits"] = model(input_ids=input_ids, use_cache=False).logits[0].float()

        def hidden() -> None:
            self.made["hidden"] = final_hidden(model, input_ids)[0]

        self.forwards = [layer_pass.begin(run, park=False) for run in (logits, hidden)]

    def advance(self) -> None:
        """Through the next layer; after the last one raises UnusableError where the two disagree."""
        for forward in self.forwards:
            self.layer_pass.advance(forward, park=False)
        if len(self.made) == 2:
            require_same_logits(self.model, self.made["logits"], head_logits(self.model, self.made["hidden"]))
