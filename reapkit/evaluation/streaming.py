"""Evaluates a model of any size in one pass: base and candidates go through each decoder layer while it is in
memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reapkit.calibration.tokens import PARTS, Batch, CalibrationTokens, batches
from reapkit.core.progress import SILENT, Progress
from reapkit.evaluation.bench import Bench, MaskedCandidate, packs_of_part
from reapkit.evaluation.candidates import give_verdict
from reapkit.evaluation.directory import Yardstick, final_packs
from reapkit.evaluation.gates import Gate
from reapkit.evaluation.head import require_same_logits
from reapkit.evaluation.linear import fast_linear
from reapkit.evaluation.metrics.signals import PositionSignals
from reapkit.evaluation.outputs import (
    EAFT,
    BaseOutputs,
    Pack,
    base_head,
    compare,
    compare_hidden,
    hidden_file,
    outputs_of,
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
    """Numbers of a pass that has measured every candidate."""

    packs: Mapping[int, Pack]
    eaft: Mapping[str, Any]
    bases: Mapping[int, BaseOutputs]
    found: Mapping[tuple[str, int], PositionSignals]
    measures_all = True

    def positions(self, candidate: MaskedCandidate, length: int) -> PositionSignals:
        return self.found[candidate.name, length]


def evaluate_streaming(
    layered: LayeredModel,
    packs: Mapping[int, CalibrationTokens],
    candidates: Sequence[MaskedCandidate],
    gates: Sequence[Gate],
    *,
    controls: Sequence[MaskedCandidate] = (),
    eaft: Mapping[str, Any] = EAFT,
    pack_samples: int | None = None,
    steps: Mapping[str, Any] = MappingProxyType({}),
    batch_tokens: int = 16384,
    hidden_bytes: int | None = None,
    offload_directory: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """As `candidates.evaluate`, with one or two decoder layers in memory; generation is not measured.

    Every weight is read once. Waiting hidden states of base and candidates take (1 + candidates) x tokens x hidden
    numbers, on the host and, beyond `hidden_bytes`, in `offload_directory`. A killed pass begins again.
    """
    by_part = {part: packs_of_part(packs, part) for part in PARTS}
    places = {(part, length): pack for part, of_part in by_part.items() for length, pack in of_part.items()}
    tried = {each.name: each for each in (*candidates, *controls)}
    layer_pass = LayerPass(layered, hidden_bytes, offload_directory)
    bases, found = _PackPass(layered, layer_pass, places, tried, batch_tokens, eaft["top_k"], offload_directory).run(
        progress
    )
    decide, confirm = (
        StreamedBench(
            by_part[part],
            eaft,
            {length: bases[part, length] for length in by_part[part]},
            {(name, place[1]): positions for (name, place), positions in found.items() if place[0] == part},
        )
        for part in PARTS
    )
    return give_verdict(decide, confirm, candidates, gates, controls=controls, pack_samples=pack_samples, steps=steps)


def yardstick_streaming(
    layered: LayeredModel,
    packs: Mapping[int, CalibrationTokens],
    *,
    eaft: Mapping[str, Any] = EAFT,
    batch_tokens: int = 16384,
    hidden_bytes: int | None = None,
    offload_directory: Path | None = None,
    progress: Progress = SILENT,
) -> Yardstick:
    """As `Yardstick.of`, of a base that never is in memory as a whole."""
    final = final_packs(packs)
    bases, _ = _PackPass(
        layered,
        LayerPass(layered, hidden_bytes, offload_directory),
        {("final", length): pack for length, pack in final.items()},
        {},
        batch_tokens,
        eaft["top_k"],
        offload_directory,
    ).run(progress)
    return Yardstick(final, {length: bases["final", length] for length in final}, eaft, batch_tokens)


def measure_streaming(
    yardstick: Yardstick,
    layered: LayeredModel,
    *,
    hidden_bytes: int | None = None,
    offload_directory: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """As `Yardstick.measure`, of a model that never is in memory as a whole."""
    own = yardstick_streaming(
        layered,
        {length: pack.tokens for length, pack in yardstick.packs.items()},
        eaft=yardstick.eaft,
        batch_tokens=yardstick.batch_tokens,
        hidden_bytes=hidden_bytes,
        offload_directory=offload_directory,
        progress=progress,
    )
    found = {}
    for length, pack in yardstick.packs.items():
        base = yardstick.bases[length]
        positions = compare_hidden(
            layered.model, own.bases[length].hidden, base, 0, base_head(layered.model, base), yardstick.eaft["top_k"]
        )
        found[str(length)] = compare(
            base, refuse_broken(positions, f"verify {layered.path.name}"), pack, yardstick.eaft
        )
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
    """Every batch of every pack through the base and all candidates, layer by layer."""

    def __init__(
        self,
        layered: LayeredModel,
        layer_pass: LayerPass,
        places: Mapping[Place, Pack],
        candidates: Mapping[str, MaskedCandidate],
        batch_tokens: int,
        top_k: int,
        directory: Path | None,
    ):
        self.layered, self.layer_pass, self.places, self.candidates = layered, layer_pass, places, candidates
        self.top_k, self.directory = top_k, directory
        self.variants: dict[str | None, list[_PackBatch]] = {
            name: list(self._items(name, batch_tokens)) for name in (None, *candidates)
        }

    def _items(self, name: str | None, batch_tokens: int) -> Iterator[_PackBatch]:
        for place, pack in self.places.items():
            for batch in batches(pack.tokens, pack.rows, batch_tokens):
                yield _PackBatch(name, place, batch)

    @torch.no_grad()
    def run(self, progress: Progress) -> tuple[dict[Place, BaseOutputs], dict[tuple[str, Place], PositionSignals]]:
        """The base's outputs by pack, each candidate's signals by name and pack."""
        layered, last = self.layered, len(self.layered.layers) - 1
        layered.load_rest()
        bases: dict[Place, BaseOutputs] = {}
        found: dict[tuple[str, Place], PositionSignals] = {}
        with (
            self.layer_pass as layer_pass,
            progress.task("evaluate", total=last + 1, unit="layers") as task,
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
        bases: dict[Place, BaseOutputs],
        found: dict[tuple[str, Place], PositionSignals],
    ) -> None:
        for place, pack in self.places.items():
            hidden = torch.cat([item.hidden for item in items if item.place == place])
            if name is None:
                bases[place] = outputs_of(self.layered.model, pack, self._kept(hidden, place), self.top_k)
            else:
                base = bases[place]
                positions = compare_hidden(
                    self.layered.model, hidden, base, 0, base_head(self.layered.model, base), self.top_k
                )
                found[name, place] = refuse_broken(positions, f"evaluate {name}")
        for item in items:
            del item.hidden  # candidates' wait for no one

    def _kept(self, hidden: Tensor, place: Place) -> Tensor:
        """The base's hidden states stay until the last candidate is compared: on disk where there is a directory."""
        if self.directory is None:
            return hidden
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"base-{place[0]}-{place[1]}.bin"
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
