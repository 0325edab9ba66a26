"""The record in a run's directory of what runs put there, and whether a file there is still what it was. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reapkit.core.artifact_store import READ_WHOLE
from reapkit.core.errors import UnusableError
from reapkit.core.hashing import digest_file
from reapkit.core.json_text import parse_json

RECORD = ".reapkit-run.json"


@dataclass(frozen=True)
class Published:
    """One file of ours: `source` names the content it was given, `size` and `mtime_ns` are as we left it, `sha256` is
    that of its bytes ("" where it is not known)."""

    source: str
    size: int
    mtime_ns: int
    sha256: str = ""

    def is_as_left(self, now: os.stat_result) -> bool:
        return (now.st_size, now.st_mtime_ns) == (self.size, self.mtime_ns)


COMING = Published("", -1, -1)
"""A file that is being written, or was when its run was killed."""


def read_record(path: Path) -> dict[str, Published]:
    """What runs published at `path`, by name relative to it. Raises UnusableError for a record that is none,
    OSError where the system refuses it."""
    try:
        files = parse_json((path / RECORD).read_text(encoding="utf-8"))["files"]
        if not all(_is_sane(facts) for facts in files.values()):
            raise ValueError("a fact of a file is of a wrong kind")
        found = {name: Published(**facts) for name, facts in files.items()}
    except FileNotFoundError:
        return {}
    except NotADirectoryError:
        file = next(each for each in (path, *path.parents) if each.exists())
        raise UnusableError(f"{file}: is a file. Choose another output.directory.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnusableError(
            f"{path / RECORD}: the record of what runs wrote there cannot be read ({type(error).__name__}: {error}). "
            "Move the directory away, or choose another output.directory."
        ) from None
    return found


def changed_file(path: Path, below: str = "", *, full: bool = False) -> str | None:
    """The first file of a run's directory, at or below the name `below` in it, that is not what a run wrote, and what
    about it; None where all are. A large file of the size and time that it was left with is read only with `full`.
    """
    for place, known in sorted(read_record(path).items()):
        if (not below or is_below(place, below)) and known != COMING and (what := _change(path / place, known, full)):
            return f"{place} {what}"
    return None


def is_below(place: str, name: str) -> bool:
    """Whether the path `place` is `name` or lies in it."""
    return place == name or place.startswith(f"{name}/")


def _change(file: Path, known: Published, full: bool) -> str | None:
    try:
        now = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    if now.st_size != known.size:
        return f"has {now.st_size:,} bytes, {known.size:,} were written"
    if known.is_as_left(now) and now.st_size > READ_WHOLE and not full:
        return None
    if not known.sha256:
        return None if known.is_as_left(now) else "was changed after it was written"
    found = digest_file(file)
    return None if found == known.sha256 else f"has other bytes than were written (sha256 {found[:12]}…)"


def _is_sane(facts: Mapping[str, Any]) -> bool:
    texts, numbers = (facts["source"], facts.get("sha256", "")), (facts["size"], facts["mtime_ns"])
    return all(type(text) is str for text in texts) and all(type(number) is int for number in numbers)
