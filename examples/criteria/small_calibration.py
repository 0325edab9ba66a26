"""How little calibration, and how narrow, does the repair bear? On the packaged model, half of the experts removed.

    python examples/criteria/small_calibration.py -o examples/criteria/small_calibration.md

The choice of experts is that of the whole calibration, so only what the re-fit sees becomes smaller: its first rows, in
the mix's shares. Where a fit helps no row that was kept from it, a layer keeps its weights; one row in eight of each
source is kept so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from statistics import fmean

import torch

from reapkit.healing.refit import repair
from reapkit.model.streaming.layers import LayeredModel
from reapkit.recipe.schema import ObserveSpec

sys.path.insert(0, str(Path(__file__).parents[1]))
from pruning_study import BATCH_TOKENS, SOURCES, Cost, Losses, Noise, Study

RATIO = Decimal("0.5")
TOKENS = (1_500, 4_000, 16_000)
CRITERIA: dict[str, dict[str, object]] = {
    "reap": {"criterion": "reap"},
    "reap, sum": {"criterion": "reap", "reduction": "sum"},
}
CALIBRATIONS: dict[str, dict[str, Decimal] | None] = {"all sources": None, "code alone": {"code": Decimal(1)}}
SEED = 42


@dataclass(frozen=True)
class Row:
    """One line: `tokens` that the re-fit saw (None: no re-fit), the increase of the held-out loss by source, and
    whether its mean differs from that without the re-fit beyond the rows' noise.
    """

    calibration: str
    criterion: str
    tokens: int | None
    by_source: Mapping[str, float]
    against_plain: str


def rows(study: Study) -> Iterator[Row]:
    """Every calibration and criterion, without the re-fit and by its tokens; compared in pairs with the former."""
    observation, noise = study.calibrated(SEED), Noise.of(study.base, 1)
    for calibration, weights in CALIBRATIONS.items():
        tokens = study.tokens(SEED, SOURCES if weights is None else tuple(weights))
        chosen = {
            name: study.select(observation, RATIO, mix=weights, **settings) for name, settings in CRITERIA.items()
        }
        plain = {name: study.pruned(selection) for name, selection in chosen.items()}
        costs = {name: Cost.of(study.base, [losses], noise) for name, losses in plain.items()}
        for name, losses in plain.items():
            yield Row(calibration, name, None, _by_source(study, losses), "")
        available = int(tokens.row_lengths.sum())
        for count in [count for count in TOKENS if count < available] + [available]:
            out = study.scratch / f"repair-{calibration}-{count}"
            found = repair(
                LayeredModel(study.directory), tokens, chosen, out, batch_tokens=BATCH_TOKENS, max_tokens=count
            )
            for name, selection in chosen.items():
                losses = study.pruned(selection, found[name])
                against = Cost.of(study.base, [losses], noise).against(costs[name])
                yield Row(calibration, name, count, _by_source(study, losses), against)


def _by_source(study: Study, losses: Losses) -> dict[str, float]:
    base = study.base.by_source()
    return {name: loss - base[name] for name, loss in losses.by_source().items()}


def markdown(found: list[Row], settings: str) -> str:
    """A table per calibration; ▼ and ▲: the mean is lower and higher than without the re-fit by more than the rows'
    noise."""
    parts = [
        f"Increase of the held-out loss, nats per token, {float(RATIO):.0%} removed from the packaged model;"
        f" {settings}."
    ]
    marks = {"lower": " ▼", "higher": " ▲", "": ""}
    for calibration in CALIBRATIONS:
        lines = [
            f"| calibrated on {calibration} | re-fitted on | {' | '.join(SOURCES)} | mean |",
            "|---|---|" + "---|" * (len(SOURCES) + 1),
        ]
        for criterion in CRITERIA:
            for row in (row for row in found if (row.calibration, row.criterion) == (calibration, criterion)):
                seen = "nothing" if row.tokens is None else f"{row.tokens:,} tokens"
                values = " | ".join(f"{row.by_source[name]:.3f}" for name in SOURCES)
                lines.append(
                    f"| {criterion} | {seen} | {values} |"
                    f" {fmean(row.by_source.values()):.3f}{marks[row.against_plain]} |"
                )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the table, Markdown")
    parser.add_argument("--samples", type=int, default=160, help="calibration samples over the mix")
    parser.add_argument("--held-out", type=int, default=96, help="held-out samples over the mix")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        study = Study(Path(scratch), arguments.samples, arguments.held_out, spec=ObserveSpec(eaft=False))
        found = list(rows(study))
    arguments.output.write_text(
        markdown(found, f"{arguments.samples} calibration and {arguments.held_out} held-out samples")
    )


if __name__ == "__main__":
    main()
