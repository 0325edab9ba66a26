"""Inspects an observation: what was read, which experts matter, how concentrated they are, and where the model was
wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reapkit.core.formatting import narrow_percent, ranges
from reapkit.observation.materials import EAFT_SIGNALS
from reapkit.observation.observation import Observation, Reroute
from reapkit.recipe.schema import EaftSpec, SaliencySpec
from reapkit.report.export import ranking_by_layer
from reapkit.report.inspection.render import Block, all_last, lines, notes, table
from reapkit.selection.criteria.eaft_reap import SMALL_CONFLICT_SHARE
from reapkit.selection.criteria.reap import REAP
from reapkit.selection.criteria.registry import reading
from reapkit.selection.eaft import REGIONS, region_positions, summarise
from reapkit.selection.saliency import saliency
from reapkit.selection.statistics import balance, concentration, convergence, first_half, first_half_sentence
from reapkit.selection.totals import source_alphas, totals

TOP = 6
REMOVED = (0.25, 0.5, 0.625)  # shares of a layer's experts at which inspect shows a removal path
SHOWN_SIZES = (4, 8, 16)


def facts(directory: Path) -> dict[str, Any]:
    """Tokens per source, experts never routed, experts by saliency, concentration, convergence and EAFT region
    shares."""
    observation = Observation.load(directory)
    summed = totals(observation)
    ranking = ranking_by_layer(observation, saliency(observation, SaliencySpec(criterion=REAP.name)))
    counts = {layer: max(1, observation.num_experts // 2) for layer in observation.layers}
    return {
        "model_type": observation.model_type,
        "layers": list(observation.layers),
        "num_experts": observation.num_experts,
        "num_experts_per_tok": observation.num_experts_per_tok,
        "meta": dict(observation.meta),
        "sources": _sources(observation),
        "never_routed": _never(observation, summed.count),
        "ranking": {str(layer): ranking[f"layer_{layer}"] for layer in observation.layers},
        "concentration": {str(size): shares for size, shares in concentration(summed.gate_norm_sum).items()},
        "balance_cv": balance(summed.count),
        "convergence": [
            {name: step[name] for name in ("rows", "overlap", "chance", "rank_correlation")}
            for step in (convergence(observation, counts) if observation.snapshots else ())
        ],
        "first_half": first_half(observation, counts),
        "eaft": None if observation.eaft is None else _eaft(observation),
        "reroute": None if observation.reroute is None else _reroute(observation, observation.reroute),
    }


def _sources(observation: Observation) -> list[dict[str, Any]]:
    unseen = (observation.statistics["count"] == 0).sum((0, 2)).tolist()
    rows = zip(
        observation.sources, observation.tokens.tolist(), observation.scored_tokens.tolist(), unseen, strict=True
    )
    return [
        {"name": name, "tokens": tokens, "scored_tokens": scored, "never_routed": never}
        for name, tokens, scored, never in rows
    ]


def _never(observation: Observation, count: np.ndarray) -> dict[str, list[int]]:
    by_layer = zip(observation.layers, (count == 0), strict=True)
    return {str(layer): np.flatnonzero(mask).tolist() for layer, mask in by_layer if mask.any()}


def _eaft(observation: Observation) -> dict[str, Any]:
    """Region borders and shares under the default quantiles."""
    alphas = source_alphas(observation, None)
    return summarise(region_positions(observation, EaftSpec(), alphas), observation.sources, alphas)


def _reroute(observation: Observation, found: Reroute) -> dict[str, Any]:
    """The sample, and by layer the error of the mix's path where it has removed each of REMOVED (None beyond its
    end)."""
    steps = {share: int(observation.num_experts * share) for share in REMOVED}
    errors, ends = found.error[:, -1], (found.order[:, -1] >= 0).sum(-1).tolist()
    return {
        "tokens": dict(zip(observation.sources, found.tokens.tolist(), strict=True)),
        "removed": list(REMOVED),
        "error": {
            str(layer): [float(row[step - 1]) if 0 < step <= end else None for step in steps.values()]
            for layer, row, end in zip(observation.layers, errors, ends, strict=True)
        },
        "first": {
            str(layer): row[row >= 0][:TOP].tolist()
            for layer, row in zip(observation.layers, found.order[:, -1], strict=True)
        },
    }


def blocks(found: Mapping[str, Any], *, colour: bool) -> list[Block]:
    """Per source, per layer, how settled it is, and EAFT regions."""
    return [
        _heading(found),
        _sources_table(found),
        _layers_table(found),
        *notes("experts that received no scored token", _unrouted(found)),
        *_settled(found),
        *_regions(found),
        *_paths(found),
    ]


def _heading(found: Mapping[str, Any]) -> Block:
    meta = found["meta"]
    how = ", ".join(str(meta[name]) for name in ("device", "dtype", "placement", "kernels") if meta.get(name))
    whose = f"; model {str(meta['model'])[:12]}" if meta.get("model") else ""
    return lines(
        f"observation of {found['model_type']}: {len(found['layers'])} MoE layers ({ranges(found['layers'])}), "
        f"top-{found['num_experts_per_tok']} of {found['num_experts']} experts",
        *([how + whose] if how + whose else []),
        *([f"multi-token prediction: layer {ranges(meta['mtp'])}, behind the decoder's"] if meta.get("mtp") else []),
    )


def _sources_table(found: Mapping[str, Any]) -> Block:
    scored = sum(source["scored_tokens"] for source in found["sources"])
    rows = [
        (
            source["name"],
            source["tokens"],
            source["scored_tokens"],
            narrow_percent(source["scored_tokens"] / scored if scored else None),
            source["never_routed"],
        )
        for source in found["sources"]
    ]
    total = (
        "all",
        sum(source["tokens"] for source in found["sources"]),
        scored,
        narrow_percent(1.0 if scored else None),
        sum(map(len, found["never_routed"].values())),
    )
    return table(
        "Tokens, and experts of all layers never routed to",
        ("source", "tokens", "scored", "of scored", "never routed"),
        [*rows, total],
    )


def _layers_table(found: Mapping[str, Any]) -> Block:
    most_salient = f"most salient ({REAP.name})"
    sizes = [str(size) for size in SHOWN_SIZES if str(size) in found["concentration"]]
    rows = [
        (
            layer,
            *(narrow_percent(found["concentration"][size][row]) for size in sizes),
            "-" if (spread := found["balance_cv"][row]) is None else f"{spread:.2f}",
            " ".join(map(str, found["ranking"][str(layer)][:TOP])),
        )
        for row, layer in enumerate(found["layers"])
    ]
    return table(
        "Share of Σgn in the top experts, std/mean of use, ranking",
        ("layer", *(f"top {size}" for size in sizes), "spread", most_salient),
        rows,
        left=(most_salient,),
    )


def _unrouted(found: Mapping[str, Any]) -> list[str]:
    return [f"layer {layer}: {' '.join(map(str, experts))}" for layer, experts in found["never_routed"].items()]


def _settled(found: Mapping[str, Any]) -> Sequence[Block]:
    steps = [
        f"after {step['rows']} of the rows: {narrow_percent(step['overlap'])} of the kept experts, rank correlation "
        f"{'-' if step['rank_correlation'] is None else format(step['rank_correlation'], '.3f')}"
        for step in found["convergence"]
    ]
    chance = narrow_percent(found["convergence"][0]["chance"]) if found["convergence"] else "-"
    half = found["first_half"]
    if half is not None:
        steps.append(first_half_sentence(half))
    return notes(f"stability of {REAP.name}'s kept half, against all rows (chance {chance})", steps)


def _regions(found: Mapping[str, Any]) -> list[Block]:
    eaft = found["eaft"]
    if eaft is None:
        readers = reading(EAFT_SIGNALS)
        need = "needs" if len(readers) == 1 else "need"
        return [lines(f"no EAFT trace: {' and '.join(readers)} {need} observe.eaft: true")]
    rows = [
        (name, *(narrow_percent(shares[region], 2) for region in REGIONS[:3]))
        for name, shares in all_last(eaft["shares"])
    ]
    conflict = eaft["shares"]["all"]["conflict"]
    little = (
        [
            lines(
                f"With {narrow_percent(conflict, 2)} of the positions in conflict, their weight hardly changes the"
                " decision."
            )
        ]
        if conflict < SMALL_CONFLICT_SHARE
        else []
    )
    return [
        table("EAFT regions (default quantiles)", ("source", *REGIONS[:3]), rows),
        *little,
        *_in_cells(eaft["realised"]),
    ]


def _in_cells(realised: Mapping[str, Mapping[str, float]] | None) -> list[Block]:
    """That a table stands in for the exact trace, and where it can cut."""
    if not realised:
        return []
    cuts = "; ".join(", ".join(f"{name} {level:.3g}" for name, level in levels.items()) for levels in realised.values())
    return [
        lines(
            "Summed in 32 x 16 cells of (p, H), since the exact trace exceeds observe.trace_bytes. Quantiles used:"
            f" {cuts}."
        )
    ]


def _paths(found: Mapping[str, Any]) -> list[Block]:
    reroute = found["reroute"]
    if reroute is None:
        return []
    sample = ", ".join(f"{count:,} of {name}" for name, count in reroute["tokens"].items())
    rows = [
        (
            layer,
            *("-" if error is None else narrow_percent(error, 2) for error in reroute["error"][str(layer)]),
            " ".join(map(str, reroute["first"][str(layer)])),
        )
        for layer in found["layers"]
    ]
    return [
        table(
            "Removal paths: change of the residual stream once tokens are re-routed (squared, relative; sample:"
            f" {sample})",
            ("layer", *(f"{narrow_percent(share, 1)} gone" for share in reroute["removed"]), "first removed"),
            rows,
            left=("first removed",),
        )
    ]
