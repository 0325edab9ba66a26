"""Which date chat templates see: a template that reads the clock would give other tokens every day. Torch-free.

transformers gives templates one way to the time, the function `strftime_now`; it tells them the recipe's date instead.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

from reapkit.checkpoint.locate import local_path
from reapkit.recipe.schema import CalibrationSpec

CLOCK = "strftime_now"
TEMPLATE_FILES = (
    "tokenizer_config.json",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "tokenization*.py",
)
"""Where a model directory's chat templates are."""


def today() -> str:
    """This machine's date, as YYYY-MM-DD."""
    return datetime.date.today().isoformat()


def strftime_on(date: str) -> Callable[[str], str]:
    """What stands for transformers' `strftime_now` on a date (YYYY-MM-DD), at midnight."""
    return datetime.datetime.fromisoformat(date).strftime


def reads_clock(calibration: CalibrationSpec, model_directory: Path, recipe_directory: Path) -> bool:
    """Whether a chat template that the calibration may use mentions the clock: its own, else any of the model's."""
    if calibration.chat_template is not None:
        files = [local_path(calibration.chat_template, recipe_directory)]
    else:
        files = [file for pattern in TEMPLATE_FILES for file in model_directory.glob(pattern)]
    return any(CLOCK.encode() in file.read_bytes() for file in files if file.is_file())


def dated(calibration: CalibrationSpec, model_directory: Path, recipe_directory: Path) -> CalibrationSpec:
    """The calibration with the date that its templates see: the recipe's or today, none where no template asks."""
    asks = reads_clock(calibration, model_directory, recipe_directory)
    return calibration.model_copy(update={"date": (calibration.date or today()) if asks else None})
