"""Prepares the token rows of a recipe's mix on disk, and records what was requested and what was obtained."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

from reapkit.calibration.assemble import Stream, assemble
from reapkit.calibration.balance import gather_balanced
from reapkit.calibration.clock import dated
from reapkit.calibration.draw_samples import Target, gather
from reapkit.calibration.held_out import held_out_from
from reapkit.calibration.inputs import Inputs
from reapkit.calibration.shares import mix_shares, pack_shares
from reapkit.calibration.tokens import PARTS, CalibrationTokens
from reapkit.core.errors import Problem, RecipeError
from reapkit.core.progress import SILENT, Progress
from reapkit.recipe.schema import CalibrationSpec, EvaluateSpec


def prepare(
    calibration: CalibrationSpec,
    tokenizer_directory: Path,
    recipe_directory: Path,
    out: Path,
    progress: Progress = SILENT,
    *,
    work: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Writes the calibration's tokens below `out` and returns what `calibration.json` says.

    Samples (or tokens) are split over the mix by largest remainder and met exactly, or drawn so that the sources have
    their shares of what `calibration.balance` says. The same recipe, data and tokenizer
    give the same bytes. Tokenized samples are kept below `work` (default: inside `out`, removed at the end), from where
    a killed run goes on; a folder that is kept serves other sizes, lengths and packings of the same sources too.

    Raises UnusableError naming source and row, or the source of which nothing would be scored.
    """
    calibration = dated(calibration, Path(tokenizer_directory), Path(recipe_directory))
    inputs = Inputs(
        calibration,
        Path(tokenizer_directory),
        Path(recipe_directory),
        work or out / "work",
        trust_remote_code,
        progress,
    )
    unit, amount = calibration.asked
    about: dict[str, Any] = {"kind": "calibration", "asked": {unit: amount}}
    if calibration.shared_out == unit:
        gathered = [gather(inputs, *each) for each in zip(calibration.mix, _targets(calibration), strict=True)]
    else:
        gathered = gather_balanced(inputs)
        about["balance"] = calibration.shared_out
    streams = [Stream(number, source, source.chosen) for number, source in enumerate(gathered)]
    return assemble(inputs, gathered, streams, out, about, removable=work is None)


def _targets(calibration: CalibrationSpec) -> list[Target]:
    """What each source of the mix must reach where the weights are shares of what the mix is measured in."""
    if calibration.asked[0] == "samples":
        return [Target(samples=count) for count in mix_shares(calibration)]
    return [Target(tokens=count, field="calibration.tokens") for count in mix_shares(calibration)]


def prepare_packs(
    calibration: CalibrationSpec,
    evaluate: EvaluateSpec,
    length: int,
    exclude: Path,
    tokenizer_directory: Path,
    recipe_directory: Path,
    out: Path,
    progress: Progress = SILENT,
    *,
    work: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Writes held-out rows of at most `length` tokens below `out`: other samples of the calibration's sources, and
    extra packs.

    `evaluate.packs.samples` are split over the mix like the calibration. An extra pack gets as many samples as a source
    of the mix has on average, weighted among the extra packs. No sample has the content of one in the calibration at
    `exclude`, and none has rows that show the tokens of a row there or of another sample here, at `length` or at any of
    `evaluate.packs.lengths`: samples that differ only where they are cut off count once. The `confirm` share of each
    source's samples makes rows of their own, which `CalibrationTokens.rows("confirm")` lists; a sample is in the same
    part at every length.

    Raises UnusableError as `prepare` does, RecipeError where an extra pack has the name of a source of the mix.
    """
    _check_names(calibration, evaluate)
    calibration = dated(calibration, Path(tokenizer_directory), Path(recipe_directory))
    calibration = calibration.model_copy(update={"max_length": length})
    inputs = Inputs(
        calibration,
        Path(tokenizer_directory),
        Path(recipe_directory),
        work or out / "work",
        trust_remote_code,
        progress,
    )
    calibrated = CalibrationTokens.load(exclude)
    held_out = held_out_from(
        calibrated,
        (length, *evaluate.packs.lengths),
        inputs.end_token() if any(source["end_tokens"] for source in calibrated.summary["sources"]) else None,
    )
    rows_read = {source["name"]: source["rows_read"] for source in calibrated.summary["sources"]}
    packs = evaluate.packs
    entries = (*calibration.mix, *evaluate.extra_packs)
    targets = [Target(samples=count, field="evaluate.packs.samples") for count in pack_shares(calibration, evaluate)]
    gathered = [
        gather(inputs, entry, target, held_out, skip=rows_read.get(entry.name, 0))
        for entry, target in zip(entries, targets, strict=True)
    ]
    streams = []
    for number, source in enumerate(gathered):
        confirm = [_is_confirm(rank, packs.confirm) for rank in range(len(source.chosen))]
        streams += [
            Stream(number, source, [s for s, mark in zip(source.chosen, confirm, strict=True) if mark == part], part)
            for part in range(len(PARTS))
        ]
    about = {
        "kind": "packs",
        "asked": {"samples": packs.samples, "confirm": str(packs.confirm)},
        "extra": [entry.name for entry in evaluate.extra_packs],
    }
    return assemble(inputs, gathered, streams, out, about, removable=work is None)


def _check_names(calibration: CalibrationSpec, evaluate: EvaluateSpec) -> None:
    names = [entry.name for entry in (*calibration.mix, *evaluate.extra_packs)]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(
            [
                Problem(
                    "evaluate.extra_packs",
                    f"the name '{name}' is used by another source. Give every source its own name.",
                )
                for name in doubled
            ]
        )


def _is_confirm(sample: int, share: Decimal) -> bool:
    """Spreads the confirm share evenly over the samples: exact to one sample in every prefix."""
    return int((sample + 1) * share) > int(sample * share)
