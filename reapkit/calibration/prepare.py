"""From the recipe's mix to token rows on disk, with an account of what was asked and what came out."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from reapkit.calibration.assemble import Stream, assemble
from reapkit.calibration.encoded import Samples, opened
from reapkit.calibration.gather import Encoder, Target, format_of, gather, packing_of
from reapkit.calibration.packing import largest_remainder
from reapkit.calibration.sources import Walk, open_walk
from reapkit.calibration.spans import read_template
from reapkit.calibration.tokens import PARTS, CalibrationTokens
from reapkit.errors import Problem, RecipeError, UnusableError
from reapkit.hashing import digest
from reapkit.progress import SILENT, Progress
from reapkit.recipe.schema import CalibrationSpec, EvaluateSpec, MixEntry
from reapkit.resolve import is_local, local_path, source_identity, tokenizer_identity

VERSION = 1
"""Of the tokens' meaning; raise it when the same recipe would give other tokens."""


@dataclass(frozen=True)
class _Inputs:
    """What every source of one preparation shares."""

    calibration: CalibrationSpec
    template: str | None
    tokenizer_directory: Path
    recipe_directory: Path
    work: Path
    trust_remote_code: bool
    progress: Progress

    def tokenizer(self) -> Any:
        return _load_tokenizer(self.tokenizer_directory, self.trust_remote_code)

    def end_token(self) -> int:
        """The id that `concat` puts between samples. Raises UnusableError where the tokenizer has none."""
        token = self.tokenizer().eos_token_id
        if token is None:
            raise UnusableError(f"{self.tokenizer_directory}: the tokenizer has no end token (eos_token), which `packing: concat` puts "
                                "between samples. Choose `packing: none` or `isolated`.")
        return token


@dataclass(frozen=True)
class Gathered:
    """A source's samples: the first `used` of `samples`."""

    entry: MixEntry
    walk: Walk
    format: Any
    samples: Samples
    used: int
    target: Target


def prepare(calibration: CalibrationSpec, tokenizer_directory: Path, recipe_directory: Path, out: Path, progress: Progress = SILENT, *,
            work: Path | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Writes the calibration's tokens below `out` and returns what `calibration.json` says.

    Samples (or tokens) are split over the mix by largest remainder and met exactly. The same recipe, data and tokenizer give the same
    bytes. Tokenized samples are kept below `work` (default: inside `out`, removed at the end), from where a killed run goes on.

    Raises UnusableError naming source and row, or the source of which nothing would be scored.
    """
    inputs = _inputs(calibration, tokenizer_directory, recipe_directory, work or out / "work", trust_remote_code, progress)
    weights = [entry.weight for entry in calibration.mix]
    if calibration.samples is not None:
        targets = [Target(samples=count) for count in largest_remainder(calibration.samples, weights)]
    else:
        targets = [Target(tokens=count, field="calibration.tokens") for count in largest_remainder(calibration.tokens, weights)]
    gathered = [_gather(inputs, entry, target) for entry, target in zip(calibration.mix, targets)]
    streams = [Stream(number, source, range(source.used)) for number, source in enumerate(gathered)]
    return assemble(inputs, gathered, streams, out, {"kind": "calibration", **_budget(calibration)}, removable=work is None)


def prepare_packs(calibration: CalibrationSpec, evaluate: EvaluateSpec, length: int, exclude: Path, tokenizer_directory: Path,
                  recipe_directory: Path, out: Path, progress: Progress = SILENT, *, work: Path | None = None,
                  trust_remote_code: bool = False) -> dict[str, Any]:
    """Writes held-out rows of at most `length` tokens below `out`: other samples of the calibration's sources, and the extra packs.

    `evaluate.packs.samples` are split over the mix like the calibration; every extra pack gets as many as a source of the mix on average,
    times its share among the extra packs. No sample has the content of one in the calibration at `exclude`. The `confirm` share of
    each source's samples makes rows of their own; `CalibrationTokens.rows("decide" | "confirm")` tells them apart.

    Raises UnusableError as `prepare` does, RecipeError where an extra pack has the name of a source of the mix.
    """
    names = [entry.name for entry in (*calibration.mix, *evaluate.extra_packs)]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError([Problem("evaluate.extra_packs", f"the name '{name}' is taken. Give every source its own name.") for name in doubled])
    calibration = calibration.model_copy(update={"max_length": length})
    inputs = _inputs(calibration, tokenizer_directory, recipe_directory, work or out / "work", trust_remote_code, progress)
    known = CalibrationTokens.load(exclude).summary["sources"]
    held_out = {content for source in known for content in source["hashes"]}
    rows_read = {source["name"]: source["rows_read"] for source in known}
    packs = evaluate.packs
    counts = largest_remainder(packs.samples, [entry.weight for entry in calibration.mix])
    if evaluate.extra_packs:
        extra = max(len(evaluate.extra_packs), packs.samples * len(evaluate.extra_packs) // len(calibration.mix))
        counts += largest_remainder(extra, [entry.weight for entry in evaluate.extra_packs])
    entries = (*calibration.mix, *evaluate.extra_packs)
    gathered = [_gather(inputs, entry, Target(samples=count, field="evaluate.packs.samples"), held_out, skip=rows_read.get(entry.name, 0))
                for entry, count in zip(entries, counts)]
    streams = []
    for number, source in enumerate(gathered):
        confirm = [sample for sample in range(source.used) if _is_confirm(sample, packs.confirm)]
        decide = sorted(set(range(source.used)) - set(confirm))
        streams += [Stream(number, source, decide, PARTS.index("decide")), Stream(number, source, confirm, PARTS.index("confirm"))]
    about = {"kind": "packs", "asked": {"samples": packs.samples, "confirm": str(packs.confirm)},
             "extra": [entry.name for entry in evaluate.extra_packs]}
    return assemble(inputs, gathered, streams, out, about, removable=work is None)


def _is_confirm(sample: int, share: Any) -> bool:
    """Spreads the confirm share evenly over the samples: exact to one sample in every prefix."""
    return int((sample + 1) * share) > int(sample * share)


def _budget(calibration: CalibrationSpec) -> dict[str, Any]:
    unit = "samples" if calibration.samples is not None else "tokens"
    return {"asked": {unit: getattr(calibration, unit)}}


def _inputs(calibration: CalibrationSpec, tokenizer_directory: Path, recipe_directory: Path, work: Path, trust_remote_code: bool,
            progress: Progress) -> _Inputs:
    template = read_template(calibration.chat_template, recipe_directory)
    return _Inputs(calibration, template, Path(tokenizer_directory), Path(recipe_directory), Path(work), trust_remote_code, progress)


def _gather(inputs: _Inputs, entry: MixEntry, target: Target, held_out: Collection[str] | None = None, skip: int = 0) -> Gathered:
    calibration = inputs.calibration
    walk = open_walk(entry, inputs.recipe_directory, seed=calibration.seed, held_out=held_out is not None, skip=skip)
    format = format_of(entry, walk)
    encoder = Encoder(calibration, format, inputs.tokenizer, inputs.template, _vocabulary(inputs.tokenizer_directory))
    packing = packing_of(calibration, format)
    end_token: Callable[[], int | None] = inputs.end_token if packing == "concat" else lambda: None
    with opened(inputs.work / f"{entry.name}-{_part_key(inputs, entry, held_out, skip)[:12]}") as samples, \
            inputs.progress.task(f"tokenize {entry.name}", target.amount, target.unit) as task:
        used = gather(samples, walk, encoder, target, end_token=end_token, held_out=held_out or (), task=task)
    return Gathered(entry, walk, format, samples, used, target)


def _part_key(inputs: _Inputs, entry: MixEntry, held_out: Collection[str] | None, skip: int) -> str:
    """Names everything that decides which samples a source gives and how they are tokenized; not how many, nor how they are packed."""
    calibration = inputs.calibration
    return digest([VERSION, identity(entry, inputs.recipe_directory), entry.model_dump(mode="json", exclude={"weight"}),
                   tokenizer_identity(inputs.tokenizer_directory), calibration.seed, calibration.score, inputs.template,
                   calibration.spans and calibration.spans.model_dump(mode="json"), held_out and sorted(held_out), skip])


def identity(entry: MixEntry, recipe_directory: Path) -> dict[str, Any]:
    """What names a source's content, local directories in the hub's layout included."""
    if is_local(entry.source, recipe_directory) and (directory := local_path(entry.source, recipe_directory)).is_dir():
        files = sorted(file for file in directory.rglob("*") if file.is_file() and not file.name.startswith("."))
        return {"files": {str(file.relative_to(directory)): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}}
    return source_identity(entry, recipe_directory)


def _vocabulary(directory: Path) -> int | None:
    """How many token ids the model's embedding has, where its config says."""
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")


@lru_cache(maxsize=2)
def _load_tokenizer(directory: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UnusableError(f"{directory}: its tokenizer cannot be loaded ({type(error).__name__}: {error}).") from None
    if tokenizer.is_fast:  # some are saved with settings of their training
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer
