"""Builds plotly traces and axes for the sections, as plain data in the stylesheet's colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Trace = dict[str, Any]
Numbers = Sequence[float | None]

DOT = {"width": 1.5, "dash": "dot", "color": "--muted"}


def line(
    x: Sequence[Any], y: Numbers, name: str, color: str, hover: str, *, markers: bool = True, width: float = 2.5
) -> Trace:
    """A line, with a marker at each point."""
    return {
        "x": list(x),
        "y": list(y),
        "name": name,
        "mode": "lines+markers" if markers else "lines",
        "marker": {"size": 5},
        "line": {"color": color, "width": width},
        "hovertemplate": f"{hover}<extra>{name}</extra>",
    }


def reference(x: Sequence[Any], y: Numbers, name: str) -> Trace:
    """A dotted line to compare with: chance, random, even."""
    return {
        "x": list(x),
        "y": list(y),
        "name": name,
        "mode": "lines",
        "line": DOT,
        "hovertemplate": f"%{{y:.1%}}<extra>{name}</extra>",
    }


def bars(x: Sequence[Any], y: Numbers, color: str | Sequence[str], hover: str) -> Trace:
    """Upright bars."""
    return {
        "type": "bar",
        "x": list(x),
        "y": list(y),
        "marker": {"color": color},
        "hovertemplate": f"{hover}<extra></extra>",
    }


def rows(
    names: Sequence[str], values: Numbers, color: str | Sequence[str], labels: Sequence[str] = (), **extra: Any
) -> Trace:
    """Lying bars, the first name on top; each with its label written on it."""
    shade = color if isinstance(color, str) else list(color)[::-1]
    text = (
        {"text": list(labels)[::-1], "textposition": "auto", "hovertemplate": "%{y}: %{text}<extra></extra>"}
        if labels
        else {}
    )
    return {
        "type": "bar",
        "orientation": "h",
        "y": list(names)[::-1],
        "x": list(values)[::-1],
        "marker": {"color": shade},
        "cliponaxis": False,
        **text,
        **extra,
    }


def whiskers(
    names: Sequence[str],
    found: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    color: str | Sequence[str],
    *,
    name: str = "",
    symbol: str = "circle",
    whisker: str = "--muted",
) -> Trace:
    """A dot per name at its value with its interval; `found`: `{"value", "interval"}` each."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [each["value"] for each in found],
        "y": list(names),
        "error_x": error_bars(found, whisker),
        "name": name,
        "text": list(labels),
        "marker": {"size": 10, "color": color, "symbol": symbol},
        "showlegend": bool(name),
        "hovertemplate": f"%{{y}}: %{{text}}<extra>{name}</extra>",
    }


def error_bars(found: Sequence[Mapping[str, Any]], color: str) -> dict[str, Any]:
    """Intervals around values, `{"value", "interval"}` each; none where there is no interval."""
    values = [each["value"] for each in found]
    ends = [each.get("interval") or (value, value) for each, value in zip(found, values, strict=True)]
    return {
        "type": "data",
        "symmetric": False,
        "thickness": 2,
        "width": 4,
        "color": color,
        "array": [max(0.0, high - value) for (_, high), value in zip(ends, values, strict=True)],
        "arrayminus": [max(0.0, value - low) for (low, _), value in zip(ends, values, strict=True)],
    }


def grid(rows_of: Sequence[Any], **extra: Any) -> Trace:
    """A heat map whose cells the page fills; `rows_of` names its rows."""
    return {
        "type": "heatmap",
        "z": [[0]],
        "y": list(rows_of),
        "hoverongaps": False,
        "showscale": False,
        "hovertemplate": "%{text}<extra></extra>",
        **extra,
    }


def shade(low: str, high: str) -> list[list[Any]]:
    """A scale between two colours."""
    return [[0, low], [1, high]]


def axis(title: str = "", form: str = "", **extra: Any) -> dict[str, Any]:
    """An axis with its title and number format."""
    return {**({"title": {"text": title}} if title else {}), **({"tickformat": form} if form else {}), **extra}


def layer_axis(layers: Sequence[int]) -> dict[str, Any]:
    """An axis of whole layers only, each one where they are few."""
    return axis("layer") | ({"dtick": 1} if len(layers) <= 16 else {})


def names_axis(**extra: Any) -> dict[str, Any]:
    """A downward axis of names, the first on top."""
    return {"autorange": "reversed", "type": "category", "ticklabelstandoff": 6, **extra}


def upright(x: float, **style: Any) -> dict[str, Any]:
    """A line across the whole height at `x`."""
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": style}


def across(y: float, **style: Any) -> dict[str, Any]:
    """A line across the whole width at `y`."""
    return {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": y, "y1": y, "line": style}
