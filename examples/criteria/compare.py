"""Which criterion, allocation and repair lose least? Every criterion on several small models, against each other and an
oracle.

    python examples/criteria/train_models.py --output runs/criteria-models python examples/criteria/compare.py measure
    runs/criteria-models/softmax-a -o runs/criteria     # for each model; "demo" is the packaged one python
    examples/criteria/compare.py table runs/criteria/*.json -o examples/criteria/results

`measure` writes one JSON per model: for every criterion, ratio, allocation, calibration and repair the increase of the
held-out loss (nats per token, mean over four sources), its 95 % interval over resampled rows and calibration draws, and
the paired comparison with `reap`. `table` sets them side by side, with the interval of the ratio to `reap` over models,
each of another seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
import transformers

from reapkit.checkpoint.locate import MODEL_DIRECTORY
from reapkit.healing.refit import repair
from reapkit.model.streaming.layers import LayeredModel
from reapkit.observation.observation import Observation
from reapkit.pruning.refitted_weights import RepairedWeights
from reapkit.recipe.schema import ObserveSpec
from reapkit.selection.selection import Selection

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from oracle import greedy_oracle
from pruning_study import SOURCES, Cost, Losses, Noise, Study
from table import write_tables

RATIOS = (Decimal("0.25"), Decimal("0.5"), Decimal("0.625"))
ALLOCATIONS = ("uniform", "global")
CRITERIA: dict[str, dict[str, object]] = {
    "reap": {},
    "reap, sum": {"criterion": "reap", "reduction": "sum"},
    "frequency": {},
    "weighted-frequency": {},
    "ean": {},
    "ean-mean": {},
    "eaft-reap": {},
    "reroute-single": {},
    "reroute": {},
}
CALIBRATIONS: dict[str, dict[str, Decimal] | None] = {
    "all sources": None,
    "equal weights": dict.fromkeys(SOURCES, Decimal("0.25")),
    "code alone": {"code": Decimal(1)},
}
"""By `saliency.mix`: as drawn, every scored token counts the same; every source counts the same; one source alone."""
REPAIRED = ("reap", "reap, sum", "reroute")
RANDOM_SEEDS = range(3)


@dataclass(frozen=True)
class Cell:
    """One way to prune."""

    criterion: str
    ratio: Decimal
    allocation: str
    calibration: str
    repair: str | None = None


def cells(repairs: Sequence[str | None], criteria: Sequence[str], calibrations: Sequence[str]) -> Iterator[Cell]:
    """Every cell that is measured with all draws; weights of sources are no business of the repair."""
    for how in repairs:
        for calibration in (name for name in calibrations if how is None or name != "equal weights"):
            for criterion in (name for name in criteria if how is None or name in REPAIRED):
                for ratio in RATIOS:
                    yield from (Cell(criterion, ratio, allocation, calibration, how) for allocation in ALLOCATIONS)


class Comparison:
    """One model: a selection for every cell and draw, and the losses of each distinct one, measured once."""

    def __init__(self, study: Study, seeds: Sequence[int]):
        self.study, self.seeds = study, seeds
        self.observations: list[Observation] = [study.calibrated(seed) for seed in seeds]
        self.noise = Noise.of(study.base, len(seeds))
        self._measured: dict[Any, Losses] = {}
        self._repaired: dict[tuple[Cell, int], RepairedWeights] = {}

    def selection(self, cell: Cell, draw: int) -> Selection:
        settings = {"criterion": cell.criterion, **CRITERIA[cell.criterion], "mix": CALIBRATIONS[cell.calibration]}
        return self.study.select(self.observations[draw], cell.ratio, cell.allocation, **settings)

    def repair_all(self, wanted: Sequence[Cell]) -> None:
        """Re-fits all cells of one calibration and draw in one pass over the layers."""
        for draw, seed in enumerate(self.seeds):
            for calibration, weights in CALIBRATIONS.items():
                chosen = {str(number): cell for number, cell in enumerate(wanted) if cell.calibration == calibration}
                if not chosen:
                    continue
                tokens = self.study.tokens(seed, SOURCES if weights is None else tuple(weights))
                found = repair(
                    LayeredModel(self.study.directory),
                    tokens,
                    {name: self.selection(cell, draw) for name, cell in chosen.items()},
                    self.study.scratch / f"repair-{calibration}-{seed}",
                    batch_tokens=8192,
                )
                self._repaired |= {(chosen[name], draw): repaired for name, repaired in found.items()}

    def losses(self, cell: Cell, draw: int) -> Losses:
        selection = self.selection(cell, draw)
        key = (tuple(selection.keep.items()), (cell, draw) if cell.repair else None)
        if key not in self._measured:
            self._measured[key] = self.study.pruned(selection, self._repaired.get((cell, draw)))
        return self._measured[key]

    def cost(self, cell: Cell) -> tuple[Cost, dict[str, float]]:
        """The cell's increase, and by source."""
        draws = [self.losses(cell, draw) for draw in range(len(self.seeds))]
        base = self.study.base.by_source()
        by_source = {
            name: sum(one.by_source()[name] for one in draws) / len(draws) - loss for name, loss in base.items()
        }
        return Cost.of(self.study.base, draws, self.noise), by_source


def measure(study: Study, seeds: Sequence[int], wanted: Sequence[Cell]) -> list[dict[str, Any]]:
    """All cells as JSON rows, each compared in pairs with `reap` under the same ratio, allocation and calibration,
    unrepaired."""
    comparison = Comparison(study, seeds)
    if any(cell.repair for cell in wanted):
        comparison.repair_all([cell for cell in wanted if cell.repair])
    found = {cell: comparison.cost(cell) for cell in wanted}
    rows = []
    for cell, (cost, by_source) in found.items():
        reap = found[Cell("reap", cell.ratio, cell.allocation, cell.calibration)][0]
        rows.append(_row(cell, cost.value, cost.interval, by_source) | {"against_reap": cost.against(reap)})
    return rows + list(_random(comparison))


def _random(comparison: Comparison) -> Iterator[dict[str, Any]]:
    study, noise = comparison.study, Noise.of(comparison.study.base, 1, resamples=1)
    for ratio in RATIOS:
        losses = [
            study.pruned(study.select(comparison.observations[0], ratio, criterion="random", seed=seed))
            for seed in RANDOM_SEEDS
        ]
        values = [Cost.of(study.base, [one], noise).value for one in losses]
        base = study.base.by_source()
        by_source = {
            name: sum(one.by_source()[name] for one in losses) / len(losses) - loss for name, loss in base.items()
        }
        mean = sum(values) / len(values)
        yield _row(Cell("random", ratio, "uniform", "all sources"), mean, (min(values), max(values)), by_source) | {
            "against_reap": ""
        }


def _oracle(study: Study, seed: int, rows: int) -> Iterator[dict[str, Any]]:
    noise = Noise.of(study.base, 1)
    for ratio, keep in greedy_oracle(
        study.model, study.tokens(seed), [ratio for ratio in RATIOS if ratio <= Decimal("0.5")], rows
    ).items():
        pruned = study.pruned(keep)
        cost = Cost.of(study.base, [pruned], noise)
        by_source = {name: loss - study.base.by_source()[name] for name, loss in pruned.by_source().items()}
        yield _row(Cell("oracle", ratio, "uniform", "all sources"), cost.value, cost.interval, by_source) | {
            "against_reap": ""
        }


def _row(cell: Cell, value: float, interval: tuple[float, float], by_source: Mapping[str, float]) -> dict[str, Any]:
    return {
        "criterion": cell.criterion,
        "ratio": float(cell.ratio),
        "allocation": cell.allocation,
        "calibration": cell.calibration,
        "repair": cell.repair,
        "increase": value,
        "interval": list(interval),
        "by_source": dict(by_source),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure", help="one model")
    one.add_argument("model", help="a model's folder, or `demo`")
    one.add_argument("-o", "--output", type=Path, required=True, help="folder of the JSON files")
    one.add_argument("--samples", type=int, default=256, help="calibration samples over the mix")
    one.add_argument("--draws", type=int, default=2, help="independent draws of the calibration")
    one.add_argument("--held-out", type=int, default=96, help="held-out samples over the mix")
    one.add_argument("--reroute-tokens", type=int, default=8192)
    one.add_argument(
        "--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA), help="which of them, `reap` always"
    )
    one.add_argument("--calibrations", nargs="+", choices=CALIBRATIONS, default=list(CALIBRATIONS))
    one.add_argument("--no-repair", action="store_true", help="leave the repaired rows out")
    one.add_argument("--oracle-rows", type=int, default=0, help="calibration rows of the greedy oracle; 0: none")
    sides = commands.add_parser("table", help="all measured models side by side")
    sides.add_argument("files", type=Path, nargs="+")
    sides.add_argument("-o", "--output", type=Path, required=True, help="path of the .md and .json, without suffix")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "table":
        return write_tables([json.loads(file.read_text()) for file in arguments.files], arguments.output)
    began, directory = time.monotonic(), MODEL_DIRECTORY if arguments.model == "demo" else Path(arguments.model)
    with tempfile.TemporaryDirectory() as scratch:
        spec = ObserveSpec(reroute_tokens=arguments.reroute_tokens)
        study = Study(Path(scratch), arguments.samples, arguments.held_out, directory=directory, spec=spec)
        seeds = range(42, 42 + arguments.draws)
        criteria = list(dict.fromkeys(["reap", *arguments.criteria]))
        rows = measure(
            study,
            seeds,
            list(cells((None,) if arguments.no_repair else (None, "ridge"), criteria, arguments.calibrations)),
        )
        if arguments.oracle_rows:
            rows += _oracle(study, seeds[0], arguments.oracle_rows)
        facts = {
            "model": directory.name if arguments.model != "demo" else "demo",
            "base": study.base.by_source(),
            "date": date.today().isoformat(),
            "minutes": round((time.monotonic() - began) / 60, 1),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "settings": {name: value for name, value in vars(arguments).items() if isinstance(value, (int, bool))},
        }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{facts['model']}.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
