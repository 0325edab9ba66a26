"""Does saliency work? The held-out loss that pruning costs on the packaged model, by criterion, ratio and calibration
mix.

    python examples/what_pruning_costs.py --output what_pruning_costs.md     # about 11 minutes on one CPU core

Every cell is the increase of the loss over the unpruned model, in nats per predicted token, on rows that neither
training nor calibration has seen, averaged over the four sources, with a 95 % interval. The interval covers both kinds
of noise: which rows were held out (bootstrap over rows, within each source) and which rows calibrated (independent
draws, resampled along). Criteria are compared with `reap` on the same rows and draws, so a difference is called one
only where its own paired interval excludes zero. Calibration mixes are post-hoc weights of one observation
(`saliency.mix`): the model runs once a draw.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path

import torch

from reapkit.observation.observation import Observation

sys.path.insert(0, str(Path(__file__).parent))
from pruning_study import LENGTH, SOURCES, Cost, Losses, Noise, Study  # noqa: F401 (Losses: beside the rest)

RATIOS = (Decimal("0.25"), Decimal("0.5"), Decimal("0.625"))
CRITERIA = {
    "reap": {},
    "reap, sum": {"criterion": "reap", "reduction": "sum"},
    "frequency": {},
    "weighted-frequency": {},
    "ean": {},
    "ean-mean": {},
    "eaft-reap": {},
    "eaft-reap, per source": {"criterion": "eaft-reap", "eaft": {"thresholds": "per-source"}},
}
MIXES = {
    "all four sources": None,
    "code alone": {"code": Decimal(1)},
    "prose and math": {"prose": Decimal("0.5"), "math": Decimal("0.5")},
}
RANDOM_SEEDS = range(5)
BASELINE = "reap"


Table = dict[str, dict[Decimal, Cost]]


def criteria_table(
    study: Study,
    observations: Sequence[Observation],
    weights: Mapping[str, Decimal] | None,
    criteria: Mapping[str, Mapping[str, object]] = CRITERIA,
    ratios: Sequence[Decimal] = RATIOS,
) -> Table:
    """Costs by criterion and ratio under one calibration mix; each criterion decides anew from every draw's
    observation."""
    noise = Noise.of(study.base, len(observations))
    table: Table = {}
    for name, settings in criteria.items():
        settings = {"criterion": name, **settings, "mix": weights}
        table[name] = {
            ratio: Cost.of(
                study.base,
                [study.pruned(study.select(observation, ratio, **settings)) for observation in observations],
                noise,
            )
            for ratio in ratios
        }
    return table


def random_costs(
    study: Study, observation: Observation, ratios: Sequence[Decimal] = RATIOS
) -> dict[Decimal, list[float]]:
    """The increase of each random selection; calibration plays no part."""
    noise = Noise.of(study.base, 1, resamples=1)
    return {
        ratio: [
            Cost.of(
                study.base, [study.pruned(study.select(observation, ratio, criterion="random", seed=seed))], noise
            ).value
            for seed in RANDOM_SEEDS
        ]
        for ratio in ratios
    }


def by_source(
    study: Study, observation: Observation, weights: Mapping[str, Decimal] | None, ratio: Decimal = Decimal("0.5")
) -> dict[str, float]:
    """What `reap` costs each source."""
    pruned = study.pruned(study.select(observation, ratio, criterion="reap", mix=weights)).by_source()
    return {source: pruned[source] - loss for source, loss in study.base.by_source().items()}


MARKS = {"lower": " ▼", "higher": " ▲", "": ""}


def markdown(title: str, table: Table, random: Mapping[Decimal, Sequence[float]]) -> str:
    """One mix's table; ▼ and ▲: lower and higher than `reap` beyond the noise."""
    ratios = list(random)
    lines = [
        f"| {title} | " + " | ".join(f"{ratio:.1%} removed" for ratio in ratios) + " |",
        "|---" * (len(ratios) + 1) + "|",
    ]
    for name, costs in table.items():
        cells = [
            f"{costs[ratio].value:.3f} [{costs[ratio].interval[0]:.3f}, {costs[ratio].interval[1]:.3f}]"
            f"{MARKS[costs[ratio].against(table[BASELINE][ratio])]}"
            for ratio in ratios
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append(
        f"| random, {len(RANDOM_SEEDS)} seeds | "
        + " | ".join(f"{min(v):.3f} to {max(v):.3f}" for v in random.values())
        + " |"
    )
    return "\n".join(lines)


def verdict(tables: Mapping[str, Table], random: Mapping[Decimal, Sequence[float]]) -> str:
    """Which differences are beyond the noise, in words."""
    lines = []
    for mix_name, table in tables.items():
        found = {
            name: [costs[ratio].against(table[BASELINE][ratio]) for ratio in random]
            for name, costs in table.items()
            if name != BASELINE
        }
        for word in ("lower", "higher"):
            always = [name for name, marks in found.items() if all(mark == word for mark in marks)]
            lines.append(
                f"- Calibrated on {mix_name}, {word} than `{BASELINE}` beyond the noise at every ratio:"
                f" {', '.join(always) or 'none'}."
            )
        unclear = sum(mark == "" for marks in found.values() for mark in marks)
        lines.append(
            f"- Calibrated on {mix_name}, {unclear} of {sum(map(len, found.values()))} differences from `{BASELINE}`"
            " are within the noise."
        )
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

    say(
        "Held-out loss of the unpruned model, nats per token:"
        f" {', '.join(f'{name} {loss:.3f}' for name, loss in study.base.by_source().items())}. {len(seeds)} draws of"
        f" {study.samples} calibration samples, {study.held_out.num_rows} held-out rows of at most {LENGTH} tokens."
    )
    observations = [study.calibrated(seed) for seed in seeds]
    random = random_costs(study, observations[0])
    tables = {}
    for name, weights in MIXES.items():
        tables[name] = criteria_table(study, observations, weights)
        say(markdown(f"calibrated on {name}", tables[name], random))
    say("▼ and ▲: lower and higher than `reap` beyond the noise (paired 95 % interval of the difference).")
    rows = [
        f"| {name} | "
        + " | ".join(f"{value:.3f}" for value in by_source(study, observations[0], weights).values())
        + " |"
        for name, weights in MIXES.items()
    ]
    say(
        "\n".join(
            [
                "| `reap`, 50 % removed, calibrated on | " + " | ".join(SOURCES) + " |",
                "|---" * (len(SOURCES) + 1) + "|",
                *rows,
            ]
        )
    )
    say(verdict(tables, random))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
