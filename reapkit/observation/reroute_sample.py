"""Collects the token sample for the reroute criteria in each layer, and computes the removal paths from it.

What a layer's block read and how large the residual stream was behind it are kept for the sampled tokens, per row
group, in files that survive a kill. Once all groups have passed, and while the layer is in memory, every expert's
output on the sample is computed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reapkit.calibration.tokens import Batch, CalibrationTokens
from reapkit.checkpoint.architecture import Architecture
from reapkit.checkpoint.projection_names import Role
from reapkit.core.atomic_files import replacing
from reapkit.core.errors import UnusableError
from reapkit.core.progress import Progress
from reapkit.core.ranks import ALONE, Alone
from reapkit.model.masking import sliced_routing
from reapkit.model.routed_experts import Experts, RoutedExperts, intercepted
from reapkit.observation.observation import Reroute
from reapkit.observation.rerouting import PROJECTED, InnerProducts, Outputs, Sampled, Vectors, path, projection, single
from reapkit.observation.rerouting import Path as RemovalPath

SEED = 0
CHUNK_BYTES = 512 << 20  # of all experts' float32 outputs held at once, before their inner products are taken
PROBED_TOKENS, PROBED_EXPERTS = 256, 16
ROUNDED = 0.02  # share of tokens whose choice may turn on rounding alone


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
    for rows, total, share in zip(by_source, totals, _equal_shares(totals, count), strict=True):
        ranks = np.sort(draw.choice(total, share, replace=False, shuffle=False))
        ends = np.cumsum([scored[row] for row in rows])
        for number, row in enumerate(rows):
            begin = ends[number] - scored[row]
            mine = ranks[np.searchsorted(ranks, begin) : np.searchsorted(ranks, ends[number])] - begin
            if len(mine):
                chosen[row] = tokens.row(row).scored.nonzero()[:, 0][torch.from_numpy(mine)].tolist()
    return chosen


def _equal_shares(totals: Sequence[int], count: int) -> list[int]:
    """The smallest source first, each takes an equal part of what is left, or all it has."""
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

    model: nn.Module
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
            handles.append(decoder_layer(self.model, site).register_forward_hook(self._after(site)))
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
            batch, inputs = self._seen.pop(site.layer, (None, None))
            if batch is not None:
                left = self._rows(batch, output[0] if isinstance(output, tuple) else output)
                norms = left.float().square().sum(1)
                self._kept.setdefault(site.layer, []).append((inputs.to("cpu", copy=True), norms.cpu()))

        return hook

    def _rows(self, batch: Batch, hidden: Tensor) -> Tensor:
        width = batch.input_ids.shape[1]
        at = [
            number * width + offset for number, row in enumerate(batch.rows) for offset in self.positions.get(row, ())
        ]
        return hidden.reshape(-1, hidden.shape[-1])[torch.tensor(at, dtype=torch.int64, device=hidden.device)]

    def keep_group(self, group: int, layers: Sequence[int]) -> None:
        """Writes what the group's batches left in these layers."""
        for layer in layers:
            kept = self._kept.pop(layer, [])
            if sum(len(inputs) for inputs, _ in kept):
                inputs, residual = (torch.cat(parts) for parts in zip(*kept, strict=True))
                _save(
                    self.directory / f"reroute-{layer:04d}-{group:05d}.safetensors",
                    {"inputs": inputs, "residual": residual},
                )

    def finish(self, site: RoutedExperts) -> None:
        """The layer's paths, once every group was kept; its weights must be in memory."""
        files = [
            self.directory / f"reroute-{site.layer:04d}-{group:05d}.safetensors"
            for group in range(len(self.tokens.groups))
        ]
        parts = [load_file(file) for file in files if file.exists()]
        done = self._paths_of(site.layer)
        if not done.exists():
            rows = [row for group in self.tokens.groups for row in group]
            source = torch.tensor(
                [int(self.tokens.row_source[row]) for row in rows for _ in self.positions.get(row, ())],
                dtype=torch.int64,
            )
            inputs, residual = (torch.cat([part[name] for part in parts]) for name in ("inputs", "residual"))
            _save(done, measure_layer(self.model, site, inputs, residual, source, self._scored))
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
        layers = [load_file(self._paths_of(site.layer)) for site in self.sites]
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

        return Reroute(counts, **{name: stacked(name, value) for name, value in blank.items()})

    def unfinished(self) -> list[RoutedExperts]:
        """The layers whose paths are still to be found."""
        return [site for site in self.sites if not self._paths_of(site.layer).exists()]

    def _paths_of(self, layer: int) -> Path:
        return self.directory / f"reroute-{layer:04d}.safetensors"


def _save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    with replacing(file) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)


def refuse_unfit(model: nn.Module, site: RoutedExperts) -> None:
    """Raises UnusableError where re-routing is not a weighted sum that the block alone computes."""
    model_type = model.config.get_text_config().model_type
    if site.gate_on_input:
        why = "the gate weight scales the expert's input, so the outputs are not a sum weighted by gates"
    elif site.block is decoder_layer(model, site):
        why = "the experts have no block of their own, so the router cannot be run again alone"
    else:
        with sliced_routing(site, torch.arange(site.num_experts)):  # raises where a router has no rows to leave out
            return
    raise UnusableError(
        f"observe.reroute_tokens: layer {site.layer} of model_type '{model_type}' cannot be re-routed: {why}. Set"
        " observe.reroute_tokens to 0 and choose another criterion."
    )


def decoder_layer(model: nn.Module, site: RoutedExperts) -> nn.Module:
    """The decoder layer that holds the experts."""
    return model.get_submodule(re.match(rf".*?\.{site.layer}(?=\.)", site.name)[0])


# ---------------------------------------------------------------------------------------------- one layer


@torch.no_grad()
def measure_layer(
    model: nn.Module,
    site: RoutedExperts,
    inputs: Tensor,
    residual: Tensor,
    source: Tensor,
    scored: Tensor,
    projected: bool | None = None,
) -> dict[str, Tensor]:
    """`order` int64 and `error` float64 [S + 2, E], and `single` float64 [S, E] (see observation.Reroute), of a layer
    in memory.

    `inputs` [T, hidden]: what the block read; `residual` float32 [T]: ‖r_t‖²; `source` int64 [T]; `scored` int64 [S]:
    scored tokens of each source, which the sample stands for. `projected`: keep random projections of the experts'
    outputs instead of their inner products (default: where there are more experts than dimensions).
    """
    architecture = Architecture.from_config(model.config.to_dict())
    with Router(site, inputs.to(site.matrix(Role.DOWN).device)) as router:
        read = router.read
        outputs = _outputs(site, read, residual, site.num_experts > PROJECTED if projected is None else projected)
        equally = 1 / torch.bincount(source, minlength=len(scored)).double()[source]
        sampled = Sampled(
            outputs,
            router.route,
            source,
            equally,
            site.num_experts,
            architecture.least_experts,
            architecture.n_group,
            architecture.n_group == 1 and is_local(router, site.num_experts, architecture.least_experts),
        )
        found = [path(sampled.of_source(number)) for number in range(len(scored))]
        found += [path(sampled), path(replace(sampled, weight=equally * scored[source]))]
        return {
            "order": _stacked(found, "order"),
            "error": _stacked(found, "error"),
            "single": single(sampled, len(scored)),
        }


def _stacked(paths: Sequence[RemovalPath], name: str) -> Tensor:
    return torch.stack([getattr(one, name) for one in paths])


def _outputs(site: RoutedExperts, read: Tensor, residual: Tensor, projected: bool) -> Outputs:
    """All experts on all tokens, in chunks."""
    width = site.expert(read[:1], 0).shape[-1]
    chunk = max(1, CHUNK_BYTES // (4 * width * site.num_experts))
    matrix = projection(width).to(read.device) if projected else None
    scale = residual.to(read.device).clamp_min(1e-30).rsqrt()
    parts = []
    for at in range(0, len(read), chunk):
        rows = slice(at, at + chunk)
        out = (
            torch.stack([_output(site, read[rows], expert) for expert in range(site.num_experts)], 1)
            * scale[rows, None, None]
        )
        parts.append(out @ out.mT if matrix is None else out @ matrix)
    found = torch.cat(parts)
    return InnerProducts(found) if matrix is None else Vectors(found)


def _output(site: RoutedExperts, hidden: Tensor, expert: int) -> Tensor:
    """f(x) of one expert in float32, computed so on a CPU: without matrix units for it, half precision is several times
    slower there."""
    if hidden.device.type != "cpu" or hidden.dtype == torch.float32 or site.linearised:
        return site.expert(hidden, expert).float()
    alone = copy.copy(site.module)
    alone._parameters = {
        name: tensor if tensor is None else tensor[expert : expert + 1].float()
        for name, tensor in site.module._parameters.items()
    }
    return replace(site, module=alone).expert(hidden.float(), 0)


class Router:
    """The block's own routing of some tokens, whatever experts are left; used as a context manager.

    The block runs up to the call of its experts, which ends it; what else it would have added (shared experts) is never
    computed where it comes behind, and skipped where it comes first.
    """

    def __init__(self, site: RoutedExperts, inputs: Tensor):
        self.site, self.inputs = site, inputs
        self.shared = [
            module
            for name, module in site.block.named_children()
            if "shared" in name and not isinstance(module, nn.Linear)
        ]

    def __enter__(self) -> Router:
        with ExitStack() as stack:
            stack.enter_context(intercepted((self.site,), _stop))
            for module in self.shared:
                module.__dict__["forward"] = lambda hidden, *args, **kwargs: hidden
                stack.callback(module.__dict__.pop, "forward")
            self.read = self._run(None, torch.arange(len(self.inputs)))[0]
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def route(self, alive: Sequence[int], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Experts int64 [t, k] by their original numbers and gates float32 [t, k] of the sampled `tokens` (int64 [t])
        once only `alive` is left, on the host (see `rerouting.Route`)."""
        kept = torch.tensor(alive)
        _, index, gates = self._run(kept if len(alive) < self.site.num_experts else None, tokens)
        return kept[index.cpu()], gates.float().cpu()

    def _run(self, kept: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with nullcontext() if kept is None else sliced_routing(self.site, kept):
            try:
                self.site.block(self.inputs[tokens.to(self.inputs.device)][None])
            except _Reached as reached:
                return reached.call
        raise UnusableError(
            f"layer {self.site.layer}: the block finished without calling its experts, so it cannot be re-routed."
        )


class _Reached(Exception):
    def __init__(self, call: tuple[Tensor, Tensor, Tensor]):
        self.call = call


def _stop(site: RoutedExperts, hidden: Tensor, index: Tensor, gates: Tensor, inner: Experts) -> Tensor:
    raise _Reached((hidden, index, gates))


def is_local(router: Router, num_experts: int, least: int) -> bool:
    """Does removing an expert leave the routing of the tokens that did not choose it as it was? Tried out on a few, in
    float32.

    Gates that are softmax values over all experts, not renormalised, are not: they grow as others leave. In half
    precision neither that nor a tie between two experts' logits could be told from rounding.
    """
    if num_experts <= least:
        return True
    tokens, everyone = torch.arange(min(PROBED_TOKENS, len(router.inputs))), list(range(num_experts))
    with _in_float32(router):
        index, gates = _dense(router.route(everyone, tokens), num_experts)
        for expert in everyone[:: max(1, num_experts // PROBED_EXPERTS)]:
            without, left = _dense(router.route([e for e in everyone if e != expert], tokens), num_experts)
            others = ~index[:, expert]
            rerouted = (without != index).any(1) & others
            if rerouted.sum() > ROUNDED * others.sum():
                return False
            same = others & ~rerouted
            if not torch.allclose(left[same], gates[same], rtol=1e-4, atol=1e-7):
                return False
    return True


@contextmanager
def _in_float32(router: Router) -> Iterator[None]:
    """The block's parameters beside its experts, and the inputs, in float32."""
    inputs, held = router.inputs, []
    left_out = {module for part in (router.site.module, *router.shared) for module in part.modules()}
    for module in router.site.block.modules():
        if module not in left_out:
            held += [
                (module._parameters, name, tensor) for name, tensor in module._parameters.items() if tensor is not None
            ]
    try:
        router.inputs = inputs.float()
        for store, name, tensor in held:
            store[name] = nn.Parameter(tensor.detach().float(), requires_grad=False)
        yield
    finally:
        router.inputs = inputs
        for store, name, tensor in held:
            store[name] = tensor


def _dense(routing: tuple[Tensor, Tensor], num_experts: int) -> tuple[Tensor, Tensor]:
    """Chosen experts bool and gates float32, [t, E]."""
    index, gates = routing
    chosen = torch.zeros(len(index), num_experts, dtype=torch.bool).scatter_(1, index, True)
    return chosen, torch.zeros(len(index), num_experts).scatter_(1, index, gates)
