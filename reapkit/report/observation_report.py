"""Writes the page about one observation, with or without a decision made from it."""

from __future__ import annotations

from pathlib import Path

from reapkit.core.formatting import count, plural
from reapkit.observation.observation import Observation
from reapkit.report.blocks import Page
from reapkit.report.cut_sections import slider
from reapkit.report.observation_sections import observation_sections
from reapkit.report.page import write_page
from reapkit.report.positions import page_data
from reapkit.report.view import View
from reapkit.selection.selection import Selection


def write_observation_report(
    observation: Observation, selection: Selection | None, out_html: Path, model: str | None = None
) -> None:
    """Writes one self-contained HTML page about an observation; a selection marks what was dropped, else the page
    starts at half.

    `model`: its name, where it is known.
    """
    write_page(observation_page(observation, selection, model), out_html)


def observation_page(observation: Observation, selection: Selection | None = None, model: str | None = None) -> Page:
    """The page as data."""
    view = View.of(observation, selection)
    model = model or observation.model_type
    scored = count(int(observation.scored_tokens.sum()))
    subtitle = (
        f"{observation.model_type}, {plural(len(observation.layers), 'MoE layer')} of {observation.num_experts}"
        f" experts, {scored} scored tokens from {plural(len(observation.sources), 'source')}: every pruning decision"
        " is made from these numbers."
    )
    return Page(
        f"What {model} showed",
        "reapkit observation",
        observation_sections(view),
        subtitle,
        data=page_data(view),
        slider=slider(view),
        footer=(
            "Curves are cheap forecasts from routing statistics: they show where an evaluation is worthwhile, but do"
            " not replace it."
        ),
    )
