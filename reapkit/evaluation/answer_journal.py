"""Keeps the answers of an unfinished run beside its output, a line per batch, so that the next run goes on behind them.
Torch-free."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reapkit.core.atomic_files import naming
from reapkit.core.errors import RecipeError
from reapkit.core.json_text import parse_json
from reapkit.core.locks import unless_held


class AnswerJournal:
    """The batches that are finished: each a list of JSON values, one per prompt."""

    def __init__(self, path: Path):
        self.path = path
        self.batches: list[list[Any]] = []

    def append(self, batch: Sequence[Any]) -> None:
        """Adds a batch; it is on the disk when this returns. Raises OSError naming the file where the disk refuses."""
        self._write(_line(list(batch)))
        self.batches.append(list(batch))

    def _write(self, line: bytes) -> None:
        with naming(self.path), self.path.open("ab") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())


@contextmanager
def journal(path: Path, settings: Mapping[str, Any]) -> Generator[AnswerJournal]:
    """What earlier runs of these settings left at `path`, ready to be appended to; nobody else works on it meanwhile. A
    torn or damaged end is made again; the file goes once it is no longer needed (`finished`).

    Raises RecipeError where it was begun with other settings, or another process is at it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with unless_held(lock) as mine:
        if not mine:
            raise RecipeError(f"{path}: another run is working on it. Wait for it, or choose another -o.")
        try:
            found, valid = AnswerJournal(path), 0
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            for number, line in enumerate(lines):
                if (batch := _read(line)) is None:
                    break
                if number == 0:
                    _require_same(path, batch[0], settings)
                else:
                    found.batches.append(batch)
                valid += len(line)
            if path.exists():
                os.truncate(path, valid)
            if not valid:
                found._write(_line([dict(settings)]))
            yield found
        finally:
            lock.unlink(missing_ok=True)


def _require_same(path: Path, begun: Any, settings: Mapping[str, Any]) -> None:
    begun = begun if isinstance(begun, dict) else {}
    differing = [name for name in dict.fromkeys((*settings, *begun)) if settings.get(name) != begun.get(name)]
    if differing:
        raise RecipeError(
            f"{path}: an unfinished run with other settings left this ({', '.join(differing)}). Run it again with those"
            " to finish it, delete the file, or choose another -o."
        )


def _line(values: list[Any]) -> bytes:
    text = json.dumps(values, ensure_ascii=True, separators=(",", ":"))
    return f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n".encode()


def _read(line: bytes) -> list[Any] | None:
    """A line's values; None where it was torn or damaged."""
    sha256, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or hashlib.sha256(text).hexdigest().encode() != sha256:
        return None
    found = parse_json(text)
    return found if isinstance(found, list) and found else None
