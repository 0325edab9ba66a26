"""Observation of a model of any size: one decoder layer in memory, the next being read, every batch waiting in front of it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reapkit.calibration.tokens import CalibrationTokens, batches
from reapkit.models import final_hidden
from reapkit.observation import Observation
from reapkit.observe.accumulate import LayerSums, Positions, refuse_unusable
from reapkit.observe.experts import Experts, Pairs, RoutedExperts, intercepted
from reapkit.observe.layers import LayeredModel
from reapkit.observe.lockstep import Forward, Lockstep, Spool
from reapkit.observe.session import BatchWatch, Session
from reapkit.observe.table import add_in_order
from reapkit.observe.totals import RunningTotal, assemble, save_by_rename
from reapkit.progress import SILENT, Progress
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
) -> Observation:
    """The same observation as `resident.observe` of the loaded checkpoint, with one or two decoder layers in memory.

    `hidden_bytes`: budget for the paused batches' hidden states on the host; beyond it they go to `offload_directory`, or,
    without one, the rows run in waves that each read the weights once. Killed and run again with the same arguments it
    continues: layers' sums are kept as they finish, hidden states every `checkpoint_minutes`. `reading` is told the shards that
    are read next.
    """
    layered = LayeredModel(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    layered.reading = reading
    waves = plan_waves(tokens, batch_tokens, layered, None if offload_directory else hidden_bytes)
    session = Session.open(
        layered.model,
        tokens,
        spec,
        batch_tokens=batch_tokens,
        work_directory=work_directory,
        identity=identity,
        placement="streaming",
        device=layered.device,
        waves=[wave.stop for wave in waves],
    )
    layered.load_rest()
    pass_ = _Pass(layered, session, batch_tokens, hidden_bytes, offload_directory, checkpoint_minutes)
    with (
        Lockstep(layered.layers) as lockstep,
        session.sampling(),
        ThreadPoolExecutor(1, thread_name_prefix="layer-reader") as reader,
        intercepted(session.sites, pass_.on_experts),
        progress.task("observe", total=len(waves) * len(layered.layers), unit="layers") as task,
    ):
        for number, wave in enumerate(waves):
            if not pass_.finished(number):
                pass_.run(number, wave, lockstep, reader, lambda layer: task.note(f"layer {layer}"), task.advance)
    return session.observation(*assemble(session, len(waves) - 1))


def plan_waves(tokens: CalibrationTokens, batch_tokens: int, layered: LayeredModel, hidden_bytes: int | None) -> list[range]:
    """Consecutive row groups whose hidden states fit the budget together; one wave where there is none."""
    groups = range(len(tokens.groups))
    if hidden_bytes is None:
        return [groups]
    width = layered.model.config.get_text_config().hidden_size * layered.dtype.itemsize
    waves, start, used = [], 0, 0
    for group in groups:
        needed = width * sum(batch.input_ids.numel() for batch in batches(tokens, tokens.groups[group], batch_tokens))
        if group > start and used + needed > hidden_bytes:
            waves.append(range(start, group))
            start, used = group, 0
        used += needed
    return [*waves, range(start, len(groups))]


@dataclass(eq=False)
class _Waiting:
    """A batch whose forward is under way."""

    watch: BatchWatch
    group: int
    number: int
    forward: Forward = field(init=False)


class _Pass:
    """One wave of row groups through all layers."""

    def __init__(
        self,
        layered: LayeredModel,
        session: Session,
        batch_tokens: int,
        hidden_bytes: int | None,
        offload_directory: Path | None,
        checkpoint_minutes: float,
    ):
        self.layered, self.session, self.batch_tokens = layered, session, batch_tokens
        self.spool, self.checkpoint_seconds = Spool(layered.device, hidden_bytes, offload_directory), 60 * checkpoint_minutes
        self.site_of = {site.layer: site for site in session.sites}
        self.current: BatchWatch | None = None
        self.sums: LayerSums | None = None
        self.num_experts = max(site.num_experts for site in session.sites)

    def on_experts(self, site: RoutedExperts, hidden: Tensor, index: Tensor, gates: Tensor, inner: Experts) -> Tensor:
        return self.current(site, hidden, index, gates, inner)

    def finished(self, wave: int) -> bool:
        return self._file(wave, "done").exists()

    def run(
        self,
        wave: int,
        groups: range,
        lockstep: Lockstep,
        reader: ThreadPoolExecutor,
        note: Callable[[int], None],
        advance: Callable[[float], None],
    ) -> None:
        table = self.session.table
        if table is not None:
            table.begin(groups)
        waiting = list(self._batches(groups))
        start, saved = self._checkpoint(wave, len(waiting))
        lockstep.start_at(start, saved["returns_tuple"] if saved else ())
        for item in waiting:
            item.forward = lockstep.forward(self._forward(item))
            self.current = item.watch
            item.forward.advance()
            if not saved:
                self._park(item)
        if saved and not self._restore(wave, start, saved, waiting):
            lockstep.forget([item.forward for item in waiting])
            shutil.rmtree(self._inputs(wave, start))
            return self.run(wave, groups, lockstep, reader, note, advance)
        advance(start)
        self._through_layers(wave, start, waiting, lockstep, reader, note, advance)
        lockstep.forget([item.forward for item in waiting])
        lockstep.start_at(0, ())
        if table is not None:
            table.set_edges_of_spool()
            earlier = self._file(wave - 1, "table.safetensors")
            summed = add_in_order(load_file(earlier) if earlier.exists() else {}, table, groups)
            save_by_rename(summed, self._file(wave, "table.safetensors"))
        _write_by_rename(self._file(wave, "done"), "")
        if table is not None:
            table.end()
        for directory in self.session.directory.glob(f"wave-{wave:03d}-inputs-*"):
            shutil.rmtree(directory)

    def _through_layers(
        self,
        wave: int,
        start: int,
        waiting: list[_Waiting],
        lockstep: Lockstep,
        reader: ThreadPoolExecutor,
        note: Callable[[int], None],
        advance: Callable[[float], None],
    ) -> None:
        count, last_checkpoint = len(self.layered.layers), time.monotonic()
        coming: Future = reader.submit(self.layered.load, start)
        for layer in range(start, count):
            note(layer)
            coming.result()
            if layer + 1 < count:
                coming = reader.submit(self.layered.load, layer + 1)
            self._one_layer(wave, layer, waiting)
            self.layered.drop(layer)
            if layer + 1 < count and lockstep.simple_outputs and time.monotonic() - last_checkpoint >= self.checkpoint_seconds:
                self._save_inputs(wave, layer + 1, waiting, lockstep)
                last_checkpoint = time.monotonic()
            advance(1)

    def _one_layer(self, wave: int, layer: int, waiting: list[_Waiting]) -> None:
        """Every batch through one layer; its sums are kept once all have passed."""
        total = RunningTotal.after(self._file(wave - 1, f"layer-{layer:04d}.safetensors"), self.session.tokens.snapshots)
        site = self.site_of.get(layer)
        for group in sorted({item.group for item in waiting}):
            if site is not None:
                self.sums = LayerSums(len(self.session.tokens.sources), self.num_experts, self.layered.device)
            for item in (item for item in waiting if item.group == group):
                self.current = item.watch
                self.spool.unpark(item.forward)
                item.forward.advance()
                if site is not None and self.session.trace is not None:
                    item.watch.write_routed(layer)
                if not item.forward.finished:
                    self._park(item)
            if site is not None:
                self.session.keep_sample(group, [layer])
                tensors = self.sums.tensors()
                refuse_unusable(site, tensors)
                total.add(group, tensors)
        if site is not None and self.session.sample is not None and waiting[-1].group == len(self.session.tokens.groups) - 1:
            self.session.sample.finish(site)
        if site is not None:
            total.save(self._file(wave, f"layer-{layer:04d}.safetensors"))

    def _batches(self, groups: range) -> Iterator[_Waiting]:
        number = 0
        for group in groups:
            at = self.session.trace_start[group] if self.session.trace is not None else 0
            for batch in batches(self.session.tokens, self.session.tokens.groups[group], self.batch_tokens):
                watch = BatchWatch(self.session, batch, self._add, at)
                at += watch.num_signals
                yield _Waiting(watch, group, number)
                number += 1

    def _add(self, site: RoutedExperts, pairs: Pairs, positions: Positions) -> None:
        self.sums.add(pairs, positions)

    def _forward(self, item: _Waiting) -> Callable[[], None]:
        batch, device, model = item.watch.batch, self.layered.device, self.layered.model

        def run() -> None:
            positions = None if batch.position_ids is None else batch.position_ids.to(device)
            hidden = final_hidden(model, batch.input_ids.to(device), positions)
            if self.session.trace is not None:
                item.watch.finish(model, hidden)

        return run

    def _park(self, item: _Waiting) -> None:
        self.spool.park(item.forward, f"{item.number:06d}")

    # -------------------------------------------------------------------------------------- surviving a kill

    def _file(self, wave: int, name: str) -> Path:
        return self.session.directory / f"wave-{wave:03d}-{name}"

    def _inputs(self, wave: int, layer: int) -> Path:
        return self._file(wave, f"inputs-{layer:04d}")

    def _save_inputs(self, wave: int, layer: int, waiting: list[_Waiting], lockstep: Lockstep) -> None:
        """What every batch will hand to `layer`, complete once its `facts.json` is there."""
        directory = self._inputs(wave, layer)
        directory.mkdir(exist_ok=True)
        checksums = []
        for item in waiting:
            self.spool.unpark(item.forward)
            save_file({"hidden": item.forward.hidden.contiguous()}, directory / f"{item.number:06d}.safetensors")
            checksums.append(item.forward.others())
            self._park(item)
        facts = {"returns_tuple": lockstep.output_kinds(layer), "checksums": checksums}
        _write_by_rename(directory / "facts.json", json.dumps(facts))
        for older in self.session.directory.glob(f"wave-{wave:03d}-inputs-*"):
            if older != directory:
                shutil.rmtree(older)

    def _checkpoint(self, wave: int, count: int) -> tuple[int, dict | None]:
        """The layer to go on from, and what was noted there."""
        for directory in sorted(self.session.directory.glob(f"wave-{wave:03d}-inputs-*"), reverse=True):
            if (directory / "facts.json").exists():
                facts = json.loads((directory / "facts.json").read_text())
                if len(facts["checksums"]) == count:
                    return int(directory.name.rsplit("-", 1)[1]), facts
        return 0, None

    def _restore(self, wave: int, layer: int, facts: dict, waiting: list[_Waiting]) -> bool:
        """Hands every forward its saved hidden states; False where earlier layers left more behind than those."""
        for item, checksum in zip(waiting, facts["checksums"], strict=True):
            if item.forward.others() != checksum:
                return False
            file = self._inputs(wave, layer) / f"{item.number:06d}.safetensors"
            item.forward.hidden = load_file(file, device=str(self.layered.device))["hidden"]
            item.forward.replace_hidden(item.forward.hidden)
            self._park(item)
        return True


def _write_by_rename(file: Path, text: str) -> None:
    temporary = file.with_suffix(".writing")
    temporary.write_text(text)
    os.replace(temporary, file)
