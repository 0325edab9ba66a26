"""Does saliency work? The held-out loss that pruning costs on the packaged model, by criterion, against random choices.

    python examples/what_pruning_costs.py            # a few minutes on two CPU cores

Prints two tables: every criterion at three ratios beside five random selections, calibrated on all four sources; and what
calibrating on code alone keeps and loses. All losses are nats per predicted token on rows that neither training nor
calibration has seen; the increase is over the unpruned model, the mean is over the four sources.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path

import torch

from reapkit.builtin import MODEL_DIRECTORY
from reapkit.calibration.prepare import prepare, prepare_packs
from reapkit.calibration.tokens import CalibrationTokens, batches
from reapkit.checkpoint import Checkpoint
from reapkit.masking import masked
from reapkit.models import load_model
from reapkit.observation import Observation
from reapkit.observe.resident import observe
from reapkit.recipe.schema import CalibrationSpec, EvaluateSpec, MixEntry, ObserveSpec, PacksSpec, PruneSpec, SaliencySpec
from reapkit.selection import Selection, select

SOURCES = ("code", "tools", "prose", "math")
RATIOS = (Decimal("0.25"), Decimal("0.5"), Decimal("0.625"))
CRITERIA = {"frequency": {}, "weighted-frequency": {}, "ean": {}, "ean-mean": {}, "reap": {}, "reap, sum": {"criterion": "reap", "reduction": "sum"},
            "eaft-reap": {}, "eaft-reap, per source": {"criterion": "eaft-reap", "eaft": {"thresholds": "per-source"}}}
IGNORE_USE = ("ean-mean",)  # the mean output norm, whatever the gate says and however rarely the expert is used
RANDOM_SEEDS = range(5)
LENGTH = 512
BATCH_TOKENS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=320, help="calibration samples over the mix")
    parser.add_argument("--held-out", type=int, default=128, help="held-out samples over the mix")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        study = Study(Path(scratch), arguments.samples, arguments.held_out)
        costs = criteria_table(study)
        only_code = code_only_table(study)
    print(verdict(costs, only_code))


class Study:
    """The packaged model, held-out rows of all sources, and the unpruned model's loss on them."""

    def __init__(self, scratch: Path, samples: int, held_out: int):
        self.scratch, self.samples = scratch, samples
        self.architecture = Checkpoint.open(MODEL_DIRECTORY).architecture
        self.model = load_model(MODEL_DIRECTORY)
        self.everything = self.calibrated(SOURCES)
        packs = EvaluateSpec(packs=PacksSpec(samples=held_out, lengths=(LENGTH,), confirm=Decimal(0)))
        prepare_packs(mix(SOURCES, samples), packs, LENGTH, scratch / "-".join(SOURCES), MODEL_DIRECTORY, Path.cwd(), scratch / "held-out")
        self.held_out = CalibrationTokens.load(scratch / "held-out")
        self.base = self.losses()

    def calibrated(self, sources: Iterable[str]) -> Observation:
        """An observation of a calibration on these sources alone."""
        out = self.scratch / "-".join(sources)
        prepare(mix(sources, self.samples), MODEL_DIRECTORY, Path.cwd(), out)
        return observe(self.model, CalibrationTokens.load(out), ObserveSpec(), batch_tokens=BATCH_TOKENS, work_directory=out / "work")

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Mean negative log likelihood per source over the positions that predict a scored token."""
        total = dict.fromkeys(self.held_out.sources, 0.0)
        count = dict.fromkeys(self.held_out.sources, 0)
        for batch in batches(self.held_out, range(self.held_out.num_rows), BATCH_TOKENS):
            log_probabilities = self.model(batch.input_ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            nll = -log_probabilities.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
            for row, source in enumerate(batch.source.tolist()):
                measured = batch.signal[row, :-1]
                total[self.held_out.sources[source]] += float(nll[row][measured].sum())
                count[self.held_out.sources[source]] += int(measured.sum())
        return {source: total[source] / count[source] for source in total}

    def increase(self, selection: Selection) -> dict[str, float]:
        """What the selection costs per source, in nats per token; the model is masked, nothing is written."""
        with masked(self.model, selection.keep):
            pruned = self.losses()
        return {source: pruned[source] - self.base[source] for source in pruned}

    def select(self, observation: Observation, ratio: Decimal, **saliency: object) -> Selection:
        prune = PruneSpec(ratio=ratio, protect={"super_experts": False})
        return select(observation, SaliencySpec.model_validate(saliency, strict=False), prune, self.architecture)


def mix(sources: Iterable[str], samples: int) -> CalibrationSpec:
    """Equal shares of the packaged generators."""
    entries = tuple(MixEntry(name=name, source=f"builtin:{name}") for name in sources)
    return CalibrationSpec(samples=samples, max_length=LENGTH, mix=entries)


def mean(increase: Mapping[str, float]) -> float:
    return sum(increase.values()) / len(increase)


def criteria_table(study: Study, criteria: Mapping[str, Mapping[str, object]] = CRITERIA, ratios: Sequence[Decimal] = RATIOS) -> dict[str, dict[Decimal, list[float]]]:
    """Prints and returns the mean increase by criterion and ratio; random has one value per seed."""
    print(f"Held-out loss of the unpruned model: {', '.join(f'{name} {loss:.3f}' for name, loss in study.base.items())}\n")
    print(f"{'calibrated on all sources':28}" + "".join(f"{f'{ratio:.1%} removed':>18}" for ratio in ratios))
    costs: dict[str, dict[Decimal, list[float]]] = {}
    for name, settings in criteria.items():
        settings = {"criterion": name, **settings}
        costs[name] = {ratio: [mean(study.increase(study.select(study.everything, ratio, **settings)))] for ratio in ratios}
        print(f"{name:28}" + "".join(f"{costs[name][ratio][0]:18.3f}" for ratio in ratios), flush=True)
    costs["random"] = {ratio: [mean(study.increase(study.select(study.everything, ratio, criterion="random", seed=seed)))
                               for seed in RANDOM_SEEDS] for ratio in ratios}
    print(f"{f'random, {len(RANDOM_SEEDS)} seeds':28}" + "".join(f"{f'{min(v):.3f} to {max(v):.3f}':>18}" for v in costs["random"].values()))
    return costs


def code_only_table(study: Study) -> dict[str, dict[str, float]]:
    """Prints and returns the increase per source at 50 %, calibrated on all sources and on code alone."""
    half = Decimal("0.5")
    increases = {"all sources": study.increase(study.select(study.everything, half, criterion="reap")),
                 "code alone": study.increase(study.select(study.calibrated(("code",)), half, criterion="reap"))}
    print(f"\n{'reap, 50.0% removed':28}" + "".join(f"{source:>10}" for source in SOURCES))
    for name, increase in increases.items():
        print(f"{f'calibrated on {name}':28}" + "".join(f"{increase[source]:10.3f}" for source in SOURCES))
    return increases


def verdict(costs: Mapping[str, Mapping[Decimal, list[float]]], increases: Mapping[str, Mapping[str, float]]) -> str:
    """The two claims in words, with their numbers."""
    half = Decimal("0.5")
    random = sum(costs["random"][half]) / len(costs["random"][half])
    shares = {name: costs[name][half][0] / random for name in costs if name != "random"}
    used = {name: share for name, share in shares.items() if name not in IGNORE_USE}
    worst = max(used, key=used.__getitem__)
    code, others = increases["code alone"]["code"], [increases["code alone"][name] for name in SOURCES if name != "code"]
    return (f"\nAt 50 % removed, of what random choices lose on average ({random:.3f}): criteria that weigh how experts are used at most "
            f"{used[worst]:.2f} ({worst});\nthose that do not: {', '.join(f'{name} {shares[name]:.2f}' for name in IGNORE_USE if name in shares)}.\n"
            f"Calibrated on code alone, code loses {code:.3f} and the others {min(others):.3f} to {max(others):.3f}.")


if __name__ == "__main__":
    main()
