"""Does saliency work? The held-out loss that pruning costs on the packaged model, by criterion, ratio and calibration mix.

    python examples/what_pruning_costs.py --output what_pruning_costs.md     # about 15 minutes on one CPU core

Every cell is the increase of the loss over the unpruned model, in nats per predicted token, on rows that neither training
nor calibration has seen, averaged over the four sources, with a 95 % interval. The interval covers both kinds of noise: which
rows were held out (bootstrap over rows, within each source) and which rows calibrated (independent draws, resampled along).
Criteria are compared with `reap` on the same rows and draws, so a difference is called one only where its own paired
interval excludes zero. Calibration mixes are post-hoc weights of one observation (`saliency.mix`): the model runs once a draw.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch

from reapkit.builtin import MODEL_DIRECTORY
from reapkit.calibration.prepare import prepare, prepare_packs
from reapkit.calibration.tokens import CalibrationTokens, batches
from reapkit.checkpoint import Checkpoint
from reapkit.masking import masked
from reapkit.models import load_model
from reapkit.observation import Observation
from reapkit.observe.resident import observe
from reapkit.recipe.schema import (
    CalibrationSpec,
    EvaluateSpec,
    MixEntry,
    ObserveSpec,
    PacksSpec,
    PruneSpec,
    SaliencySpec,
)
from reapkit.selection import Selection, select

SOURCES = ("code", "tools", "prose", "math")
RATIOS = (Decimal("0.25"), Decimal("0.5"), Decimal("0.625"))
CRITERIA = {"reap": {}, "reap, sum": {"criterion": "reap", "reduction": "sum"}, "frequency": {}, "weighted-frequency": {},
            "ean": {}, "ean-mean": {}, "eaft-reap": {},
            "eaft-reap, per source": {"criterion": "eaft-reap", "eaft": {"thresholds": "per-source"}}}
MIXES = {"all four sources": None, "code alone": {"code": Decimal(1)}, "prose and math": {"prose": Decimal("0.5"), "math": Decimal("0.5")}}
RANDOM_SEEDS = range(5)
LENGTH = 512
BATCH_TOKENS = 8192
BASELINE = "reap"


@dataclass(frozen=True)
class Losses:
    """Negative log likelihood summed over each held-out row's measured positions. `source`, `count`: int64 [rows]."""

    nll: np.ndarray
    count: np.ndarray
    source: np.ndarray

    def by_source(self) -> dict[str, float]:
        """Mean loss of each source, nats per token."""
        return {name: float(self.nll[self.source == s].sum() / self.count[self.source == s].sum()) for s, name in enumerate(SOURCES)}


class Study:
    """The packaged model, held-out rows of all sources, and the unpruned model's loss on them."""

    def __init__(self, scratch: Path, samples: int, held_out: int):
        self.scratch, self.samples = scratch, samples
        self.architecture = Checkpoint.open(MODEL_DIRECTORY).architecture
        self.model = load_model(MODEL_DIRECTORY)
        prepare(mix(SOURCES, samples), MODEL_DIRECTORY, Path.cwd(), scratch / "drawn")
        packs = EvaluateSpec(packs=PacksSpec(samples=held_out, lengths=(LENGTH,), confirm=Decimal(0)))
        prepare_packs(mix(SOURCES, samples), packs, LENGTH, scratch / "drawn", MODEL_DIRECTORY, Path.cwd(), scratch / "held-out")
        self.held_out = CalibrationTokens.load(scratch / "held-out")
        self.held_out_texts = {row_key(self.held_out, row) for row in range(self.held_out.num_rows)}
        self.base = self.losses()

    def calibrated(self, seed: int = 42) -> Observation:
        """An observation of one draw of calibration rows. Raises ValueError where it shares a row with the held-out ones."""
        out = self.scratch / f"calibration-{seed}"
        prepare(mix(SOURCES, self.samples, seed), MODEL_DIRECTORY, Path.cwd(), out)
        tokens = CalibrationTokens.load(out)
        if shared := self.held_out_texts & {row_key(tokens, row) for row in range(tokens.num_rows)}:
            raise ValueError(f"{len(shared)} rows of draw {seed} are held-out rows.")
        return observe(self.model, tokens, ObserveSpec(), batch_tokens=BATCH_TOKENS, work_directory=out / "work")

    @torch.no_grad()
    def losses(self) -> Losses:
        """Over the positions that predict a scored token."""
        nll, count, source = [], [], []
        for batch in batches(self.held_out, range(self.held_out.num_rows), BATCH_TOKENS):
            log_probabilities = self.model(batch.input_ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            found = -log_probabilities.gather(-1, batch.input_ids[:, 1:, None])[..., 0].double()
            measured = batch.signal[:, :-1]
            nll += (found * measured).sum(1).tolist()
            count += measured.sum(1).tolist()
            source += [SOURCES.index(self.held_out.sources[s]) for s in batch.source.tolist()]
        return Losses(np.array(nll), np.array(count), np.array(source))

    def pruned(self, selection: Selection) -> Losses:
        """Of the model routed to the kept experts only; nothing is written."""
        with masked(self.model, selection.keep):
            return self.losses()

    def select(self, observation: Observation, ratio: Decimal, **saliency: object) -> Selection:
        prune = PruneSpec(ratio=ratio, protect={"super_experts": False})
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
        values = [_mean_over_sources(increase, base, np.ones((1, len(increase)), dtype=np.int64))[0] for increase in increases]
        resampled = np.stack([_mean_over_sources(increase, base, noise.rows) for increase in increases], axis=1)
        weights = noise.draws if len(draws) == noise.draws.shape[1] else np.ones((len(resampled), len(draws)))
        return cls(float(np.mean(values)), (resampled * weights).sum(1) / weights.sum(1))

    @property
    def interval(self) -> tuple[float, float]:
        low, high = np.quantile(self.resampled, [0.025, 0.975])
        return float(low), float(high)

    def against(self, other: Cost) -> str:
        """"lower" or "higher" where the paired interval of the difference excludes zero, else ""."""
        low, high = np.quantile(self.resampled - other.resampled, [0.025, 0.975])
        return "lower" if high < 0 else "higher" if low > 0 else ""


def _mean_over_sources(increase: np.ndarray, base: Losses, taken: np.ndarray) -> np.ndarray:
    """float64 [resamples]: the mean over sources of increase per token, rows counted as often as they are `taken`."""
    shares = [(taken[:, base.source == s] @ increase[base.source == s]) / (taken[:, base.source == s] @ base.count[base.source == s])
              for s in range(len(SOURCES))]
    return np.mean(shares, axis=0)


Table = dict[str, dict[Decimal, Cost]]


def criteria_table(study: Study, observations: Sequence[Observation], weights: Mapping[str, Decimal] | None,
                   criteria: Mapping[str, Mapping[str, object]] = CRITERIA, ratios: Sequence[Decimal] = RATIOS) -> Table:
    """Costs by criterion and ratio under one calibration mix; each criterion decides anew from every draw's observation."""
    noise = Noise.of(study.base, len(observations))
    table: Table = {}
    for name, settings in criteria.items():
        settings = {"criterion": name, **settings, "mix": weights}
        table[name] = {ratio: Cost.of(study.base, [study.pruned(study.select(observation, ratio, **settings)) for observation in observations], noise)
                       for ratio in ratios}
    return table


def random_costs(study: Study, observation: Observation, ratios: Sequence[Decimal] = RATIOS) -> dict[Decimal, list[float]]:
    """The increase of each random selection; calibration plays no part."""
    noise = Noise.of(study.base, 1, resamples=1)
    return {ratio: [Cost.of(study.base, [study.pruned(study.select(observation, ratio, criterion="random", seed=seed))], noise).value
                    for seed in RANDOM_SEEDS] for ratio in ratios}


def by_source(study: Study, observation: Observation, weights: Mapping[str, Decimal] | None, ratio: Decimal = Decimal("0.5")) -> dict[str, float]:
    """What `reap` costs each source."""
    pruned = study.pruned(study.select(observation, ratio, criterion="reap", mix=weights)).by_source()
    return {source: pruned[source] - loss for source, loss in study.base.by_source().items()}


MARKS = {"lower": " ▼", "higher": " ▲", "": ""}


def markdown(title: str, table: Table, random: Mapping[Decimal, Sequence[float]]) -> str:
    """One mix's table; ▼ and ▲: lower and higher than `reap` beyond the noise."""
    ratios = list(random)
    lines = [f"| {title} | " + " | ".join(f"{ratio:.1%} removed" for ratio in ratios) + " |", "|---" * (len(ratios) + 1) + "|"]
    for name, costs in table.items():
        cells = [f"{costs[ratio].value:.3f} [{costs[ratio].interval[0]:.3f}, {costs[ratio].interval[1]:.3f}]"
                 f"{MARKS[costs[ratio].against(table[BASELINE][ratio])]}" for ratio in ratios]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append(f"| random, {len(RANDOM_SEEDS)} seeds | " + " | ".join(f"{min(v):.3f} to {max(v):.3f}" for v in random.values()) + " |")
    return "\n".join(lines)


def verdict(tables: Mapping[str, Table], random: Mapping[Decimal, Sequence[float]]) -> str:
    """Which differences are beyond the noise, in words."""
    lines = []
    for mix_name, table in tables.items():
        found = {name: [costs[ratio].against(table[BASELINE][ratio]) for ratio in random] for name, costs in table.items() if name != BASELINE}
        for word in ("lower", "higher"):
            always = [name for name, marks in found.items() if all(mark == word for mark in marks)]
            lines.append(f"- Calibrated on {mix_name}, {word} than `{BASELINE}` beyond the noise at every ratio: {', '.join(always) or 'none'}.")
        unclear = sum(mark == "" for marks in found.values() for mark in marks)
        lines.append(f"- Calibrated on {mix_name}, {unclear} of {sum(map(len, found.values()))} differences from `{BASELINE}` are within the noise.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=320, help="calibration samples over the mix")
    parser.add_argument("--draws", type=int, default=5, help="independent draws of the calibration")
    parser.add_argument("--held-out", type=int, default=128, help="held-out samples over the mix")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--output", type=Path, default=None, help="Markdown file for the tables")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        text = report(Study(Path(scratch), arguments.samples, arguments.held_out), range(42, 42 + arguments.draws))
    if arguments.output:
        arguments.output.write_text(text)


def report(study: Study, seeds: Sequence[int]) -> str:
    """All tables, printed as they come."""
    parts: list[str] = []

    def say(text: str) -> None:
        print(text + "\n", flush=True)
        parts.append(text)

    say(f"Held-out loss of the unpruned model, nats per token: {', '.join(f'{name} {loss:.3f}' for name, loss in study.base.by_source().items())}. "
        f"{len(seeds)} draws of {study.samples} calibration samples, {study.held_out.num_rows} held-out rows of at most {LENGTH} tokens.")
    observations = [study.calibrated(seed) for seed in seeds]
    random = random_costs(study, observations[0])
    tables = {}
    for name, weights in MIXES.items():
        tables[name] = criteria_table(study, observations, weights)
        say(markdown(f"calibrated on {name}", tables[name], random))
    say("▼ and ▲: lower and higher than `reap` beyond the noise (paired 95 % interval of the difference).")
    rows = [f"| {name} | " + " | ".join(f"{value:.3f}" for value in by_source(study, observations[0], weights).values()) + " |"
            for name, weights in MIXES.items()]
    say("\n".join(["| `reap`, 50 % removed, calibrated on | " + " | ".join(SOURCES) + " |", "|---" * (len(SOURCES) + 1) + "|", *rows]))
    say(verdict(tables, random))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
