"""Reports people look at: one self-contained HTML page per run or observation, and the model card.

`facts_from` gathers what a page or a card says; importing this package needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from reapkit.planning import Plan
from reapkit.report.facts import RunFacts, SourceModel, StageRow, facts_from
from reapkit.store import Artifact

if TYPE_CHECKING:
    from reapkit.observation import Observation
    from reapkit.selection import Selection

__all__ = ["RunFacts", "SourceModel", "StageRow", "facts_from", "model_card", "write_observation_report", "write_rejected_report",
           "write_run_report"]


def model_card(facts: RunFacts, which: Literal["pruned", "quantized"]) -> str:
    """README.md of a written model directory. Raises ValueError where the run wrote no such directory."""
    from reapkit.report import card

    return card.model_card(facts, which)


def write_run_report(facts: RunFacts, out_html: Path) -> None:
    """Writes one self-contained HTML page about a run, finished or stopped: equal facts give equal bytes."""
    from reapkit.report import run_report

    run_report.write_run_report(facts, out_html)


def write_rejected_report(plan: Plan, artifacts: Mapping[str, Artifact], directory: Path) -> None:
    """Writes report.html into the run directory of a run that its gates stopped."""
    write_run_report(facts_from(plan, artifacts), Path(directory) / "report.html")


def write_observation_report(observation: Observation, selection: Selection | None, out_html: Path, model: str | None = None) -> None:
    """Writes one self-contained HTML page about an observation of `model`; a selection marks what it drops, else the page starts at half."""
    from reapkit.report import observation_report

    observation_report.write_observation_report(observation, selection, out_html, model)
