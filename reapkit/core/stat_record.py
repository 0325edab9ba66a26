"""Which sha256 files had when they were last read whole, by size, modification time and inode: a cache in a JSON file.
Torch-free.

It is written whole or not at all. Where several processes write it, the last one stays: what it lacks is read again.
Where it cannot be written (a store that is read-only) it is left as it is.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reapkit.core.atomic_files import write_json
from reapkit.core.json_text import parse_json


@dataclass
class StatRecord:
    """The record in `file`; what cannot be read counts as empty. `known`: size, mtime in ns, inode, sha256 by name."""

    file: Path
    known: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, file: Path) -> StatRecord:
        try:
            found = parse_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        entries = found.items() if isinstance(found, dict) else ()
        return cls(file, {name: facts for name, facts in entries if isinstance(facts, list)})

    def sha256(self, name: str, now: os.stat_result) -> Any:
        """What `name` had when it was as it is `now`, or None."""
        facts = self.known.get(name)
        return facts[-1] if facts and facts[:-1] == _facts(now) else None

    def update(self, found: dict[str, tuple[os.stat_result, str]]) -> None:
        """Adds what was read now, by name: what the system said before it was read, and the sha256 (hex)."""
        fresh = {name: [*_facts(facts), sha256] for name, (facts, sha256) in found.items()}
        if any(self.known.get(name) != facts for name, facts in fresh.items()) or not self.file.exists():
            self.known |= fresh
            with suppress(OSError):
                write_json(self.file, self.known)


def _facts(found: os.stat_result) -> list[int]:
    return [found.st_size, found.st_mtime_ns, found.st_ino]
