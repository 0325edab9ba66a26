"""Inspects held-out packs of every length, each shown like a calibration. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reapkit.report.inspection import calibration
from reapkit.report.inspection.render import Block


def facts(directory: Path) -> dict[str, Any]:
    """The facts of each pack by its length."""
    packs = sorted(
        (file.parent for file in directory.glob("*/calibration.json")), key=lambda pack: (len(pack.name), pack.name)
    )
    return {"lengths": {pack.name: calibration.facts(pack) for pack in packs}}


def blocks(found: Mapping[str, Any], *, colour: bool) -> list[Block]:
    """One after another."""
    return [block for pack in found["lengths"].values() for block in calibration.blocks(pack, colour=colour)]
