"""Collects the token sample for the reroute criteria in each layer.

What a layer's block read and how large the residual stream was behind it are kept for the sampled tokens, per row
group, in files that survive a kill. Once all groups have passed, and while the layer is in memory, `reroute_layer`
computes the layer's removal paths from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reapkit.calibration.tokens import Batch, CalibrationTokens
from reapkit.core.errors import UnusableError
from reapkit.core.progress import Progress
from reapkit.core.ranks import ALONE, Alone
from reapkit.model.masking import has_table, sliced_routing
from reapkit.model.routed_experts import RoutedExperts
from reapkit.observation.observation import Reroute
from reapkit.observation.partial_files import load_partial, save_by_rename
from reapkit.observation.reroute_layer import measure_layer

SEED = 0


def sampled_positions(tokens: CalibrationTokens, count: int) -> dict[int, list[int]]:
    """Row -> offsets (ascending) of `count` scored positions, as many of each source as there are or as make equal
    shares.

    Seeded, and a function of the calibration alone: neither batch, placement nor ranks matter.
    """
    scored = [int(tokens.row(row).scored.sum()) for row in range(tokens.num_rows)]
    by_source = [
        [row for row in range(tokens.num_rows) if int(tokens.row_source[row]) == source]
        for source in range(len(tokens.sources))
    ]
    totals = [sum(scored[row] for row in rows) for rows in by_source]
    draw, chosen = np.random.default_rng(SEED), {}
    for rows, total, share in zip(by_source, totals, equal_shares(totals, count), strict=True):
        ranks = np.sort(draw.choice(total, share, replace=False, shuffle=False))
        ends = np.cumsum([scored[row] for row in rows])
        for number, row in enumerate(rows):
            begin = ends[number] - scored[row]
            mine = ranks[np.searchsorted(ranks, begin) : np.searchsorted(ranks, ends[number])] - begin
            if len(mine):
                chosen[row] = tokens.row(row).scored.nonzero()[:, 0][torch.from_numpy(mine)].tolist()
    return chosen


def equal_shares(totals: Sequence[int], count: int) -> list[int]:
    """What each source, of which there are `totals`, gives to `count`: the smallest source first, each an equal part of
    what is left, or all it has."""
    shares = [0] * len(totals)
    for left, source in zip(
        range(len(totals), 0, -1), sorted(range(len(totals)), key=lambda s: (totals[s], s)), strict=True
    ):
        shares[source] = min(totals[source], (count - sum(shares)) // left)
    return shares


@dataclass(eq=False)
class Capture:
    """Keeps what the layers see of the sampled tokens while `watching`, group by group.

    Files: `reroute-LLLL-GGGGG.safetensors` with `inputs` [n, hidden] in the model's dtype and `residual` float32 [n],
    ‖r_t‖², in row order; `reroute-LLLL.safetensors` is a finished layer's paths.
    """

    model: PreTrainedModel
    sites: Sequence[RoutedExperts]
    tokens: CalibrationTokens
    directory: Path
    count: int
    _read: dict[int, Tensor] = field(default_factory=dict)
    _seen: dict[int, tuple[Batch, Tensor]] = field(default_factory=dict)
    _kept: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site in self.sites:
            refuse_unfit(self.model, site)
        self.positions = sampled_positions(self.tokens, self.count)
        rows = [
            (int(self.tokens.row_source[row]), int(self.tokens.row(row).scored.sum()))
            for row in range(self.tokens.num_rows)
        ]
        self._scored = torch.tensor(
            [sum(scored for source, scored in rows if source == s) for s in range(len(self.tokens.sources))]
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on blocks and decoder layers; they must be there before a forward that waits in front of a layer
        begins."""
        handles = []
        for site in self.sites:
            handles.append(site.block.register_forward_pre_hook(self._before(site), with_kwargs=True))
            handles.append(site.decoder_layer.register_forward_hook(self._after(site)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, site: RoutedExperts) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple, kwargs: dict) -> None:
            self._read[site.layer] = args[0] if args else next(iter(kwargs.values()))

        return hook

    def note(self, site: RoutedExperts, batch: Batch) -> None:
        """The block that calls its experts now runs for `batch`."""
        self._seen[site.layer] = (batch, self._rows(batch, self._read.pop(site.layer)))

    def _after(self, site: RoutedExperts) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            if (seen := self._seen.pop(site.layer, None)) is not None:
                batch, inputs = seen
                left = self._rows(batch, output[0] if isinstance(output, tuple) else output)
                norms = left.float().square().sum(1)
                self._kept.setdefault(site.layer, []).append((inputs.to("cpu", copy=True), norms.cpu()))

        return hook

    def _rows(self, batch: Batch, hidden: Tensor) -> Tensor:
        width = batch.input_ids.shape[1]
        at = [
            number * width + offset for number, row in enumerate(batch.rows) for offset in self.positions.get(row, ())
        ]
        return hidden.reshape(batch.input_ids.numel(), -1)[torch.tensor(at, dtype=torch.int64, device=hidden.device)]

    def keep_group(self, group: int, layers: Sequence[int]) -> None:
        """Writes what the group's batches left in these layers."""
        for layer in layers:
            kept = self._kept.pop(layer, [])
            if sum(len(inputs) for inputs, _ in kept):
                inputs, residual = (torch.cat(parts) for parts in zip(*kept, strict=True))
                file = self.directory / f"reroute-{layer:04d}-{group:05d}.safetensors"
                save_by_rename({"inputs": inputs, "residual": residual}, file)

    def finish(self, site: RoutedExperts) -> None:
        """The layer's paths, once every group was kept; its weights must be in memory."""
        files = [
            self.directory / f"reroute-{site.layer:04d}-{group:05d}.safetensors"
            for group in range(len(self.tokens.groups))
        ]
        parts = [load_partial(file) for file in files if file.exists()]
        done = self._paths_of(site.layer)
        if not done.exists():
            rows = [row for group in self.tokens.groups for row in group]
            source = torch.tensor(
                [int(self.tokens.row_source[row]) for row in rows for _ in self.positions.get(row, ())],
                dtype=torch.int64,
            )
            inputs, residual = (torch.cat([part[name] for part in parts]) for name in ("inputs", "residual"))
            found = (
                _unmeasured(site.num_experts, len(self._scored))
                if has_table(site)
                else measure_layer(self.model, site, inputs, residual, source, self._scored)
            )
            save_by_rename(found, done)
        self._read.clear()
        for file in files:
            file.unlink(missing_ok=True)

    def finish_all(self, progress: Progress, ranks: Alone = ALONE) -> None:
        """Every layer's paths, of a model that is in memory as a whole; each rank does every world-th layer."""
        mine = self.sites[ranks.rank :: ranks.world]
        with progress.task("reroute", total=len(mine), unit="layers") as task:
            for site in mine:
                self.finish(site)
                task.advance(1)

    def result(self, rows: int) -> Reroute:
        """All layers' paths, stacked to `rows` layers, of which those behind the sampled ones have none."""
        layers = [load_partial(self._paths_of(site.layer)) for site in self.sites]
        source = torch.tensor(
            [int(self.tokens.row_source[row]) for row, offsets in self.positions.items() for _ in offsets],
            dtype=torch.int64,
        )
        counts = torch.bincount(source, minlength=len(self.tokens.sources))
        width = max(site.num_experts for site in self.sites)
        blank = {"order": -1, "error": 0, "single": 0}

        def stacked(name: str, value: int) -> Tensor:
            wide = [nn.functional.pad(layer[name], (0, width - layer[name].shape[-1]), value=value) for layer in layers]
            return torch.stack(wide + [torch.full_like(wide[0], value)] * (rows - len(wide)))

        return Reroute(counts.numpy(), **{name: stacked(name, value).numpy() for name, value in blank.items()})

    def unfinished(self) -> list[RoutedExperts]:
        """The layers whose paths are still to be found."""
        return [site for site in self.sites if not self._paths_of(site.layer).exists()]

    def _paths_of(self, layer: int) -> Path:
        return self.directory / f"reroute-{layer:04d}.safetensors"


def refuse_unfit(model: PreTrainedModel, site: RoutedExperts) -> None:
    """Raises UnusableError where re-routing is not a weighted sum that the block alone computes. A layer that a fixed
    table routes loses no expert, so nothing is measured there."""
    if has_table(site):
        return
    model_type = model.config.get_text_config().model_type
    if site.gate_on_input:
        why = "the gate weight scales the expert's input, so the outputs are not a sum weighted by gates"
    elif site.block is site.decoder_layer:
        why = "the experts have no block of their own, so the router cannot be run again alone"
    else:
        with sliced_routing(site, torch.arange(site.num_experts)):  # raises where a router has no rows to leave out
            return
    raise UnusableError(
        f"observe.reroute_tokens: layer {site.layer} of model_type '{model_type}' cannot be re-routed: {why}. Set"
        " observe.reroute_tokens to 0 and choose another criterion."
    )


def _unmeasured(experts: int, sources: int) -> dict[str, Tensor]:
    """The paths, as `measure_layer` gives them, of a layer that loses none of its experts."""
    return {
        "order": torch.full((sources + 2, experts), -1),
        "error": torch.zeros(sources + 2, experts, dtype=torch.float64),
        "single": torch.zeros(sources, experts, dtype=torch.float64),
    }
