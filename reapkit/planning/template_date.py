"""The date that a recipe's chat templates see: the recipe's own, or the one that its store keeps since the first run
that needed one. Torch-free."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from reapkit.calibration.clock import reads_clock, today
from reapkit.core.artifact_store import Store
from reapkit.core.atomic_files import write_json
from reapkit.core.errors import UnusableError
from reapkit.core.json_text import parse_json
from reapkit.recipe.loading import LoadedRecipe

FILE = "date.json"
"""In the store: one date for all its recipes, so that they go on sharing samples and observations."""


def template_date(loaded: LoadedRecipe, model_directory: Path) -> str | None:
    """The date (YYYY-MM-DD) that the recipe's chat templates see now; None where none reads the clock. Without a date
    in recipe and store it is today's, which the first run keeps (`keep_date`)."""
    if not reads_clock(loaded.calibration, model_directory, loaded.directory):
        return None
    return loaded.calibration.date or kept_date(Store(loaded.runtime.store)) or today()


def kept_date(store: Store) -> str | None:
    """The date that the store keeps, if it does. Raises UnusableError where its file cannot be read."""
    path = store.root / FILE
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not re.fullmatch(r"\d{4}-\d\d-\d\d", str(found.get("date"))):
            raise ValueError("it names no date")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UnusableError(
            f"{path}: the date that chat templates see cannot be read ({error}). Give calibration.date, or delete the"
            " file: then it is that of the next run."
        ) from None
    return found["date"]


def keep_date(store: Store, date: str) -> str:
    """The date that the store keeps from now on: `date` where it has none yet. One that is read-only keeps none."""
    if (known := kept_date(store)) is not None:
        return known
    try:
        with store.locked("date", "templates"):
            if (known := kept_date(store)) is None:  # by whoever held the lock
                write_json(store.root / FILE, {"date": date})
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
    return known or date


def date_note(loaded: LoadedRecipe, date: str) -> str:
    """Which date the chat templates see, and where it is from."""
    if loaded.calibration.date is not None:
        return f"chat templates read the clock: they see {date} (calibration.date)"
    if kept_date(Store(loaded.runtime.store)) is not None:
        return f"chat templates read the clock: they see {date}, which the store keeps ({FILE})"
    return f"chat templates read the clock: they see {date}; the first run keeps its day in the store ({FILE})"
