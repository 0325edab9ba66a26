"""Inspects a run: stages with times and hits, final numbers, warnings, and whether held-out samples were also
calibrated on. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reapkit.core.formatting import human_bytes
from reapkit.report.inspection.recognise import read_json
from reapkit.report.inspection.render import Block, lines, notes, table
from reapkit.report.tables import result_table


def facts(directory: Path) -> dict[str, Any]:
    """run.json in short, and the samples that calibration and packs share by content: `leaked`, which must be empty."""
    run = read_json(directory / "run.json", ("name", "recipe", "model", "stages", "warnings", "versions"))
    stages = {
        name: {key: stage[key] for key in ("key", "artifact", "executed", "seconds", "summary")}
        for name, stage in run["stages"].items()
    }
    return {
        **{name: run[name] for name in ("name", "recipe", "model", "warnings", "versions")},
        "outcome": run.get("outcome"),
        "stages": stages,
        **_leaked(directory),
    }


def _leaked(directory: Path) -> dict[str, Any]:
    """`held_out`: samples in packs by length; `leaked`: of these, per length and source, how many the calibration holds
    too.

    Both are None where calibration or packs are not there.
    """
    calibration, packs = (
        directory / "calibration" / "calibration.json",
        sorted((directory / "packs").glob("*/calibration.json")),
    )
    if not calibration.is_file() or not packs:
        return {"held_out": None, "leaked": None}
    known = {content for source in read_json(calibration, ("sources",))["sources"] for content in source["hashes"]}
    held_out, leaked = {}, {}
    for file in packs:
        sources = read_json(file, ("sources",))["sources"]
        held_out[file.parent.name] = sum(len(source["hashes"]) for source in sources)
        leaked |= {
            f"{file.parent.name}/{source['name']}": count
            for source in sources
            if (count := sum(content in known for content in source["hashes"]))
        }
    return {"held_out": held_out, "leaked": leaked}


def blocks(found: Mapping[str, Any], *, colour: bool) -> list[Block]:
    """Stages, final table, verdict, leaks, warnings."""
    stages = found["stages"]
    rows = [
        (
            name,
            "ran" if stage["executed"] else "in the store",
            f"{stage['seconds']:,.1f} s",
            stage["artifact"],
            _outcome(name, stage["summary"]),
        )
        for name, stage in stages.items()
    ]
    made: list[Block] = [
        lines(
            f"run {found['name']}: {found['model']}, recipe {found['recipe']}",
            ", ".join(f"{name} {version}" for name, version in found["versions"].items() if name in SHOWN_VERSIONS),
        ),
        table(
            "Stages",
            ("stage", "", "took", "artifact", "outcome"),
            rows,
            left=("", "artifact", "outcome"),
            whole=("", "artifact"),
        ),
    ]
    if "verify" in stages:
        made.append(result_table(stages["verify"]["summary"]))
    if outcome := found.get("outcome"):
        made.append(lines(outcome["sentence"], ""))
    advice = (stages.get("evaluate") or {"summary": {}})["summary"].get("advice")
    return [
        *made,
        *([lines(advice, "")] if advice else []),
        lines(_separation(found), ""),
        *notes("warnings", found["warnings"]),
    ]


SHOWN_VERSIONS = ("reapkit", "torch", "transformers", "llmcompressor")


def _separation(found: Mapping[str, Any]) -> str:
    if found["leaked"] is None:
        return "calibration or held-out packs are missing, so their samples cannot be compared"
    held_out = ", ".join(f"{count:,} of {length} tokens" for length, count in found["held_out"].items())
    if not found["leaked"]:
        return f"held-out samples ({held_out}) that are also in the calibration: none"
    leaks = ", ".join(f"{place} {count:,}" for place, count in found["leaked"].items())
    return (
        f"warning: held-out samples that are also in the calibration: {leaks}. These packs were made for another"
        " calibration, so the measured numbers are too good. Remove both artifacts from the store and run again."
    )


def _outcome(stage: str, summary: Mapping[str, Any]) -> str:
    """A few words; a stage with nothing to say says nothing."""
    if stage in ("prune", "quantize"):
        return " ".join(
            str(part)
            for part in (human_bytes(summary.get("bytes")), summary.get("scheme") or "", summary.get("method") or "")
            if part
        )
    if stage == "select":
        return ", ".join(f"{count:,} dropped by {name}" for name, count in summary.get("dropped", {}).items())
    if stage == "observe":
        return (
            f"{summary['tokens']:,} tokens, {summary['scored_tokens']:,} scored" if "scored_tokens" in summary else ""
        )
    if stage == "calibrate":
        return f"{sum(source['samples'] for source in summary.get('sources', {}).values()):,} samples"
    return str(summary.get("verdict", ""))
