"""Splits a calibration and its held-out packs over their sources. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from reapkit.calibration.packing import largest_remainder
from reapkit.core.errors import Problem, RecipeError
from reapkit.recipe.schema import CalibrationSpec, EvaluateSpec, MixEntry


def mix_shares(calibration: CalibrationSpec) -> list[int]:
    """Samples (or tokens, where the mix is measured in them) of each source. Raises as `shares`."""
    unit, amount = calibration.asked
    return shares(amount, calibration.mix, f"calibration.{unit}", unit.removesuffix("s"))


def pack_shares(calibration: CalibrationSpec, evaluate: EvaluateSpec) -> list[int]:
    """Held-out samples of every source of the mix, then of every extra pack: those get as many as a source of the mix
    has on average, weighted among themselves. Raises as `shares`."""
    samples, extra = evaluate.packs.samples, evaluate.extra_packs
    counts = shares(samples, calibration.mix, "evaluate.packs.samples", "sample")
    if extra:
        total = max(len(extra), samples * len(extra) // len(calibration.mix))
        counts += [max(1, count) for count in largest_remainder(total, [entry.weight for entry in extra])]
    return counts


def shares(amount: int, entries: Sequence[MixEntry], field: str, unit: str) -> list[int]:
    """Units of each source by largest remainder. Raises RecipeError naming those that would get none."""
    weights = [entry.weight for entry in entries]
    counts = largest_remainder(amount, weights)
    if without := [entry.name for entry, count in zip(entries, counts, strict=True) if not count]:
        enough = ceil(sum(weights) / min(weights))
        raise RecipeError(
            [
                Problem(
                    field,
                    f"{amount}, but with {len(entries)} sources and these weights {', '.join(without)} would get no"
                    f" {unit}. Choose at least {enough}.",
                )
            ]
        )
    return counts


def share_problems(calibration: CalibrationSpec, evaluate: EvaluateSpec, *, calibrates: bool = True) -> list[Problem]:
    """Sources of which nothing would be taken. What balanced sources get only their rows tell."""
    problems: list[Problem] = []
    for wanted, split in (
        (calibrates and calibration.shared_out == calibration.asked[0], lambda: mix_shares(calibration)),
        (True, lambda: pack_shares(calibration, evaluate)),
    ):
        try:
            _ = split() if wanted else None
        except RecipeError as error:
            problems += error.problems
    return problems
