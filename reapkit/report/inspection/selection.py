"""Inspects a selection: what is kept and dropped in every layer, and why. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from reapkit.core.formatting import counted, narrow_percent
from reapkit.report.inspection.recognise import read_json
from reapkit.report.inspection.render import Block, all_last, lines, notes, table
from reapkit.selection.selection import LayerSelection, Selection

SHOWN_TIES = 12


def facts(place: Path) -> dict[str, Any]:
    """One selection, or where a stage left several without choosing one, each by its name."""
    if place.is_dir() and not (place / "selection.json").is_file():
        index = read_json(place / "index.json", ("candidates", "controls"))
        roles = dict.fromkeys(index["candidates"], "candidate") | dict.fromkeys(index["controls"], "control")
        return {
            "several": {
                name: {"role": role, **_selection(Selection.load(place / "candidates" / name))}
                for name, role in roles.items()
            }
        }
    return _selection(Selection.load(place))


def _selection(selection: Selection) -> dict[str, Any]:
    layers = {str(index): _layer(layer) for index, layer in selection.layers.items()}
    details = selection.details
    return {
        "criterion": selection.criterion,
        "experts_per_token": selection.experts_per_token,
        **{
            name: details.get(name)
            for name in ("candidate", "ratio", "allocation", "formula", "mix", "dropped_saliency", "eaft")
        },
        "experts": sum(layer["kept"] + layer["dropped"] for layer in layers.values()),
        "removed": sum(layer["dropped"] for layer in layers.values()),
        "layers": layers,
        "protected": details.get("protected") or {},
        "never_routed": details.get("never_routed") or {},
        "near_ties": details.get("near_ties") or [],
        "warnings": list(selection.warnings),
    }


def _layer(layer: LayerSelection) -> dict[str, Any]:
    def reasons(experts: Iterable[int]) -> dict[str, int]:
        return dict(Counter(layer.reasons[expert] for expert in experts if expert in layer.reasons).most_common())

    def known(experts: Iterable[int]) -> list[float]:
        return [layer.saliency[expert] for expert in experts if layer.saliency and isfinite(layer.saliency[expert])]

    return {
        "kept": len(layer.keep),
        "dropped": len(layer.drop),
        "kept_reasons": reasons(layer.keep),
        "dropped_reasons": reasons(layer.drop),
        "lowest_kept": min(known(layer.keep), default=None),
        "highest_dropped": max(known(layer.drop), default=None),
    }


def blocks(found: Mapping[str, Any], *, colour: bool) -> list[Block]:
    """Totals, layers with reasons, protection, near-ties and what the conflict term changed."""
    if "several" in found:
        rows = [
            (name, one["role"], one["criterion"], one["removed"], one["experts"], narrow_percent(_cost(one)))
            for name, one in found["several"].items()
        ]
        return [
            table(
                "Selections to be evaluated; inspect candidates/NAME for one of them",
                ("name", "role", "criterion", "removed", "of", "saliency removed"),
                rows,
                left=("role", "criterion"),
            )
        ]
    return [
        _heading(found),
        _layers(found),
        *notes("protected", _protected(found)),
        *notes("never routed", _unrouted(found)),
        *notes("near-ties, which may be decided differently on another device", _ties(found)),
        *_conflict(found),
        *notes("warnings", found["warnings"]),
    ]


def _cost(found: Mapping[str, Any]) -> float | None:
    return (found["dropped_saliency"] or {}).get(found["allocation"])


def _heading(found: Mapping[str, Any]) -> Block:
    how = f"{found['criterion']} ({found['formula']})" if found["formula"] else found["criterion"]
    name = f"{found['candidate']}: " if found["candidate"] else ""
    allocation = f", {found['allocation']} allocation" if found["allocation"] else ""
    cost = f", {narrow_percent(_cost(found))} of the saliency mass" if _cost(found) is not None else ""
    top_k = f"; experts per token: {found['experts_per_token']}" if found["experts_per_token"] else ""
    return lines(
        f"selection {name}{how}{allocation}",
        f"{found['removed']:,} of {found['experts']:,} experts removed{cost}{top_k}",
    )


def _layers(found: Mapping[str, Any]) -> Block:
    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    rows = [
        (
            name,
            layer["kept"],
            counted(layer["kept_reasons"]),
            layer["dropped"],
            counted(layer["dropped_reasons"]),
            cell(layer["lowest_kept"]),
            cell(layer["highest_dropped"]),
        )
        for name, layer in found["layers"].items()
    ]
    return table(
        "Experts kept and dropped; lowest saliency kept, highest dropped",
        ("layer", "kept", "because", "dropped", "because", "lowest", "highest"),
        rows,
        left=("because",),
    )


def _protected(found: Mapping[str, Any]) -> list[str]:
    return [
        f"{reason}, layer {layer}: {' '.join(map(str, experts))}"
        for reason, layers in found["protected"].items()
        for layer, experts in layers.items()
    ]


def _unrouted(found: Mapping[str, Any]) -> list[str]:
    return [f"layer {layer}: {' '.join(map(str, experts))}" for layer, experts in found["never_routed"].items()]


def _ties(found: Mapping[str, Any]) -> list[str]:
    ties = [
        f"layer {tie['layer']}: kept {tie['kept']}, dropped {tie['dropped']}, {tie['relative_gap']:.1e} apart"
        for tie in found["near_ties"]
    ]
    return ties if len(ties) <= SHOWN_TIES else [*ties[: SHOWN_TIES - 1], f"and {len(ties) - SHOWN_TIES + 1:,} more"]


def _conflict(found: Mapping[str, Any]) -> list[Block]:
    eaft = found["eaft"]
    if not eaft:
        return []
    rows = [
        (name, *(narrow_percent(shares[region], 2) for region in ("conflict", "uncertain", "good")))
        for name, shares in all_last(eaft["shares"])
    ]
    where = ", ".join(f"layer {layer}: {count}" for layer, count in eaft["changed_by_conflict_by_layer"].items())
    return [
        table("EAFT regions", ("source", "conflict", "uncertain", "good"), rows),
        lines(
            f"The conflict weight {eaft['weights']['conflict']:g} changed {eaft['changed_by_conflict']:,} kept experts"
            + (f" ({where})" if where else "")
            + ".",
            "",
        ),
    ]
