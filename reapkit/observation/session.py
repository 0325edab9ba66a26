"""One running observation: what is observed, where partial sums are stored, and how they add up to the observation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from reapkit.calibration.tokens import Batch, CalibrationTokens
from reapkit.core.errors import UnusableError
from reapkit.core.hashing import digest
from reapkit.core.ranks import ALONE, Alone
from reapkit.model.expert_calls import intercepted
from reapkit.model.expert_pairs import Pairs, kernels_on, observed_forward
from reapkit.model.layer_outputs import layer_outputs
from reapkit.model.routed_experts import Experts, RoutedExperts, find_experts
from reapkit.observation.accumulate import Positions
from reapkit.observation.eaft_cells import TableSums
from reapkit.observation.eaft_signals import signals_of_hidden
from reapkit.observation.eaft_table import EaftTable
from reapkit.observation.eaft_trace import GroupTraces
from reapkit.observation.group_sums import trace_nbytes
from reapkit.observation.mtp_blocks import MtpBlocks, Slots
from reapkit.observation.observation import MAXIMA, SUMS, Observation, Trace
from reapkit.observation.reroute_sample import Capture
from reapkit.recipe.schema import ObserveSpec

FILES = 3
"""The file format of unfinished work. Raise it when the format changes, so that older work is not resumed."""
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True, eq=False)
class Session:
    """What every placement shares: the watched experts (those of multi-token-prediction blocks last), the calibration,
    the files that survive a kill.
    """

    sites: tuple[RoutedExperts, ...]
    tokens: CalibrationTokens
    spec: ObserveSpec
    directory: Path
    trace: GroupTraces | TableSums | None
    trace_start: tuple[int, ...]
    top_k: int
    model_type: str
    meta: Mapping[str, Any]
    sample: Capture | None = None
    mtp: MtpBlocks | None = None

    @classmethod
    def open(
        cls,
        model: PreTrainedModel,
        tokens: CalibrationTokens,
        spec: ObserveSpec,
        *,
        batch_tokens: int,
        work_directory: Path,
        identity: str | None,
        placement: str,
        device: torch.device,
        ranks: Alone = ALONE,
        mtp: MtpBlocks | None = None,
        **layout: Any,
    ) -> Session:
        """`layout`: whatever else decides which partial sums belong together. Raises UnusableError where the model's
        experts cannot be watched, or where a rank would compute in another way than rank 0.
        """
        decoder = find_experts(model)
        sites = decoder + (mtp.sites if mtp else ())
        text = model.config.get_text_config()
        top_k = next(int(value) for key in TOP_K_KEYS if isinstance(value := getattr(text, key, None), int))
        meta = {
            "model": identity,
            "placement": placement,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "kernels": kernels_on(device),
            "batch_tokens": batch_tokens,
            "entropy_top_k": spec.entropy_top_k,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        if mtp:
            meta["mtp"] = [site.layer for site in mtp.sites]
        ranks.same("how", meta)
        layers = [site.layer for site in sites]
        if spec.reroute_tokens:
            layout |= {"reroute_tokens": spec.reroute_tokens}
        starts: tuple[int, ...] = _signals_before(tokens) if spec.eaft else ()
        in_cells = bool(starts and trace_nbytes(len(sites), top_k, starts[-1]) > spec.trace_bytes)
        if in_cells:
            layout |= {"table": True}
        how = digest({"meta": meta, "layers": layers, "top_k": top_k, "eaft": spec.eaft, "files": FILES, **layout})[:12]
        directory = Path(work_directory) / f"sums-{how}"  # sums made in another way are not mixed with these
        directory.mkdir(parents=True, exist_ok=True)
        trace = None
        if spec.eaft:
            trace = GroupTraces(directory, layers, top_k, starts)
            if in_cells:
                trace = TableSums(trace, max(site.num_experts for site in sites), len(tokens.sources))
        sample = Capture(model, decoder, tokens, directory, spec.reroute_tokens) if spec.reroute_tokens else None
        return cls(sites, tokens, spec, directory, trace, starts, top_k, text.model_type, meta, sample, mtp)

    @contextmanager
    def watching(self, watch: Callable[[], BatchWatch]) -> Iterator[None]:
        """Inside the block every call of the watched experts, and what leaves their layers, goes to the `watch` of the
        batch whose forward runs. As hooks on layers, it must begin before a forward that waits in front of a layer."""

        def on_experts(site: RoutedExperts, hidden: Tensor, index: Tensor, gates: Tensor, inner: Experts) -> Tensor:
            return watch()(site, hidden, index, gates)

        with ExitStack() as stack:
            stack.enter_context(intercepted(self.sites, on_experts))
            stack.enter_context(layer_outputs(self.sites, lambda site, output: watch().leaving(site, output)))
            yield

    def sampling(self) -> AbstractContextManager[None]:
        """What the reroute criterion needs of the sampled tokens is kept inside."""
        return nullcontext() if self.sample is None else self.sample.watching()

    def keep_sample(self, group: int, layers: Sequence[int]) -> None:
        """Writes a finished row group's sampled tokens in these layers."""
        if self.sample is not None:
            self.sample.keep_group(group, layers)

    def observation(self, total: Mapping[str, Tensor], snapshots: Mapping[str, Tensor]) -> Observation:
        """The observation that these sums, maxima, coactivation, token counts [L, S, ...] and snapshots [stages, L, S,
        E] make, in the dtypes of `Observation`.
        """
        return Observation(
            model_type=self.model_type,
            layers=tuple(site.layer for site in self.sites),
            num_experts=total["count"].shape[-1],
            num_experts_per_tok=self.top_k,
            sources=tuple(self.tokens.sources),
            tokens=total["tokens"].numpy(),
            scored_tokens=total["scored_tokens"].numpy(),
            statistics={name: total[name].numpy() for name in SUMS},
            maxima={name: total[name].numpy() for name in MAXIMA},
            coactivation=total["coactivation"].numpy(),
            snapshots={name: taken.numpy() for name, taken in snapshots.items()},
            eaft=self._eaft(total),
            meta=self.meta,
            reroute=None if self.sample is None else self.sample.result(len(self.sites)),
        )

    @property
    def table(self) -> TableSums | None:
        """Where the EAFT material goes if not into an exact trace."""
        return self.trace if isinstance(self.trace, TableSums) else None

    def _eaft(self, total: Mapping[str, Tensor]) -> Trace | EaftTable | None:
        if isinstance(self.trace, GroupTraces):
            return Trace.load(self.trace.join())
        return None if self.trace is None else self.trace.result(total)


@dataclass(eq=False)
class BatchWatch:
    """Watches one batch's forward: adds every layer's statistics, keeps what the EAFT trace needs of it."""

    session: Session
    batch: Batch
    add: Callable[[RoutedExperts, Pairs, Positions, Tensor], None]
    trace_at: int = 0

    def __post_init__(self) -> None:
        self._host = Positions.of(self.batch)
        self._positions: dict[torch.device, Positions] = {}
        self._routed: dict[int, tuple[Tensor, Tensor]] = {}
        self._entered: dict[int, tuple[Pairs, Positions]] = {}
        self._slots: dict[int, Slots] = {}

    def __call__(self, site: RoutedExperts, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        """What the experts put out; their pairs wait for what leaves the layer."""
        slots = self._slots.get(site.layer)
        positions = self.positions_on(hidden.device) if slots is None else slots.positions.to(hidden.device)
        if hidden.shape[0] != len(positions.source):
            raise UnusableError(
                f"{site.name} was called with {hidden.shape[0]} positions for a batch of {len(positions.source)}: this"
                " architecture regroups tokens before its experts, so tokens cannot be assigned to their sources."
                " This model cannot be observed."
            )
        if self.session.sample is not None and slots is None:
            self.session.sample.note(site, self.batch)
        out, pairs = observed_forward(site, hidden, index, gates)
        self._entered[site.layer] = pairs, positions
        if self.session.trace is not None:
            routed = self._of_signals(index, pairs, positions.signal)
            self._routed[site.layer] = routed if slots is None else slots.spread(*routed)
        return out

    def leaving(self, site: RoutedExperts, output: Tensor) -> None:
        """Adds the layer's pairs, now that its `output` is there: [batch, tokens, ...] in the model's dtype, whatever
        the layer passes on of each position. Layers whose experts were not called add nothing."""
        if site.layer in self._entered:
            pairs, positions = self._entered.pop(site.layer)
            passed_on = output.reshape(len(positions.source), -1)
            residual = torch.linalg.vector_norm(passed_on, dim=1, dtype=torch.float32).to(pairs.norm.device)
            self.add(site, pairs, positions, residual)

    def predict_further(self, hidden: Tensor) -> None:
        """Runs the multi-token-prediction blocks that are watched on the batch's final hidden states [batch, tokens,
        hidden], in the model's dtype."""
        if self.session.mtp is not None:
            self.session.mtp.run(self.batch.input_ids, hidden, self._entering)

    def _entering(self, site: RoutedExperts, depth: int) -> Slots:
        slots = self._slots[site.layer] = Slots.of(self.batch, depth)
        if slots.at.shape[1] == 0:  # rows of one token: the block is not called
            nothing = torch.empty(0, self.session.top_k)
            self._routed[site.layer] = slots.spread(nothing.to(torch.int16), nothing)
        return slots

    def _of_signals(self, index: Tensor, pairs: Pairs, signal: Tensor) -> tuple[Tensor, Tensor]:
        gate_norm = pairs.by_slot((pairs.gate.double() * pairs.norm.double()).float())
        return index[signal].to(torch.int16), gate_norm[signal]

    def positions_on(self, device: torch.device) -> Positions:
        if device not in self._positions:
            self._positions[device] = self._host.to(device)
        return self._positions[device]

    def references(self) -> Tensor:
        """The token that each signal position predicts, int64 [signals]."""
        return self.batch.input_ids.reshape(-1)[self._host.signal + 1]

    def write_routed(self, layer: int) -> None:
        """Moves one layer's slots into the trace, where there is one."""
        if (trace := self.session.trace) is not None:
            expert, gate_norm = self._routed.pop(layer)
            trace.write(f"expert.{layer}", self.trace_at, expert)
            trace.write(f"gate_norm.{layer}", self.trace_at, gate_norm)

    @property
    def num_signals(self) -> int:
        return len(self._host.signal)

    def finish(self, model: PreTrainedModel, hidden: Tensor) -> None:
        """Writes p and H of the batch's signals into the trace, where there is one, from its final hidden states
        [batch, tokens, hidden] in the model's dtype.

        Raises UnusableError where a layer's experts were called and nothing was seen to leave the layer.
        """
        if self._entered:
            raise UnusableError(
                f"layer {min(self._entered)} called its experts, but its own output was never seen: this architecture"
                " does not run its decoder layers as modules. This model cannot be observed."
            )
        if (trace := self.session.trace) is not None:
            for name, values in zip(("p", "h", "source"), self.signals(model, hidden), strict=True):
                trace.write(name, self.trace_at, values)

    def signals(self, model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p and H, float32 [signals], and the source, int16 [signals], of the batch's signals, from its final hidden
        states [batch, tokens, hidden] in the model's dtype."""
        at_signals = hidden.reshape(-1, hidden.shape[-1])[self.positions_on(hidden.device).signal]
        p, h = signals_of_hidden(
            model, at_signals, self.references().to(hidden.device), self.session.spec.entropy_top_k
        )
        return p, h, self._host.source[self._host.signal].to(torch.int16)


def _signals_before(tokens: CalibrationTokens) -> tuple[int, ...]:
    """Signal positions before each row group, and at the end of all."""
    starts = [0]
    for group in tokens.groups:
        starts.append(starts[-1] + sum(int(tokens.row(row).signal.sum()) for row in group))
    return tuple(starts)
