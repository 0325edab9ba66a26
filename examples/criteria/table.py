"""Tables of what `compare.py measure` found, over all models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import exp, log
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Key = tuple[str, float, str, str, str | None]
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""The 97.5 % points by degrees of freedom."""
FEWEST = 3  # models for an interval worth reading
SMALLEST = 1e-4  # nats per token; below it a ratio of increases is noise over noise


def write_tables(models: Sequence[Mapping[str, Any]], output: Path) -> None:
    """`output`.md for people and `output`.json with every row."""
    models = merged(models)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".md").write_text(markdown(models))
    output.with_suffix(".json").write_text(json.dumps(models) + "\n")


def merged(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per model; of cells that were measured again the later ones count."""
    found: dict[str, dict[str, Any]] = {}
    for model in models:
        before = found.get(model["model"], {"rows": []})
        rows = {key(row): row for row in (*before["rows"], *model["rows"])}
        found[model["model"]] = {**model, "rows": list(rows.values())}
    return list(found.values())


def key(row: Mapping[str, Any]) -> Key:
    return row["criterion"], row["ratio"], row["allocation"], row["calibration"], row["repair"]


def ratio_to(models: Sequence[Mapping[Key, float]], cell: Key, other: Key) -> tuple[float, float, float] | None:
    """Geometric mean over models of increase / other's increase, with its 95 % interval (Student's t of the
    logarithms).

    Increases below SMALLEST count as that much. None where fewer than FEWEST models have both.
    """
    logs = [
        log(max(model[cell], SMALLEST) / max(model[other], SMALLEST))
        for model in models
        if cell in model and other in model
    ]
    if len(logs) < FEWEST:
        return None
    half = STUDENT_T[len(logs) - 1] * stdev(logs) / len(logs) ** 0.5
    return exp(fmean(logs)), exp(fmean(logs) - half), exp(fmean(logs) + half)


def markdown(models: Sequence[Mapping[str, Any]]) -> str:
    """Ratios to uniform `reap` over all models, then each model's increases, then what one domain's calibration costs
    the others."""
    rows = [{key(row): row for row in model["rows"]} for model in models]
    increases = [{cell: row["increase"] for cell, row in model.items()} for model in rows]
    known = sorted(
        {cell for model in rows for cell in model},
        key=lambda cell: (cell[3], cell[4] or "", cell[2] != "uniform", _order(models, cell[0])),
    )
    ratios = sorted({cell[1] for cell in known})
    names = ", ".join(f"{model['model']} ({fmean(model['base'].values()):.2f})" for model in models)
    parts = [
        f"Models (held-out loss unpruned, nats per token, mean of four sources): {names}.",
        (
            "Loss increase as a multiple of uniform `reap`'s under the same calibration, geometric mean over the models"
            " with the 95 % interval over models (below 1 is better; every model has another seed)."
        ),
    ]
    for calibration in dict.fromkeys(cell[3] for cell in known):
        lines = _head(f"calibrated on {calibration}", ratios)
        for criterion, allocation, how in dict.fromkeys(
            (cell[0], cell[2], cell[4]) for cell in known if cell[3] == calibration
        ):
            cells = []
            for ratio in ratios:
                found = ratio_to(
                    increases,
                    (criterion, ratio, allocation, calibration, how),
                    ("reap", ratio, "uniform", calibration, None),
                )
                cells.append("–" if found is None else f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]")
            have = sum(
                any((criterion, ratio, allocation, calibration, how) in model for ratio in ratios)
                for model in increases
            )
            fewer = f" ({have} of {len(models)} models)" if have < len(models) else ""
            lines.append(f"| {_name(criterion, allocation, how)}{fewer} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    parts += _repairs(increases, known, ratios)
    parts += [_model(model, found, ratios) for model, found in zip(models, rows, strict=True)]
    return "\n\n".join([*parts, _other_domains(rows)]) + "\n"


def _repairs(increases: Sequence[Mapping[Key, float]], known: Sequence[Key], ratios: Sequence[float]) -> list[str]:
    """What the re-fit leaves of the increase of the very same choice without it, over the models that have both."""
    repaired = [cell for cell in known if cell[4] is not None]
    if not repaired:
        return []
    lines = _head("re-fitted, as a multiple of the same choice as it is", ratios)
    for criterion, allocation, calibration, how in dict.fromkeys((cell[0], *cell[2:]) for cell in repaired):
        cells = []
        for ratio in ratios:
            found = ratio_to(
                increases,
                (criterion, ratio, allocation, calibration, how),
                (criterion, ratio, allocation, calibration, None),
            )
            cells.append("–" if found is None else f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]")
        lines.append(f"| {_name(criterion, allocation, how)}, {calibration} | " + " | ".join(cells) + " |")
    return ["\n".join(lines)]


def _model(model: Mapping[str, Any], found: Mapping[Key, Mapping[str, Any]], ratios: Sequence[float]) -> str:
    """Increases with intervals; ▼ and ▲ beside those that differ from `reap` of the same allocation beyond the
    noise."""
    marks = {"lower": " ▼", "higher": " ▲", "": ""}
    lines = _head(f"{model['model']}, calibrated on all sources, increase in nats per token", ratios)
    for criterion, allocation, how in dict.fromkeys(
        (cell[0], cell[2], cell[4]) for cell in found if cell[3] == "all sources"
    ):
        row = [found.get((criterion, ratio, allocation, "all sources", how)) for ratio in ratios]
        cells = [
            (
                "–"
                if one is None
                else (
                    f"{one['increase']:.3f} [{one['interval'][0]:.3f},"
                    f" {one['interval'][1]:.3f}]{marks[one['against_reap']]}"
                )
            )
            for one in row
        ]
        lines.append(f"| {_name(criterion, allocation, how)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _other_domains(rows: Sequence[Mapping[Key, Mapping[str, Any]]]) -> str:
    """Calibrated on code alone, 50 % removed, uniform: the increase on code and on the rest, mean over the models that
    have every row."""
    cells = list(dict.fromkeys(cell for model in rows for cell in model if cell[1:4] == (0.5, "uniform", "code alone")))
    whole = [model for model in rows if all(cell in model for cell in cells)]
    lines = [
        (
            f"| calibrated on code alone, 50 % removed, uniform, mean of {len(whole)} models | code | tools | prose |"
            " math |"
        ),
        "|---|---|---|---|---|",
    ]
    for cell in cells if whole else ():
        means = [
            fmean(model[cell]["by_source"][source] for model in whole) for source in ("code", "tools", "prose", "math")
        ]
        lines.append(
            f"| {_name(cell[0], 'uniform', cell[4])} | " + " | ".join(f"{value:.3f}" for value in means) + " |"
        )
    return "\n".join(lines)


def _head(title: str, ratios: Sequence[float]) -> list[str]:
    return [
        f"| {title} | " + " | ".join(f"{ratio:.1%} removed" for ratio in ratios) + " |",
        "|---" * (len(ratios) + 1) + "|",
    ]


def _order(models: Sequence[Mapping[str, Any]], criterion: str) -> int:
    names = list(dict.fromkeys(row["criterion"] for model in models for row in model["rows"]))
    return names.index(criterion)


def _name(criterion: str, allocation: str, how: str | None) -> str:
    return criterion + (f" + {how}" if how else "") + (", global" if allocation == "global" else "")
