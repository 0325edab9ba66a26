"""Inspects an evaluation: base and candidates side by side, gates, verdict and advice. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reapkit.core.formatting import human_bytes
from reapkit.evaluation.advice import summary_rows
from reapkit.evaluation.gates import UNION, Gate, GateResult
from reapkit.evaluation.metrics.table import in_view
from reapkit.report.inspection.recognise import read_json
from reapkit.report.inspection.render import Block, lines, table

NEEDED = ("packs", "base", "candidates", "controls", "confirm", "chosen", "verdict", "advice")


def facts(directory: Path) -> dict[str, Any]:
    """The table's rows, of all sources and of each, and the chosen candidate's gates."""
    evaluation = read_json(directory / "evaluation.json", NEEDED)
    chosen = next(entry for entry in evaluation["candidates"] if entry["name"] == evaluation["chosen"])
    groups = list(dict.fromkeys(group for found in evaluation["base"].values() for group in found if group != UNION))
    return {
        **{name: evaluation[name] for name in ("verdict", "chosen", "advice", "packs")},
        "rows": list(summary_rows(evaluation)),
        "by_source": {
            group: [row for row in summary_rows(evaluation, group) if row["name"] == evaluation["chosen"]]
            for group in groups
        },
        "gates": chosen["gates"],
        "confirm_gates": (evaluation["confirm"] or {}).get("gates", []),
    }


def blocks(found: Mapping[str, Any], *, colour: bool) -> list[Block]:
    """Rows, sources of the chosen candidate, gates, advice."""
    rows = found["rows"]
    confirm = [row for row in rows if row["role"] == "confirm"]
    sources = [(group, row) for group, of in found["by_source"].items() for row in of if row["role"] == "candidate"]
    return [
        lines(f"evaluation: {found['chosen']}: {found['verdict']}"),
        _rows("On the rows that decide", [row for row in rows if row["role"] != "confirm"]),
        *([_rows("On the rows kept to confirm", confirm)] if confirm else []),
        table(
            f"{found['chosen']} by source",
            ("source", "tokens", *(metric.label for metric in in_view("final"))),
            [
                (group, row["length"], *(metric.show_plain(row.get(metric.name)) for metric in in_view("final")))
                for group, row in sources
            ],
        ),
        *gate_table(f"Gates of {found['chosen']}", found["gates"]),
        *gate_table("Gates on the confirm rows", found["confirm_gates"]),
        lines(found["advice"]),
    ]


def _rows(title: str, rows: Sequence[Mapping[str, Any]]) -> Block:
    cells = [
        (
            row["name"].replace("-beside-", " beside "),
            row["length"],
            row["experts"],
            human_bytes(row["bytes"]),
            *(metric.show_plain(row.get(metric.name)) for metric in in_view("narrow")),
            row["verdict"] or "-",
        )
        for row in rows
    ]
    return table(
        title, ("", "tokens", "experts", "size", *(metric.label for metric in in_view("narrow")), "verdict"), cells
    )


def gate_table(title: str, gates: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Gates with value, interval, limit and verdict; `rows` are of so many tokens, or free continuations. Nothing where
    there are none."""
    results = [GateResult.from_json(gate) for gate in gates]
    rows = [
        (
            result.gate.metric.removesuffix("_delta"),
            result.gate.source,
            result.pack if result.pack.isdigit() else "free" if result.pack else "-",
            _measured(result),
            _limit(result.gate),
            result.verdict,
        )
        for result in results
    ]
    return (
        [
            table(
                title,
                ("gate", "source", "rows", "measured", "limit", "verdict"),
                rows,
                left=("source", "verdict"),
                whole=("gate", "verdict"),
            )
        ]
        if rows
        else []
    )


def _measured(result: GateResult) -> str:
    """`1.401 [1.37, 1.43]`."""
    if result.value is None:
        return "-"
    return f"{result.value:.4g}" + (f" [{result.interval[0]:.3g}, {result.interval[1]:.3g}]" if result.interval else "")


def _limit(gate: Gate) -> str:
    return f"± {gate.max:g}" if gate.min is not None and gate.max == -gate.min else gate.limit
