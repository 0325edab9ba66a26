"""The inputs that all sources of one preparation share: the recipe's calibration, tokenizer, directories, progress."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from reapkit.calibration.identity import source_identity, tokenizer_identity, vocabulary
from reapkit.calibration.renderer import read_template
from reapkit.core.errors import UnusableError
from reapkit.core.hashing import digest
from reapkit.core.json_text import parse_json
from reapkit.core.progress import Progress
from reapkit.recipe.key_values import key_values
from reapkit.recipe.schema import CalibrationSpec, MixEntry

VERSION = 2
"""Of the tokens' meaning; raise it when the same recipe would give other tokens."""


@dataclass(frozen=True)
class Inputs:
    """The arguments of a preparation, and what is read from them when first needed."""

    calibration: CalibrationSpec
    tokenizer_directory: Path
    recipe_directory: Path
    work: Path
    trust_remote_code: bool
    progress: Progress

    @cached_property
    def template(self) -> str | None:
        """The recipe's own chat template."""
        return read_template(self.calibration.chat_template, self.recipe_directory)

    @cached_property
    def tokenizer_hash(self) -> str:
        return digest(tokenizer_identity(self.tokenizer_directory))

    @cached_property
    def vocabulary(self) -> int | None:
        """How many token ids the model's embedding has, where its config says."""
        try:
            config = parse_json((self.tokenizer_directory / "config.json").read_text(encoding="utf-8"), infinite=True)
        except (OSError, ValueError):
            return None
        return vocabulary(config)

    def tokenizer(self) -> Any:
        """Loaded when first asked for: sources of token ids need none. Raises UnusableError where it cannot be
        loaded."""
        return _load_tokenizer(self.tokenizer_directory, self.trust_remote_code, self.tokenizer_hash)

    def end_token(self) -> int:
        """The id that `concat` puts between samples. Raises UnusableError where the tokenizer has none."""
        token = self.tokenizer().eos_token_id
        if token is None:
            raise UnusableError(
                f"{self.tokenizer_directory}: the tokenizer has no end token (eos_token), which "
                "`packing: concat` puts between samples. Choose `packing: none` or `isolated`."
            )
        return token

    def part_key(self, entry: MixEntry, held_out: Collection[str] | None, skip: int) -> str:
        """Names what decides which samples a source gives and how they are tokenized; not how many, nor how they are
        packed."""
        calibration = self.calibration
        return digest(
            [
                VERSION,
                source_identity(entry, self.recipe_directory),
                {name: value for name, value in key_values(entry).items() if name != "weight"},
                self.tokenizer_hash,
                self.vocabulary,
                calibration.seed,
                calibration.score,
                self.template,
                calibration.spans and calibration.spans.model_dump(mode="json"),
                held_out and sorted(held_out),
                skip,
                *([calibration.date] if calibration.date else []),
                *([calibration.overflow == "window"] if entry.max_tokens else []),
            ]
        )


def load_tokenizer(directory: Path, trust_remote_code: bool) -> Any:
    """The tokenizer of a model directory. Raises UnusableError where it cannot be loaded."""
    return _load_tokenizer(directory, trust_remote_code, digest(tokenizer_identity(directory)))


@lru_cache(maxsize=2)
def _load_tokenizer(directory: Path, trust_remote_code: bool, identity: str) -> Any:
    """The tokenizer of a directory; `identity` makes sure that changed files are read again."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UnusableError(f"{directory}: its tokenizer cannot be loaded ({type(error).__name__}: {error}).") from None
    if tokenizer.is_fast:  # some are saved with settings of their training
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer
