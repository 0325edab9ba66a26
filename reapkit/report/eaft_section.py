"""The section about EAFT regions: where the model was right, uncertain, or confidently wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy import ndarray

from reapkit.core.formatting import number, percent, plural
from reapkit.observation.eaft_table import EaftTable, cell_bounds
from reapkit.observation.observation import Trace
from reapkit.recipe.schema import EaftSpec
from reapkit.report.blocks import Chart, Note, PageSection, PageTable
from reapkit.report.charts import axis, grid, shade
from reapkit.report.view import View
from reapkit.selection.eaft import REGIONS, RegionBorders, region_positions
from reapkit.selection.totals import source_alphas

BINS = 48
DECADES = 4
LEAST_P = 10.0**-DECADES
SMALL_CONFLICT_SHARE = 0.005


def eaft_section(view: View, material: Trace | EaftTable) -> PageSection:
    """Where positions lie in (p, H), the borders, each region's share, and what the conflict term changed if it was
    used."""
    used = (view.selection.details.get("eaft") if view.selection else None) or {}
    borders, shares = _measured(view) if not used else (_borders_of(used), used["shares"])
    conflict, uncertain = shares["all"]["conflict"], shares["all"]["uncertain"]
    sentence = (
        f"{percent(conflict, 2)} of the positions are confident conflicts (low p, low H), {percent(uncertain, 2)} are"
        f" uncertain (low p, high H). {_weight_matters(conflict)}"
    )
    blocks: list[Any] = [
        Chart(
            "regions",
            "Confidence and correctness",
            sentence,
            [_density(material)],
            _layout(list(borders.values())),
            400,
        ),
        _shares_table(borders, shares),
    ]
    if used.get("changed_by_conflict") is not None:
        blocks.append(_effect(used["changed_by_conflict"], used["weights"]["conflict"]))
    if realised := used.get("realised"):
        cuts = "; ".join(
            ", ".join(f"{name} {level:.3g}" for name, level in levels.items()) for levels in realised.values()
        )
        blocks.append(
            Note(
                "info",
                "The exact trace exceeded observe.trace_bytes, so positions were summed in 32 x 16 cells of (p, H)."
                f" Quantiles used: {cuts}.",
            )
        )
    lead = "p is the probability of the reference token, H the entropy over the top logits divided by its maximum. " + (
        "The saliency was weighted by these regions." if used else "Default quantiles; this cut did not use them."
    )
    return PageSection("eaft", "EAFT regions", blocks, lead, "EAFT")


def _shares_table(borders: dict[str, RegionBorders], shares: dict[str, dict[str, float]]) -> PageTable:
    """Each source's share of every region; its own borders where they differ by source, else the common ones below."""
    regions = REGIONS if any(row["other"] for row in shares.values()) else REGIONS[:3]
    columns = [("source", "left"), *((region, "right") for region in regions)]
    rows = [(name, *(percent(row[region], 2) for region in regions)) for name, row in shares.items()]
    if len(borders) == 1:
        [one] = borders.values()
        return PageTable(
            columns,
            rows,
            note=(
                f"Borders for all sources: p low up to {number(one.p_low)}, H low up to {number(one.h_low)}, H high"
                f" from {number(one.h_high)}."
            ),
            narrow=True,
        )
    own = {name: (number(one.p_low), number(one.h_low), number(one.h_high)) for name, one in borders.items()}
    return PageTable(
        [*columns, ("p low up to", "right"), ("H low up to", "right"), ("H high from", "right")],
        [(*row, *own.get(row[0], ("–",) * 3)) for row in rows],
    )


def _effect(changed: int, weight: float) -> Note:
    if not changed:
        return Note("warn", "The conflict term changed no kept expert: without it the same experts stay.")
    return Note(
        "info",
        f"The conflict weight {weight:g} changed {plural(changed, 'kept expert')} compared with a run that weights"
        " conflict positions like all others.",
    )


def _weight_matters(share: float) -> str:
    return (
        "So few conflicts hardly change the decision, whatever their weight."
        if share < SMALL_CONFLICT_SHARE
        else "These are enough for the conflict weight to matter."
    )


def _measured(view: View) -> tuple[dict[str, RegionBorders], dict[str, dict[str, float]]]:
    observation = view.observation
    mix = (
        None if isinstance(observation.eaft, EaftTable) else view.mix
    )  # a table cannot be cut at every mix's quantiles
    found = region_positions(observation, EaftSpec(), source_alphas(observation, mix))
    positions = dict(
        zip(
            ("all", *observation.sources),
            np.concatenate([found.positions.sum(0, keepdims=True), found.positions]),
            strict=True,
        )
    )
    shares = {name: (row / max(1.0, float(row.sum()))).tolist() for name, row in positions.items()}
    return {"pooled": found.thresholds[0]}, {name: dict(zip(REGIONS, row, strict=True)) for name, row in shares.items()}


def _borders_of(used: dict[str, Any]) -> dict[str, RegionBorders]:
    """By source, or the pooled ones; sources without a position have none."""
    known = {name: RegionBorders(**borders) for name, borders in used["thresholds"].items()}
    return {name: one for name, one in known.items() if None not in (one.p_low, one.h_low, one.h_high)}


def _density(material: Trace | EaftTable) -> dict[str, Any]:
    """Positions in equal steps of log p (all below the least p in the first) and of H."""
    p, h, weight = _points(material)
    place = 1 + np.log10(np.maximum(p, LEAST_P, dtype=np.float64)) / DECADES
    x, y = (np.clip((values * BINS).astype(np.int64), 0, BINS - 1) for values in (place, h.astype(np.float64)))
    cells = np.bincount(y * BINS + x, weights=weight, minlength=BINS * BINS).reshape(BINS, BINS).astype(np.int64)
    edges = [edge / BINS for edge in range(BINS + 1)]
    return grid(
        edges,
        x=[LEAST_P ** (1 - edge) for edge in edges],
        z=[[math.log10(n) if n else None for n in row] for row in cells.tolist()],
        text=[[f"{n:,} positions" for n in row] for row in cells.tolist()],
        colorscale=shade("--heat-low", "--heat-high"),
        hovertemplate="p %{x:.3g}, H %{y:.2f}: %{text}<extra></extra>",
    )


def _points(material: Trace | EaftTable) -> tuple[ndarray, ndarray, ndarray]:
    """p, H and how many positions: of every position, or of every cell of a table at its upper bounds."""
    if isinstance(material, Trace):
        return material.p, material.h, np.ones(len(material))
    p, h = (np.minimum([cell_bounds(edges)[1] for edges in each], 1) for each in (material.p_edges, material.h_edges))
    shape = material.positions.shape
    return (
        np.broadcast_to(p[:, :, None], shape).ravel(),
        np.broadcast_to(h[:, None, :], shape).ravel(),
        material.positions.ravel(),
    )


def _layout(borders: list[RegionBorders]) -> dict[str, Any]:
    """Axes, and the regions of each set of borders."""
    shapes, notes = [], []
    for one in borders:
        edge = max(one.p_low, LEAST_P)
        shapes += [_region(edge, 0, one.h_low, "--bad"), _region(edge, one.h_high, 1, "--warn")]
    if len(borders) == 1:
        notes = [
            _label("conflict", borders[0].h_low / 2, "--bad"),
            _label("uncertain", (1 + borders[0].h_high) / 2, "--warn"),
        ]
    return {
        "shapes": shapes,
        "annotations": notes,
        "yaxis": axis("entropy H", range=[0, 1], zeroline=False),
        "xaxis": axis(
            "p of the reference token", type="log", range=[-DECADES, 0], dtick=1, zeroline=False, exponentformat="none"
        ),
    }


def _region(edge: float, low: float, high: float, color: str) -> dict[str, Any]:
    return {
        "type": "rect",
        "x0": LEAST_P,
        "x1": edge,
        "y0": low,
        "y1": high,
        "line": {"color": color, "width": 2},
        "fillcolor": "rgba(0,0,0,0)",
    }


def _label(text: str, height: float, color: str) -> dict[str, Any]:
    return {
        "showarrow": False,
        "x": -DECADES + 0.06,
        "xanchor": "left",
        "y": height,
        "text": text,
        "bgcolor": "--surface",
        "borderpad": 2,
        "font": {"size": 12, "color": color},
    }
