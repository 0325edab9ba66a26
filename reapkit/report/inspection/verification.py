"""Inspects a verification: what was proved and measured on the written directories. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reapkit.report.inspection.evaluation import gate_table
from reapkit.report.inspection.recognise import read_json
from reapkit.report.inspection.render import Block, lines, table
from reapkit.report.tables import result_table


def facts(directory: Path) -> dict[str, Any]:
    """verify.json without the metrics of every source."""
    found = read_json(directory / "verify.json", ("rows", "proofs", "gates", "verdict", "advice"))
    return {name: found[name] for name in ("verdict", "advice", "rows", "proofs", "gates")}


def blocks(found: Mapping[str, Any], *, colour: bool) -> list[Block]:
    """Final numbers, proofs, gates, verdict."""
    rows = [(proof["directory"], proof["name"], _outcome(proof), proof["detail"]) for proof in found["proofs"]]
    return [
        result_table(found),
        table("Proofs", ("directory", "proof", "passed", "found"), rows, left=("proof", "passed", "found")),
        *gate_table("Gates", found["gates"]),
        lines(f"verdict: {found['verdict']}", *([found["advice"]] if found["advice"] else [])),
    ]


def _outcome(proof: Mapping[str, Any]) -> str:
    if not proof["measured"]:
        return "not measured"
    return "yes" if proof["passed"] else "NO"
