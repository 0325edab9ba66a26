"""Names what is measured by everything that decides it; where measurements are kept, none is made twice. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from reapkit.core.atomic_files import write_json
from reapkit.core.hashing import digest
from reapkit.core.json_text import parse_json

T = TypeVar("T")


@dataclass(frozen=True)
class Measure:
    """One measurement: its kind, the version of what makes it (raised by one whenever that gives other bytes for the
    same spec), and in `spec` everything that decides its bytes. `title` is for people and no part of the key."""

    kind: str
    version: int
    spec: Mapping[str, Any]
    title: str = field(compare=False)

    @cached_property
    def key(self) -> str:
        return digest({"stage": self.kind, "version": self.version, "spec": self.spec, "inputs": {}})


class Measurements:
    """Keeps nothing: everything is measured each time. Where measurements are kept, see `pipeline.measurements`."""

    keeps = False

    def find(self, measure: Measure, load: Callable[[Path], T]) -> T | None:
        """What was measured before, by `load` from the directory that holds it, or None."""
        return None

    def get(
        self,
        measure: Measure,
        make: Callable[[Path | None], T],
        save: Callable[[T, Path], None],
        load: Callable[[Path], T],
    ) -> T:
        """What was measured before, else what `make` measures now.

        `make` is given a directory for what a killed attempt can go on from, or None; `save` writes its result into a
        directory, `load` reads it from there. Of a measurement that is kept, the result is what `load` gives.
        """
        return make(None)


KEPT_NOWHERE = Measurements()
FACTS = "facts.json"


def save_facts(found: Any, directory: Path) -> None:
    """A measurement that is JSON data."""
    write_json(directory / FACTS, found)


def load_facts(directory: Path) -> Any:
    """What `save_facts` wrote."""
    return parse_json((directory / FACTS).read_text(encoding="utf-8"))
