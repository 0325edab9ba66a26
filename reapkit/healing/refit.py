"""Re-fits the kept experts layer by layer: the original and the pruned model run side by side, each layer's experts are
fitted to the original's residual stream, and the pruned model continues with the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from reapkit.calibration.tokens import Batch, CalibrationTokens, batches
from reapkit.checkpoint.projection_names import Role
from reapkit.core.atomic_files import replacing
from reapkit.core.errors import StageFailed, UnusableError
from reapkit.core.progress import SILENT, Progress
from reapkit.healing.layer_watch import ExpertsCall, LayerWatch
from reapkit.healing.ridge import ExpertFeatures, Refit, refit
from reapkit.model.loading import final_hidden
from reapkit.model.masking import masked
from reapkit.model.routed_experts import RoutedExperts, find_experts
from reapkit.model.streaming.layer_pass import LayerPass
from reapkit.model.streaming.layers import LayeredModel
from reapkit.model.streaming.lockstep import Forward
from reapkit.pruning.refitted_weights import LayerNames, RepairedWeights
from reapkit.selection.selection import Selection

TOKENS = 131_072
"""Enough for a few thousand tokens per expert in the largest routed layers; a matrix of 2,048 columns needs no more."""
ERROR_ENTRIES = 2**29
"""Most entries of a layer's error, 2 GB in float32; the fit holds a few of that size."""
HELD_OUT_EVERY = 8
"""One row in this many of each source judges the ridge's strength and is not fitted."""


@torch.no_grad()
def repair(
    layered: LayeredModel,
    tokens: CalibrationTokens,
    selections: Mapping[str, Selection],
    out: Path,
    *,
    batch_tokens: int = 16384,
    max_tokens: int | None = None,
    hidden_bytes: int | None = None,
    offload_directory: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, RepairedWeights]:
    """Re-fitted weights of every selection, written to `out/<name>`; each decoder layer is read once and is alone in
    memory.

    The fit sees the first rows of `tokens` up to `max_tokens` positions (padding aside), whose shares are the mix's.
    Layers whose held-out rows no fit helps keep their weights. Raises UnusableError for a quantized checkpoint, for one
    whose layers do not simply add their experts' output, or whose tensors are not the matrices themselves.
    """
    if layered.is_quantized:
        raise UnusableError(
            "prune.repair: ridge re-fits plain weights, but this checkpoint is quantized. Start from its bfloat16 "
            "version, or remove prune.repair."
        )
    width = layered.model.config.get_text_config().hidden_size
    rows = _rows(tokens, max_tokens or min(TOKENS, ERROR_ENTRIES // width))
    layer_pass = LayerPass(layered, hidden_bytes, offload_directory)
    return _RefitPass(layered, layer_pass, tokens, rows, selections, batch_tokens).run(out, progress)


def _rows(tokens: CalibrationTokens, max_tokens: int) -> list[int]:
    rows, used = [], 0
    for row in range(tokens.num_rows):
        used += len(tokens.row(row).input_ids)
        if rows and used > max_tokens:
            break
        rows.append(row)
    if len(rows) < 2:
        raise UnusableError(
            "prune.repair: ridge needs at least two calibration rows, one to fit and one to judge. Raise"
            " calibration.samples."
        )
    return rows


def _judging_rows(tokens: CalibrationTokens, rows: Sequence[int]) -> set[int]:
    """Every so many-th row of each source; the last row where no source has that many."""
    by_source: dict[int, list[int]] = {}
    for row in rows:
        by_source.setdefault(int(tokens.row_source[row]), []).append(row)
    chosen = {row for of_source in by_source.values() for row in of_source[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]}
    return chosen or {rows[-1]}


@dataclass(frozen=True, eq=False)
class _RefitBatch:
    """One batch on its way through the original or a pruned model."""

    batch: Batch
    forward: Forward


@dataclass(frozen=True, eq=False)
class _Passed:
    """What a pruned model's batches left in one layer, by batch: the residual stream behind it and the calls of its
    experts; `scale`: what the stream holds of these experts' output."""

    outputs: list[Tensor]
    calls: list[ExpertsCall]
    scale: float


@dataclass(eq=False)
class _RefitPass:
    """Every batch through the original and every pruned model, layer by layer."""

    layered: LayeredModel
    layer_pass: LayerPass
    tokens: CalibrationTokens
    rows: Sequence[int]
    selections: Mapping[str, Selection]
    batch_tokens: int

    def __post_init__(self) -> None:
        self.judging = _judging_rows(self.tokens, self.rows)
        self.watch = LayerWatch(self.layered)

    def run(self, out: Path, progress: Progress) -> dict[str, RepairedWeights]:
        layered, count = self.layered, len(self.layered.layers)
        layered.load_rest()
        sites = {site.layer: site for site in find_experts(layered.model)}
        found: dict[str, dict[int, LayerNames]] = {name: {} for name in self.selections}
        facts: dict[str, dict[str, Any]] = {name: {} for name in self.selections}
        with (
            self.layer_pass as layer_pass,
            self.watch.watching(tuple(sites.values())),
            progress.task("repair", total=count, unit="layers") as task,
        ):
            original = self._begun()
            pruned = {name: self._begun() for name in self.selections}
            for layer in layer_pass.through(range(count), task):
                for name, fitted in self._fitted(layer, sites.get(layer), original, pruned):
                    facts[name][str(layer)] = {
                        "strength": fitted.strength,
                        "fitted": fitted.fitted,
                        "held_out": fitted.held_out,
                    }
                    if fitted.corrections:
                        keep = self.selections[name].keep[layer]
                        found[name][layer] = self._save(layer, sites[layer], keep, fitted, out / name)
                self.watch.forget()
        return {name: self._finished(out / name, found[name], facts[name]) for name in self.selections}

    def _begun(self) -> list[_RefitBatch]:
        """Every batch, waiting in front of the first layer."""
        return [
            _RefitBatch(batch, self.layer_pass.begin(lambda batch=batch: self._forward(batch)))
            for batch in batches(self.tokens, self.rows, self.batch_tokens)
        ]

    def _fitted(
        self,
        layer: int,
        site: RoutedExperts | None,
        original: Sequence[_RefitBatch],
        pruned: Mapping[str, Sequence[_RefitBatch]],
    ) -> Iterator[tuple[str, Refit]]:
        """All batches of all models through the layer, and the new matrices of the pruned ones that have some."""
        targets = []
        for item in original:
            self.layer_pass.advance(item.forward, park=False)
            targets.append(self.watch.output(item.batch))
            self.layer_pass.park(item.forward)
        for name, selection in self.selections.items():
            fitted = self._pruned(layer, site, selection, pruned[name], targets)
            if fitted is not None:
                yield name, fitted

    def _finished(self, directory: Path, layers: Mapping[int, LayerNames], facts: Mapping[str, Any]) -> RepairedWeights:
        directory.mkdir(parents=True, exist_ok=True)
        weights = RepairedWeights(directory, layers, {"rows": len(self.rows), "layers": dict(facts)})
        weights.save_index()
        return weights

    def _forward(self, batch: Batch) -> None:
        device = self.layered.device
        final_hidden(
            self.layered.model,
            batch.input_ids.to(device),
            None if batch.position_ids is None else batch.position_ids.to(device),
        )

    # ------------------------------------------------------------------------------------------ a pruned model's layer

    def _pruned(
        self,
        layer: int,
        site: RoutedExperts | None,
        selection: Selection,
        items: Sequence[_RefitBatch],
        targets: Sequence[Tensor],
    ) -> Refit | None:
        """All batches of one pruned model through a layer that is fitted on the way; None where there is nothing to
        fit."""
        keep = selection.keep.get(layer) if site is not None else None
        with masked(self.layered.model, {} if keep is None else {layer: keep}, selection.experts_per_token):
            if site is None or keep is None or len(keep) == site.num_experts:
                for item in items:
                    self.layer_pass.advance(item.forward)
                return None
            passed = self._passed(layer, items)
        fitted = refit(*self._problem(site, keep, items, targets, passed))
        matrices = {expert: self._matrix(site, expert) for expert in fitted.corrections}
        rounded = {
            expert: _oriented(site, correction).add(matrices[expert].float()).to(matrices[expert].dtype)
            for expert, correction in fitted.corrections.items()
        }
        self._go_on(
            site,
            {expert: _oriented(site, rounded[expert].float() - matrices[expert].float()) for expert in rounded},
            items,
            passed,
        )
        return Refit(rounded, fitted.strength, fitted.fitted, fitted.held_out)

    def _passed(self, layer: int, items: Sequence[_RefitBatch]) -> _Passed:
        outputs: list[Tensor] = []
        calls: list[ExpertsCall] = []
        scale = 1.0
        for item in items:
            self.layer_pass.advance(item.forward, park=False)
            outputs.append(self.watch.output(item.batch))
            calls.append(self.watch.experts_call(item.batch))
            scale = self.watch.added_share(layer) if item is items[0] else scale
            self.layer_pass.park(item.forward)
        return _Passed(outputs, calls, scale)

    def _problem(
        self,
        site: RoutedExperts,
        keep: Sequence[int],
        items: Sequence[_RefitBatch],
        targets: Sequence[Tensor],
        passed: _Passed,
    ) -> tuple[dict[int, ExpertFeatures], Tensor, Tensor, Tensor]:
        """What `refit` takes, over all batches."""
        device = self.layered.device
        target = torch.cat(list(targets)).to(device).float()
        error = (target - torch.cat(passed.outputs).to(device).float()) / passed.scale
        weight = 1 / target.square().sum(1).clamp_min(1e-30)
        hidden, index, gates = (torch.cat(parts) for parts in zip(*passed.calls, strict=True))
        judging = torch.cat(
            [
                torch.tensor([row in self.judging for row in item.batch.rows]).repeat_interleave(item.batch.lengths)
                for item in items
            ]
        )
        return (
            {expert: _features(site, expert, hidden, index, gates) for expert in keep},
            error,
            weight,
            judging.to(device),
        )

    def _matrix(self, site: RoutedExperts, expert: int) -> Tensor:
        return site.matrix(Role.DOWN).detach()[expert]

    def _go_on(
        self, site: RoutedExperts, corrections: Mapping[int, Tensor], items: Sequence[_RefitBatch], passed: _Passed
    ) -> None:
        """Adds what the rounded corrections change to the hidden states that wait for the next layer."""
        for item, call in zip(items, passed.calls, strict=True):
            if item.forward.finished or not corrections:
                continue
            change = torch.zeros(
                call[0].shape[0], item.forward.hidden.shape[-1], dtype=torch.float32, device=self.layered.device
            )
            for expert, correction in corrections.items():
                seen = _features(site, expert, *call)
                if len(seen.rows):
                    change.index_add_(0, seen.rows, seen.features() @ correction.T)
            with self.layer_pass.at_hand(item.forward) as hidden:
                flat = hidden.view(-1, hidden.shape[-1])
                valid = self.watch.valid(item.batch)
                flat[valid] = (flat[valid].float() + passed.scale * change).to(hidden.dtype)

    # ------------------------------------------------------------------------------------------ what is written

    def _save(self, layer: int, site: RoutedExperts, keep: Sequence[int], fitted: Refit, directory: Path) -> LayerNames:
        """One file with the layer's re-fitted matrices under the checkpoint's names; experts without tokens keep
        theirs."""
        file = f"layer-{layer:04d}.safetensors"
        matrices = {
            expert: fitted.corrections.get(expert, self._matrix(site, expert)).contiguous().cpu() for expert in keep
        }
        if not all(bool(matrix.isfinite().all()) for matrix in matrices.values()):
            raise StageFailed(
                f"repair: the re-fitted weights of layer {layer} are not finite. Remove prune.repair, and please"
                " report this."
            )
        stacked, experts = self.layered.sources_of(site.parameter(Role.DOWN))
        self._confirm(site, keep[0], stacked, experts)
        if stacked is not None:
            names = LayerNames(file, tuple(keep), stacked, {})
            tensors = {stacked: torch.stack([matrices[expert] for expert in keep])}
        else:
            names = LayerNames(file, tuple(keep), None, {expert: experts[expert] for expert in keep})
            tensors = {experts[expert]: matrices[expert] for expert in keep}
        with replacing(directory / file) as partial:
            save_file(tensors, partial)
        return names

    def _confirm(self, site: RoutedExperts, expert: int, stacked: str | None, experts: Mapping[int, str]) -> None:
        """Raises UnusableError unless the checkpoint's tensor is the module's matrix as it is, so that ours can take
        its place."""
        name = stacked or experts.get(expert)
        if name is not None:
            on_disk = self.layered.read(name, expert if stacked is not None else None)
            if on_disk.shape == self._matrix(site, expert).shape and torch.equal(
                on_disk, self._matrix(site, expert).cpu()
            ):
                return
        raise UnusableError(
            f"prune.repair: layer {site.layer} stores its experts' output matrices in another layout ({name}) than the"
            " model uses, so re-fitted ones cannot be written. Remove prune.repair."
        )


def _features(site: RoutedExperts, expert: int, hidden: Tensor, index: Tensor, gates: Tensor) -> ExpertFeatures:
    """φ of one expert: gate times activation, as its `down_proj` would read it if the gate came first."""
    rows, slots = (index == expert).nonzero(as_tuple=True)

    def features() -> Tensor:
        gate = gates[rows, slots, None]
        if site.gate_on_input:
            return site.activation(hidden[rows] * gate, expert).float()
        return site.activation(hidden[rows], expert).float() * gate.float()

    return ExpertFeatures(rows, features)


def _oriented(site: RoutedExperts, matrix: Tensor) -> Tensor:
    """[hidden, intermediate] as the module holds it, or back."""
    return matrix.T if site.down_proj_is_transposed else matrix
