"""Writes the page about one run, finished or stopped by its gates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from reapkit.core.artifact_store import Artifact
from reapkit.core.formatting import human_bytes, human_experts, percent
from reapkit.planning.plan import Plan
from reapkit.report import comparison_sections, quality_sections, run_sections
from reapkit.report.blocks import Page, PageSection
from reapkit.report.cut_sections import slider
from reapkit.report.facts import RunFacts, facts_from
from reapkit.report.observation_sections import observation_sections
from reapkit.report.page import write_page
from reapkit.report.positions import page_data
from reapkit.report.quantization_section import quantization
from reapkit.report.result_section import result
from reapkit.report.view import View

FOOTER = (
    "Intervals are 95 % bootstrap intervals over rows. Curves of the observation are forecasts; the numbers against the"
    " base are measured."
)


def write_run_report(facts: RunFacts, out_html: Path) -> None:
    """Writes one self-contained HTML page about a run: what it did, what it cost, and everything needed to do it
    again."""
    write_page(run_page(facts), out_html)


def run_page(facts: RunFacts) -> Page:
    """The page as data."""
    view = View.of(facts.observation, facts.selection) if facts.observation is not None else None
    parts: list[PageSection | None] = [
        result(facts),
        quality_sections.gates(facts),
        quality_sections.quality(facts),
        run_sections.decision(facts),
        comparison_sections.equal_bytes(facts),
        comparison_sections.speed(facts),
        comparison_sections.benchmarks(facts),
        quantization(facts),
        run_sections.calibration(facts),
        *(observation_sections(view) if view else []),
        run_sections.proofs(facts),
        run_sections.stages(facts),
        run_sections.reproduce(facts),
    ]
    return Page(
        facts.recipe.name,
        "reapkit run",
        [part for part in parts if part is not None],
        _subtitle(facts),
        (facts.outcome.tone, facts.outcome.headline),
        FOOTER,
        page_data(view) if view else {},
        slider(view) if view else None,
    )


def _subtitle(facts: RunFacts) -> str:
    final = facts.quantized or facts.pruned
    if final is None:
        return facts.recipe.description or f"{facts.model.source}, stopped before any weight was written."
    removed = percent(1 - sum(final.experts.values()) / sum(facts.base.experts.values()), 0)
    scheme = f", {facts.quantization['scheme']}" if facts.quantization and facts.quantization.get("scheme") else ""
    experts = (
        f"{human_experts(facts.base.experts)} to {human_experts(final.experts)} experts per layer ({removed}"
        f" removed{scheme})"
    )
    sizes = f"{human_bytes(facts.base.nbytes)} to {human_bytes(final.nbytes)}"
    return f"{facts.recipe.description} {facts.model.source} from {experts}, {sizes}.".strip()


def unfinished_report(plan: Plan, artifacts: Mapping[str, Artifact]) -> bytes:
    """report.html of a run that ended at its evaluation."""
    with TemporaryDirectory() as scratch:
        page = Path(scratch) / "report.html"
        write_run_report(facts_from(plan, artifacts), page)
        return page.read_bytes()
