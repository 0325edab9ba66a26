"""Observes a model of any size: one decoder layer is in memory, the next is being read, and all batches wait in front
of it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from reapkit.calibration.tokens import CalibrationTokens, batches
from reapkit.core.atomic_files import write_text
from reapkit.core.progress import SILENT, Progress, Task
from reapkit.core.ranks import ALONE, Alone
from reapkit.model.expert_pairs import Pairs
from reapkit.model.loading import final_hidden
from reapkit.model.routed_experts import RoutedExperts
from reapkit.model.streaming.layer_pass import LayerPass, in_turn
from reapkit.model.streaming.layers import LayeredModel
from reapkit.model.streaming.lockstep import Forward
from reapkit.observation.accumulate import LayerSums, Positions, refuse_unusable
from reapkit.observation.mtp_blocks import MtpBlocks
from reapkit.observation.observation import Observation
from reapkit.observation.partial_files import load_partial, save_by_rename
from reapkit.observation.reroute_sample import Capture
from reapkit.observation.session import BatchWatch, Session
from reapkit.observation.wave_sums import WaveSums, assemble
from reapkit.observation.waves import Wave, covering, drop_inputs, finished, plan_waves
from reapkit.recipe.schema import ObserveSpec


@torch.no_grad()
def observe_streaming(
    path: str | Path,
    tokens: CalibrationTokens,
    spec: ObserveSpec,
    *,
    batch_tokens: int,
    work_directory: Path,
    device: str = "cpu",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    identity: str | None = None,
    hidden_bytes: int | None = None,
    offload_directory: Path | None = None,
    checkpoint_minutes: float = 10,
    reading: Callable[[list[str]], None] | None = None,
    progress: Progress = SILENT,
    ranks: Alone = ALONE,
    mtp: Sequence[int] = (),
) -> Observation | None:
    """The same observation as `resident.observe` of the loaded checkpoint, with one or two decoder layers in memory.

    `mtp`: multi-token-prediction layers that are observed too; they stay in memory, and run where a batch leaves the
    last decoder layer.

    `hidden_bytes`: budget for the paused batches' hidden states on the host; beyond it they go to `offload_directory`,
    or, without one, the rows run in waves that each read the weights once. Killed and run again with the same arguments
    it continues: layers' sums are kept as they finish, hidden states every `checkpoint_minutes`. `reading` is told the
    shards that are read next.

    EAFT material that goes into a table waits on disk until its cells' edges are known: without a budget that cuts the
    rows into waves, until all have passed, and the edges are all positions' quantiles; else until rank 0's first wave
    has passed, and they are its.

    With several `ranks` each calls this and takes its share of the row groups through all layers, reading the shards
    itself; rank 0 returns the observation, the others None. One rank that reads and broadcasts would be slower: on one
    machine the second reader finds the shards in the page cache (two readers at once: 1.8 GB/s each on 2 busy cores,
    where gloo broadcasts 0.9 GB/s), and several machines read side by side; ranks also need not wait for each other at
    every layer.
    """
    layered = LayeredModel(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    layered.reading = reading
    blocks = MtpBlocks(layered.as_source(), mtp, layered.device) if mtp else None
    session = Session.open(
        layered.model,
        tokens,
        spec,
        batch_tokens=batch_tokens,
        work_directory=work_directory,
        identity=identity,
        placement="streaming",
        device=layered.device,
        ranks=ranks,
        mtp=blocks,
    )
    waves = _my_waves(session, layered, batch_tokens, None if offload_directory else hidden_bytes, ranks)
    layered.load_rest()
    layer_pass = LayerPass(layered, hidden_bytes, offload_directory)
    pass_ = _WavePass(layered, layer_pass, session, batch_tokens, checkpoint_minutes, alone=ranks.world == 1)
    with (
        layer_pass,
        session.sampling(),
        session.watching(pass_.watch),
        progress.task("observe", total=len(waves) * len(layered.layers), unit="layers") as task,
    ):
        for wave in waves:
            pass_.run(wave, task)
            if session.table is not None and ranks.rank == 0 and _cut(waves):
                session.table.set_edges_of(wave.groups)
                session.table.add_in_order(finished(session.directory).__contains__)
        ranks.meet("sums", session.directory)
    if session.table is not None and ranks.rank == 0:
        session.table.set_edges_of(range(len(tokens.groups)))
        session.table.add_in_order(finished(session.directory).__contains__)
    if session.sample is not None:
        _finish_sample(session.sample, layered, ranks)
        ranks.meet("sample", session.directory)
    if ranks.rank:
        return None
    drop_inputs(session.directory)
    return session.observation(*assemble(session))


def _my_waves(
    session: Session, layered: LayeredModel, batch_tokens: int, budget: int | None, ranks: Alone
) -> list[Wave]:
    """This rank's, by rank 0's plan of what is left to do."""

    def plan() -> list[list[Any]]:
        tokens, width = session.tokens, layered.model.config.get_text_config().hidden_size * layered.dtype.itemsize
        cost = {
            group: width * sum(batch.input_ids.numel() for batch in batches(tokens, rows, batch_tokens))
            for group, rows in enumerate(tokens.groups)
        }
        shares = plan_waves(session.directory, cost, ranks.world, len(layered.layers), budget)
        return [[astuple(wave) for wave in share] for share in shares]

    mine = ranks.agreed("waves", plan)[ranks.rank]
    return [Wave(tuple(groups), start, taken_from) for groups, start, taken_from in mine]


def _cut(waves: Sequence[Wave]) -> bool:
    """Whether the budget made several waves of what could have passed together."""
    return len(waves) > len({(wave.start, wave.taken_from) for wave in waves})


def _finish_sample(sample: Capture, layered: LayeredModel, ranks: Alone) -> None:
    """Paths of the layers that no wave could find alone: its other groups were still to come, or with another rank."""
    unfinished = {site.layer for site in sample.unfinished()}
    mine = {site.layer: site for site in sample.sites[ranks.rank :: ranks.world]}
    for layer in mine:
        if layer not in unfinished:
            sample.finish(mine[layer])
    for layer in in_turn(layered, [layer for layer in mine if layer in unfinished]):
        sample.finish(mine[layer])


@dataclass(eq=False)
class _Waiting:
    """A batch whose forward is under way."""

    watch: BatchWatch
    group: int
    number: int
    forward: Forward = field(init=False)

    @property
    def name(self) -> str:
        return f"{self.group:05d}-{self.number:04d}"


class _WavePass:
    """One wave of row groups through all layers."""

    def __init__(
        self,
        layered: LayeredModel,
        layer_pass: LayerPass,
        session: Session,
        batch_tokens: int,
        checkpoint_minutes: float,
        *,
        alone: bool,
    ):
        self.root, self.alone = session.directory, alone
        self.layered, self.layer_pass, self.session = layered, layer_pass, session
        self.batch_tokens, self.checkpoint_seconds = batch_tokens, 60 * checkpoint_minutes
        self.current: BatchWatch | None = None
        self.sums: dict[int, LayerSums] = {}
        self.num_experts = max(site.num_experts for site in session.sites)

    def watch(self) -> BatchWatch:
        """Of the batch whose forward runs."""
        return cast(BatchWatch, self.current)

    def run(self, wave: Wave, task: Task) -> None:
        waiting = list(self._batches(wave.groups))
        saved = (
            json.loads((self.root / wave.taken_from / "facts.json").read_text(encoding="utf-8"))
            if wave.taken_from
            else None
        )
        with self.layer_pass.starting_at(wave.start, saved["returns_tuple"] if saved else ()):
            for item in waiting:
                self.current = item.watch
                item.forward = self.layer_pass.begin(self._forward(item), park=saved is None)
        if saved and not self._restore(wave, saved["checksums"], waiting):
            self.layer_pass.forget([item.forward for item in waiting])
            return self.run(Wave(wave.groups), task)
        task.advance(wave.start)
        directory = wave.directory(self.root)
        self._through_layers(directory, wave.start, waiting, task)
        self.layer_pass.forget([item.forward for item in waiting])
        write_text(directory / "done", "")
        for inputs in directory.glob("inputs-*"):
            shutil.rmtree(inputs)

    def _through_layers(self, directory: Path, start: int, waiting: list[_Waiting], task: Task) -> None:
        count, last_checkpoint = len(self.layered.layers), time.monotonic()
        for layer in self.layer_pass.through(range(start, count), task):
            self._one_layer(directory, layer, waiting)
            if (
                layer + 1 < count
                and self.layer_pass.outputs_are_hidden_states
                and time.monotonic() - last_checkpoint >= self.checkpoint_seconds
            ):
                self._save_inputs(directory, layer + 1, waiting)
                last_checkpoint = time.monotonic()

    def _one_layer(self, directory: Path, layer: int, waiting: list[_Waiting]) -> None:
        """Every batch through one layer, and behind the last one through what follows it; their sums are kept once all
        have passed."""
        sites = self._sites_at(layer)
        totals = {site.layer: WaveSums() for site in sites}
        for group in sorted({item.group for item in waiting}):
            self.sums = {
                site.layer: LayerSums(len(self.session.tokens.sources), self.num_experts, self.layered.device)
                for site in sites
            }
            for item in (item for item in waiting if item.group == group):
                self.current = item.watch
                self.layer_pass.advance(item.forward)
                for site in sites:
                    item.watch.write_routed(site.layer)
            self.session.keep_sample(group, [layer])
            for site in sites:
                tensors = self.sums[site.layer].tensors()
                refuse_unusable(site, tensors)
                totals[site.layer].add(group, tensors)
        for site in sites:
            totals[site.layer].save(directory / f"layer-{site.layer:04d}.safetensors")
            if (
                self.session.sample is not None
                and site in self.session.sample.sites
                and self.alone
                and self._is_complete(layer)
            ):
                self.session.sample.finish(site)

    def _sites_at(self, layer: int) -> list[RoutedExperts]:
        """The experts that are called between this layer's call and the next one's."""
        last = len(self.layered.layers) - 1
        return [site for site in self.session.sites if min(site.layer, last) == layer]

    def _is_complete(self, layer: int) -> bool:
        """Whether every row group has passed the layer."""
        try:
            return bool(covering(self.root, f"layer-{layer:04d}.safetensors", len(self.session.tokens.groups)))
        except FileNotFoundError:
            return False

    def _batches(self, groups: Sequence[int]) -> Iterator[_Waiting]:
        for group in groups:
            at = self.session.trace_start[group] if self.session.trace is not None else 0
            for number, batch in enumerate(
                batches(self.session.tokens, self.session.tokens.groups[group], self.batch_tokens)
            ):
                watch = BatchWatch(self.session, batch, self._add, at)
                at += watch.num_signals
                yield _Waiting(watch, group, number)

    def _add(self, site: RoutedExperts, pairs: Pairs, positions: Positions, residual: Tensor) -> None:
        self.sums[site.layer].add(pairs, positions, residual)

    def _forward(self, item: _Waiting) -> Callable[[], None]:
        batch, device, model = item.watch.batch, self.layered.device, self.layered.model

        def run() -> None:
            positions = None if batch.position_ids is None else batch.position_ids.to(device)
            hidden = final_hidden(model, batch.input_ids.to(device), positions)
            item.watch.predict_further(hidden)
            item.watch.finish(model, hidden)

        return run

    # -------------------------------------------------------------------------------------- surviving a kill

    def _save_inputs(self, wave: Path, layer: int, waiting: list[_Waiting]) -> None:
        """What every batch will hand to `layer`, complete once its `facts.json` is there."""
        directory, checksums = wave / f"inputs-{layer:04d}", {}
        directory.mkdir(exist_ok=True)
        for item in waiting:
            with self.layer_pass.at_hand(item.forward) as hidden:
                save_by_rename({"hidden": hidden}, directory / f"{item.name}.safetensors")
                checksums[item.name] = item.forward.others()
        facts = {"returns_tuple": self.layer_pass.output_kinds(layer), "checksums": checksums}
        write_text(directory / "facts.json", json.dumps(facts))
        for older in wave.glob("inputs-*"):
            if older != directory:
                shutil.rmtree(older)

    def _restore(self, wave: Wave, checksums: Mapping[str, int], waiting: list[_Waiting]) -> bool:
        """Hands every forward its saved hidden states; False where earlier layers left more behind than those."""
        for item in waiting:
            if item.forward.others() != checksums[item.name]:
                return False
            file = self.root / cast(str, wave.taken_from) / f"{item.name}.safetensors"
            item.forward.replace_hidden(load_partial(file, device=str(self.layered.device))["hidden"])
            self.layer_pass.park(item.forward)
        return True
