"""Compares observations: would they keep the same experts, and is a calibration of this size enough?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from reapkit.core.errors import RecipeError, UnusableError
from reapkit.core.formatting import exact_percent, narrow_percent
from reapkit.observation.observation import Observation
from reapkit.recipe.schema import SaliencySpec
from reapkit.report.blocks import Note, Page, PageSection, PageTable, Tiles
from reapkit.report.comparison.overlap import (
    SETTLED,
    UNSETTLED,
    agreement,
    layers_table,
    overlap,
    overlap_chart,
    overlap_numbers,
    pairs,
    pairs_table,
    rank_chart,
    same_layers,
    summary,
)
from reapkit.report.comparison.terms import ComparisonTerms
from reapkit.report.inspection.recognise import Found
from reapkit.report.inspection.render import Block, lines, table
from reapkit.selection.criteria.reap import REAP
from reapkit.selection.criteria.registry import criterion_problem
from reapkit.selection.saliency import saliency
from reapkit.selection.statistics import first_half, rank_correlation, removal_order

SAME = (
    "The observations have identical sums, so comparing them says nothing. Give an observation of other rows,"
    " or of fewer rows."
)


def facts(found: Mapping[str, Found], terms: ComparisonTerms) -> dict[str, Any]:
    """Every pair's kept sets and rank correlations; of each observation its tokens and what its first half would have
    kept.

    The kept set is the criterion's alone, without protection, caps or groups. Raises UnusableError for other models
    (unless the terms allow them) and other shapes.
    """
    spec, removed = _spec(terms), terms.ratio
    observed = {letter: Observation.load(each.place) for letter, each in found.items()}
    same_layers({letter: dict.fromkeys(one.layers, one.num_experts) for letter, one in observed.items()}, "observation")
    different = _different_models(observed, found, terms)
    experts = next(iter(observed.values())).num_experts
    dropped = int(experts * removed)
    if not 0 < dropped < experts:
        raise RecipeError(
            f"--ratio: {removed} removes {dropped} of {experts} experts per layer. Choose a ratio that removes 1 to"
            f" {experts - 1}."
        )
    values = {letter: saliency(one, spec) for letter, one in observed.items()}
    kept = {
        letter: {
            layer: row[dropped:]
            for layer, row in zip(observed[letter].layers, removal_order(one).tolist(), strict=True)
        }
        for letter, one in values.items()
    }
    compared = {}
    for a, b in pairs(observed):
        pair = overlap(kept[a], kept[b], experts)
        for layer, correlation in zip(pair["layers"].values(), rank_correlation(values[a], values[b]), strict=True):
            layer["rank_correlation"] = correlation
        ranks = summary({layer: one["rank_correlation"] for layer, one in pair["layers"].items()})
        compared[f"{a}-{b}"] = {**pair, "rank_correlation": ranks}
    made = {letter: _one(one, experts - dropped) for letter, one in observed.items()}
    same = all(_same_sums(one, next(iter(observed.values()))) for one in observed.values())
    return {
        "criterion": terms.criterion,
        "ratio": str(removed),
        "kept": experts - dropped,
        "experts": experts,
        "different_models": different,
        "observations": made,
        "pairs": compared,
        "answer": SAME if same else _answer(made, compared, different),
    }


def _spec(terms: ComparisonTerms) -> SaliencySpec:
    if problem := criterion_problem(terms.criterion, "--criterion"):
        raise RecipeError([problem])
    try:
        return SaliencySpec.model_validate({"criterion": terms.criterion}, strict=False)
    except ValidationError as error:
        raise RecipeError(f"--criterion: {error.errors()[0]['msg']}") from None


def _different_models(observed: Mapping[str, Observation], found: Mapping[str, Found], terms: ComparisonTerms) -> bool:
    names = {
        letter: (one.meta.get("model"), one.model_type, one.num_experts_per_tok) for letter, one in observed.items()
    }
    if len(set(names.values())) == 1:
        return False
    if not terms.different_models:
        (first, a), *others = names.items()
        other, b = next((letter, name) for letter, name in others if name != a)
        raise UnusableError(
            f"compare: {found[first].place} is of model {_model(a)}, {found[other].place} of {_model(b)}. Experts of"
            " different models need not correspond. To compare anyway, add --different-models."
        )
    return True


def _model(name: tuple[Any, ...]) -> str:
    return f"{name[1]} {str(name[0] or 'of unknown identity')[:12]}"


def _same_sums(one: Observation, other: Observation) -> bool:
    return one.sources == other.sources and all(
        np.array_equal(one.statistics[name], other.statistics[name])
        for name in one.statistics
        if name in other.statistics
    )


def _one(observation: Observation, kept: int) -> dict[str, Any]:
    half = first_half(observation, dict.fromkeys(observation.layers, kept))
    return {
        "tokens": int(observation.tokens.sum()),
        "scored_tokens": int(observation.scored_tokens.sum()),
        "sources": dict(zip(observation.sources, observation.scored_tokens.tolist(), strict=True)),
        "model": observation.meta.get("model"),
        "first_half": half,
    }


def _answer(made: Mapping[str, Any], compared: Mapping[str, Any], different: bool) -> str:
    """Is my calibration large enough?"""
    name, pair = min(compared.items(), key=lambda item: item[1]["share"]["mean"])
    said = agreement(pair) if len(compared) == 1 else f"In the least alike pair, {name}, {agreement(pair)}"
    share = pair["share"]["mean"]
    if different:
        return f"{said}. The models differ, so this says nothing about the size of a calibration."
    sources = {frozenset(one["sources"]) for one in made.values()}
    if len(sources) > 1:
        return (
            f"{said}. The sources differ, so differences come from the choice of data as well as from its amount. To"
            " judge the size alone, compare observations of the same sources."
        )
    if share >= SETTLED:
        return (
            f"{said}: a calibration of this size is large enough; other rows of these sources would give almost the"
            " same decision."
        )
    if share >= UNSETTLED:
        return f"{said}: a calibration of this size is nearly large enough; more rows would still change some experts."
    return (
        f"{said}: a calibration of this size is not large enough; the decision depends on which rows were read."
        " Raise calibration.samples."
    )


def blocks(found: Mapping[str, Any]) -> list[Block]:
    """The answer, the observations, every pair, the layers."""
    names = sorted({name for one in found["observations"].values() for name in one["sources"]})
    few = names if len(names) <= 4 else []
    rows = [
        (
            letter,
            one["scored_tokens"],
            *(one["sources"].get(name, 0) for name in few),
            narrow_percent((one["first_half"] or {}).get("overlap")),
        )
        for letter, one in found["observations"].items()
    ]
    return [
        lines(found["answer"], ""),
        table(
            f"Scored tokens; {REAP.name}'s kept set after half of the rows", ("", "scored", *few, "1/2 vs all"), rows
        ),
        pairs_table(found["pairs"], ranked=True),
        layers_table(found["pairs"], ranked=True),
        lines(
            f"Kept: {found['criterion']}'s {found['kept']} of {found['experts']} experts per layer (ratio"
            f" {found['ratio']}), without protection or caps."
        ),
    ]


def page(found: Mapping[str, Any], places: Mapping[str, str]) -> Page:
    """The same to look at."""
    worst = min(found["pairs"].values(), key=lambda pair: pair["share"]["mean"])
    tone = "info" if found["different_models"] else "good" if worst["share"]["mean"] >= SETTLED else "warn"
    tiles = Tiles(
        [
            ("same kept experts", exact_percent(worst["share"]["mean"]), "mean over the layers"),
            ("in the least alike layer", exact_percent(worst["share"]["min"]), f"layer {worst['share']['layer']}"),
            ("random sets", exact_percent(worst["chance"], 0), "what chance gives"),
            ("kept", f"{found['kept']} of {found['experts']}", f"by {found['criterion']}"),
        ]
    )
    rows = [
        (
            letter,
            places[letter],
            f"{one['tokens']:,}",
            f"{one['scored_tokens']:,}",
            ", ".join(one["sources"]),
            "–" if not one["first_half"] else exact_percent(one["first_half"]["overlap"]),
        )
        for letter, one in found["observations"].items()
    ]
    columns = [
        ("", "left"),
        ("observation", "left"),
        ("tokens", "right"),
        ("scored", "right"),
        ("sources", "left"),
        ("first half against all", "right"),
    ]
    note = f"First half against all: how much of {REAP.name}'s kept set was there after half of the rows."
    return Page(
        "Would they keep the same experts?",
        "reapkit comparison of observations",
        [
            PageSection(
                "answer",
                "The answer",
                [tiles, Note(tone, found["answer"]), PageTable(columns, rows, note=note)],
                "",
                "Answer",
            ),
            PageSection(
                "layers",
                "Layer by layer",
                [
                    overlap_chart(found["pairs"], f"{agreement(worst)}."),
                    rank_chart(found["pairs"]),
                    *overlap_numbers(found["pairs"], ranked=True),
                ],
                "",
                "Layers",
            ),
        ],
        f"The {found['kept']} most salient of {found['experts']} experts per layer by {found['criterion']}, without"
        " protection or caps.",
        footer=(
            "Kept sets say which experts differ, not what that costs: measured quality is in the reports of the runs."
        ),
    )
