"""Finds what ships inside the package: the demo model's directory, and endless streams of generated text to calibrate
on.

This module imports neither torch nor transformers: a recipe that names `builtin:` sources can be planned without them.

The demo model was trained on the same generators. Its rows come from `TRAINING_SEED`, which `generate` refuses unless
told that it is drawing training rows; a calibration or evaluation seed can therefore never repeat the training text.
"""

import importlib
from collections.abc import Callable, Iterator

from reapkit.calibration.builtin.draw import Draw

TRAINING_SEED = -1
"""The seed of the demo model's own training rows; reserved for them."""

SOURCES = {
    "code": "python_code.code_row",
    "tools": "function_calls.tools_row",
    "prose": "english_prose.prose_row",
    "math": "worked_math.math_row",
}
"""Each source's recipe for one row, a function of the row's own stream of draws; its module is imported when a row is
drawn."""

_DESCRIPTIONS = {
    "code": "Python modules: functions, classes, small algorithms, scripts and tests ({'text': ...})",
    "tools": "conversations that call functions described by JSON schemas ({'messages': [...], 'tools': [...]})",
    "prose": "English notes, letters, reports, instructions and stories ({'text': ...})",
    "math": "arithmetic and word problems with worked steps ({'messages': [...]})",
}


def description(name: str) -> str:
    """One line saying what the rows of source `name` are and which keys they have.

    Raises: ValueError when there is no such source.
    """
    _require_source(name)
    return _DESCRIPTIONS[name]


def generate(name: str, *, seed: int, start: int = 0, training: bool = False) -> Iterator[dict]:
    """Yield the rows `start`, `start + 1`, ... of source `name`, without end.

    Row i depends on (name, seed, i) alone, so a range can be drawn without drawing what lies before it, and it is the
    same on every Python from 3.11 on. All text is ASCII.

    Raises: ValueError when there is no such source, `start` is negative, or `seed` is `TRAINING_SEED` without
    `training=True` (or the other way round).
    """
    _require_source(name)
    if start < 0:
        raise ValueError(f"start: found {start}, but rows are numbered from 0.")
    if training != (seed == TRAINING_SEED):
        raise ValueError(
            f"seed: {seed} with training={training}, but seed {TRAINING_SEED} is reserved for the rows the demo model"
            " was trained on. Choose any other seed for calibration and evaluation."
        )
    return _rows(name, seed, start)


def _rows(name: str, seed: int, start: int) -> Iterator[dict]:
    module, _, function = SOURCES[name].partition(".")
    row: Callable[[Draw], dict] = getattr(importlib.import_module(f"reapkit.calibration.builtin.{module}"), function)
    index = start
    while True:
        yield row(Draw(f"{name}-{seed}-{index}"))
        index += 1


def _require_source(name: str) -> None:
    if name not in SOURCES:
        raise ValueError(f"builtin source {name!r} does not exist. Known: {', '.join(SOURCES)}.")
