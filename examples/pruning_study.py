"""What examples share to measure what pruning costs: held-out losses, paired resamples, intervals that cover both kinds
of noise.

An increase of the loss has two sources of chance: which rows were held out (bootstrap over rows, within each source)
and which rows calibrated (independent draws, resampled along). All cells of a table share their resamples, so they can
be compared in pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch

from reapkit.calibration.prepare import prepare, prepare_packs
from reapkit.calibration.tokens import CalibrationTokens, batches
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.locate import MODEL_DIRECTORY
from reapkit.model.loading import final_hidden, head_logits, load_model
from reapkit.model.masking import masked
from reapkit.observation.observation import Observation
from reapkit.observation.resident import observe
from reapkit.pruning.refitted_weights import RepairedWeights, repaired
from reapkit.recipe.schema import (
    CalibrationSpec,
    EvaluateSpec,
    MixEntry,
    ObserveSpec,
    PacksSpec,
    PruneSpec,
    SaliencySpec,
)
from reapkit.selection.decide import select
from reapkit.selection.selection import Selection

SOURCES = ("code", "tools", "prose", "math")
LENGTH = 512
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Losses:
    """Negative log likelihood summed over each held-out row's measured positions. `source`, `count`: int64 [rows]."""

    nll: np.ndarray
    count: np.ndarray
    source: np.ndarray

    def by_source(self) -> dict[str, float]:
        """Mean loss of each source, nats per token."""
        return {
            name: float(self.nll[self.source == s].sum() / self.count[self.source == s].sum())
            for s, name in enumerate(SOURCES)
        }


class Study:
    """A model with the packaged tokenizer, held-out rows of all sources, and the unpruned model's loss on them."""

    def __init__(
        self,
        scratch: Path,
        samples: int,
        held_out: int,
        *,
        directory: Path = MODEL_DIRECTORY,
        spec: ObserveSpec | None = None,
    ):
        self.scratch, self.samples, self.directory, self.spec = scratch, samples, directory, spec or ObserveSpec()
        self.architecture = Checkpoint.open(directory).architecture
        self.model = load_model(directory)
        prepare(mix(SOURCES, samples), directory, Path.cwd(), scratch / "drawn")
        packs = EvaluateSpec(packs=PacksSpec(samples=held_out, lengths=(LENGTH,), confirm=Decimal(0)))
        prepare_packs(
            mix(SOURCES, samples), packs, LENGTH, scratch / "drawn", directory, Path.cwd(), scratch / "held-out"
        )
        self.held_out = CalibrationTokens.load(scratch / "held-out")
        self.held_out_texts = {row_key(self.held_out, row) for row in range(self.held_out.num_rows)}
        self.base = self.losses()

    def tokens(self, seed: int = 42, sources: Sequence[str] = SOURCES) -> CalibrationTokens:
        """One draw of calibration rows. Raises ValueError where it shares a row with the held-out ones."""
        out = self.scratch / f"calibration-{seed}-{'-'.join(sources)}"
        if not out.exists():
            prepare(mix(sources, self.samples * len(sources) // len(SOURCES), seed), self.directory, Path.cwd(), out)
        tokens = CalibrationTokens.load(out)
        if shared := self.held_out_texts & {row_key(tokens, row) for row in range(tokens.num_rows)}:
            raise ValueError(f"{len(shared)} rows of draw {seed} are held-out rows.")
        return tokens

    def calibrated(self, seed: int = 42) -> Observation:
        """An observation of one draw of all sources."""
        return observe(
            self.model,
            self.tokens(seed),
            self.spec,
            batch_tokens=BATCH_TOKENS,
            work_directory=self.scratch / f"observed-{seed}",
        )

    @torch.no_grad()
    def losses(self) -> Losses:
        """Over the positions that predict a scored token; rows of like length run together."""
        nll, count, source = [], [], []
        for batch in batches(
            self.held_out, np.argsort(self.held_out.row_lengths, kind="stable").tolist(), BATCH_TOKENS
        ):
            row, at = batch.signal[:, :-1].nonzero(as_tuple=True)
            logits = head_logits(self.model, final_hidden(self.model, batch.input_ids)[row, at])
            found = torch.nn.functional.cross_entropy(
                logits.float(), batch.input_ids[row, at + 1], reduction="none"
            ).double()
            nll += torch.zeros(len(batch.rows), dtype=torch.float64).index_add_(0, row, found).tolist()
            count += torch.bincount(row, minlength=len(batch.rows)).tolist()
            source += [SOURCES.index(self.held_out.sources[s]) for s in batch.source.tolist()]
        return Losses(np.array(nll), np.array(count), np.array(source))

    def pruned(self, selection: Selection, weights: RepairedWeights | None = None) -> Losses:
        """Of the model routed to the kept experts only, re-fitted where there are `weights`; nothing is written."""
        with masked(self.model, selection.keep), repaired(self.model, weights):
            return self.losses()

    def select(
        self, observation: Observation, ratio: Decimal, allocation: str = "uniform", **saliency: object
    ) -> Selection:
        layout = "ragged" if allocation == "global" else "uniform"
        prune = PruneSpec(ratio=ratio, allocation=allocation, layout=layout, protect={"super_experts": False})
        return select(observation, SaliencySpec.model_validate(saliency, strict=False), prune, self.architecture)


def mix(sources: Iterable[str], samples: int, seed: int = 42) -> CalibrationSpec:
    """Equal shares of the packaged generators."""
    entries = tuple(MixEntry(name=name, source=f"builtin:{name}") for name in sources)
    return CalibrationSpec(samples=samples, max_length=LENGTH, mix=entries, seed=seed)


def row_key(tokens: CalibrationTokens, row: int) -> bytes:
    return tokens.row(row).input_ids.numpy().tobytes()


@dataclass(frozen=True)
class Noise:
    """The same resampled rows (within each source) and draws for every cell, so that cells can be compared in pairs."""

    rows: np.ndarray
    """int64 [resamples, rows]: how often each row is taken."""
    draws: np.ndarray
    """int64 [resamples, draws]: how often each draw is taken."""

    @classmethod
    def of(cls, base: Losses, num_draws: int, resamples: int = 2000, seed: int = 0) -> Noise:
        random = np.random.default_rng(seed)
        rows = np.zeros((resamples, len(base.source)), dtype=np.int64)
        for source in range(len(SOURCES)):
            members = np.flatnonzero(base.source == source)
            rows[:, members] = random.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
        return cls(rows, random.multinomial(num_draws, np.full(num_draws, 1 / num_draws), size=resamples))


@dataclass(frozen=True)
class Cost:
    """A cell: the mean increase, nats per token, and its value in every resample."""

    value: float
    resampled: np.ndarray

    @classmethod
    def of(cls, base: Losses, draws: Sequence[Losses], noise: Noise) -> Cost:
        increases = [pruned.nll - base.nll for pruned in draws]
        values = [
            _mean_over_sources(increase, base, np.ones((1, len(increase)), dtype=np.int64))[0] for increase in increases
        ]
        resampled = np.stack([_mean_over_sources(increase, base, noise.rows) for increase in increases], axis=1)
        weights = noise.draws if len(draws) == noise.draws.shape[1] else np.ones((len(resampled), len(draws)))
        return cls(float(np.mean(values)), (resampled * weights).sum(1) / weights.sum(1))

    @property
    def interval(self) -> tuple[float, float]:
        low, high = np.quantile(self.resampled, [0.025, 0.975])
        return float(low), float(high)

    def against(self, other: Cost) -> str:
        """ "lower" or "higher" where the paired interval of the difference excludes zero, else ""."""
        low, high = np.quantile(self.resampled - other.resampled, [0.025, 0.975])
        return "lower" if high < 0 else "higher" if low > 0 else ""


def _mean_over_sources(increase: np.ndarray, base: Losses, taken: np.ndarray) -> np.ndarray:
    """float64 [resamples]: the mean over sources of increase per token, rows counted as often as they are `taken`."""
    shares = [
        (taken[:, base.source == s] @ increase[base.source == s])
        / (taken[:, base.source == s] @ base.count[base.source == s])
        for s in range(len(SOURCES))
    ]
    return np.mean(shares, axis=0)
