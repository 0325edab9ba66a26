"""Inspects a path: facts for machines, tables of 80 columns for people. Torch is needed only to read an observation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from reapkit.core.errors import UnusableError
from reapkit.core.formatting import human_bytes
from reapkit.report.inspection.recognise import Found, recognise
from reapkit.report.inspection.render import Block, lines


@dataclass(frozen=True)
class Inspection:
    """A path's kind, its facts (plain JSON data) and, in a store, the stage that made it."""

    found: Found
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Everything the tables show, exact."""
        made = {"artifact": dict(self.found.artifact)} if self.found.artifact else {}
        return {"path": str(self.found.place), "kind": self.found.kind, **made, **self.facts}

    def blocks(self, *, colour: bool) -> list[Block]:
        """What a terminal prints, in order; without `colour` scored tokens stand between ⟦ and ⟧."""
        head = [_provenance(self.found, self.found.artifact)] if self.found.artifact else []
        return head + (_module(self.found.kind).blocks(self.facts, colour=colour) if self.found.kind else [])


def inspect(path: str | Path) -> Inspection:
    """Reads what lies at `path`: a recipe, a checkpoint, any artifact of a stage or of the store, or a run.

    Raises RecipeError where nothing lies there, UnusableError where it is nothing that reapkit knows, unfinished or
    damaged.
    """
    found = recognise(path)
    try:
        return Inspection(found, _module(found.kind).facts(found.place) if found.kind else {})
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration, OSError, SafetensorError) as error:
        raise UnusableError(
            f"{found.place}: this {found.kind} cannot be read ({type(error).__name__}: {error}), so it is damaged or"
            " of another version. Run the recipe again."
        ) from error


def _module(kind: str) -> Any:
    return import_module(f"reapkit.report.inspection.{kind}")


def _provenance(found: Found, artifact: Mapping[str, Any]) -> Block:
    where = (
        human_bytes(artifact["bytes"]) if artifact["bytes"] is not None else "files deleted, only the manifest is left"
    )
    return lines(
        f"{artifact['stage']} {artifact['key'][:12]}: made {artifact['finished']} in {artifact['seconds']:.1f} s,"
        f" {where}",
        *(f"warning: {warning}" for warning in artifact["warnings"]),
        *(f"open {found.place / 'report.html'}" for _ in range(artifact["stage"] == "report" and found.kind is None)),
    )
