"""The section about the measured removal paths: what removal costs after re-routing."""

from __future__ import annotations

from reapkit.core.formatting import count, extreme, listed, percent
from reapkit.observation.observation import Reroute
from reapkit.report.blocks import Chart, Folded, PageSection, PageTable
from reapkit.report.charts import axis, line
from reapkit.report.view import View


def reroute_section(view: View, found: Reroute) -> PageSection:
    """The error along the mix's removal paths, layer by layer."""
    measured = found.measured
    layers = [layer for layer, has_paths in zip(view.layers, measured.tolist(), strict=True) if has_paths]
    order, error = found.order[measured, -1], found.error[measured, -1]
    steps = int((order >= 0).sum(1).min())
    errors = error[:, :steps]
    removed = list(range(1, steps + 1))
    at = min(steps, max(1, view.experts // 2)) - 1
    worst = extreme(errors[:, at].tolist(), layers)
    mean = errors.mean(0)
    sentence = (
        f"With {at + 1} of {view.experts} experts gone the residual stream changes by {percent(float(mean[at]), 2)} of"
        f" its squared length in the mean layer, and by {percent(worst[1], 2)} in layer {worst[0]}. allocation: global"
        " uses such differences between layers."
    )
    highest = errors[layers.index(worst[0])]
    data = [
        line(removed, mean.tolist(), "mean layer", "--accent", "%{x} gone: %{y:.2%}", markers=False),
        line(removed, highest.tolist(), f"layer {worst[0]}", "--drop", "%{x} gone: %{y:.2%}", markers=False, width=2),
    ]
    layout = {"xaxis": axis("experts removed"), "yaxis": axis("‖y(A) − y‖² / ‖r‖²", ".1%")}
    rows = [
        (layer, percent(float(row[at]), 2), listed(order[order >= 0][:12].tolist(), 12))
        for layer, row, order in zip(layers, errors, order, strict=True)
    ]
    folded = Folded(
        "Layer by layer",
        [PageTable([("layer", "right"), (f"error, {at + 1} gone", "right"), ("first removed", "left")], rows)],
    )
    sample = listed(
        (
            f"{count(number)} of {name}"
            for name, number in zip(view.observation.sources, found.tokens.tolist(), strict=True)
        ),
        12,
    )
    lead = (
        f"Every expert was run on a sample of tokens ({sample}), then experts were removed one after another, and"
        " their tokens went to the next-best remaining experts."
    )
    return PageSection(
        "reroute",
        "What removal costs after re-routing",
        [Chart("reroute", "Error along the removal path", sentence, data, layout, 300), folded],
        lead,
        "Re-routing",
    )
