"""Compares selections: what each keeps that the other drops. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reapkit.core.errors import RecipeError
from reapkit.core.formatting import exact_percent, human_experts, plural
from reapkit.report.blocks import Chart, Folded, Note, Page, PageSection, PageTable, Tiles
from reapkit.report.charts import axis, line
from reapkit.report.comparison.overlap import (
    agreement,
    layers_table,
    overlap,
    overlap_chart,
    overlap_numbers,
    pairs,
    pairs_table,
    same_layers,
)
from reapkit.report.comparison.terms import ComparisonTerms
from reapkit.report.inspection.recognise import Found
from reapkit.report.inspection.render import Block, lines, table
from reapkit.selection.selection import Selection

HOW = ("ratio", "allocation", "formula", "mix", "prior_count", "seed")
SHOWN = 16  # experts named in a cell of the terminal


def facts(found: Mapping[str, Found], terms: ComparisonTerms) -> dict[str, Any]:
    """Per pair the overlap, and in every layer `only`: the experts that only the one, and only the other, keeps."""
    selections = {letter: _load(each) for letter, each in found.items()}
    return compare_selections(selections)


def compare_selections(selections: Mapping[str, Selection]) -> dict[str, Any]:
    """The same for selections that are loaded. Raises UnusableError where they are not of one shape."""
    same_layers(
        {
            letter: {layer: len(one.keep) + len(one.drop) for layer, one in selection.layers.items()}
            for letter, selection in selections.items()
        },
        "selection",
    )
    experts = {len(one.keep) + len(one.drop) for one in next(iter(selections.values())).layers.values()}
    compared = {}
    for a, b in pairs(selections):
        pair = overlap(selections[a].keep, selections[b].keep, max(experts))
        for layer, one in pair["layers"].items():
            left, right = (set(selections[letter].layers[int(layer)].keep) for letter in (a, b))
            one["only"] = [sorted(left - right), sorted(right - left)]
        compared[f"{a}-{b}"] = pair
    return {
        "selections": {letter: _one(selection) for letter, selection in selections.items()},
        "pairs": compared,
        "answer": _answer(compared),
    }


def _load(found: Found) -> Selection:
    """Raises RecipeError where a stage left several and chose none."""
    if found.place.is_dir() and not (found.place / "selection.json").is_file():
        names = sorted(path.name for path in (found.place / "candidates").iterdir() if path.is_dir())
        raise RecipeError(
            f"compare: {found.place} holds {len(names)} selections. Give one of them, such as"
            f" {found.place / 'candidates' / names[0]}."
        )
    return Selection.load(found.place)


def _one(selection: Selection) -> dict[str, Any]:
    kept = {str(layer): len(one.keep) for layer, one in selection.layers.items()}
    experts = sum(len(one.keep) + len(one.drop) for one in selection.layers.values())
    return {
        "criterion": selection.criterion,
        "experts_per_token": selection.experts_per_token,
        "experts": experts,
        "kept": sum(kept.values()),
        "kept_by_layer": kept,
        **{name: selection.details.get(name) for name in HOW},
    }


def _answer(compared: Mapping[str, Any]) -> str:
    name, pair = min(compared.items(), key=lambda item: item[1]["share"]["mean"])
    if pair["share"]["min"] == 1:
        return "The selections keep the same experts."
    moved = sum(max(map(len, one["only"])) for one in pair["layers"].values())
    where = f"Least alike are {name}: " if len(compared) > 1 else ""
    return f"{where}{agreement(pair)}; {plural(moved, 'expert differs', 'experts differ')}."


def how(found: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """In what the selections were asked for differently: (setting, what each said)."""
    made = found["selections"].values()
    names = ("criterion", "experts_per_token", *HOW)
    return [
        (name.replace("_", " "), said)
        for name in names
        if len(set(said := ["-" if one[name] is None else str(one[name]) for one in made])) > 1
    ]


def blocks(found: Mapping[str, Any]) -> list[Block]:
    """The answer, what was asked for, every pair, the layers; of one pair, the experts that differ."""
    made = found["selections"]
    rows = [(letter, one["criterion"], one["ratio"], one["kept"], one["experts"]) for letter, one in made.items()]
    asked = [
        f"{name}: {', '.join(f'{letter} {value}' for letter, value in zip(made, said, strict=True))}"
        for name, said in how(found)
    ]
    shown: list[Block] = [
        lines(found["answer"], ""),
        table("Selections", ("", "criterion", "ratio", "kept", "of"), rows, left=("criterion",)),
        *([lines("requested differently", *(f"  {text}" for text in asked), "")] if asked else []),
        pairs_table(found["pairs"], ranked=False),
        layers_table(found["pairs"], ranked=False),
    ]
    if len(found["pairs"]) == 1:
        ((name, pair),) = found["pairs"].items()
        differing = [
            (layer, *(_few(experts) for experts in one["only"]))
            for layer, one in pair["layers"].items()
            if any(one["only"])
        ]
        a, b = name.split("-")
        shown += (
            [
                table(
                    "Experts that differ",
                    ("layer", f"only {a} keeps", f"only {b} keeps"),
                    differing,
                    left=(f"only {a} keeps", f"only {b} keeps"),
                )
            ]
            if differing
            else []
        )
    return shown


def _few(experts: list[int]) -> str:
    return (
        " ".join(map(str, experts[:SHOWN])) + (f" and {len(experts) - SHOWN} more" if len(experts) > SHOWN else "")
        or "-"
    )


def page(found: Mapping[str, Any], places: Mapping[str, str]) -> Page:
    """The same to look at."""
    worst = min(found["pairs"].values(), key=lambda pair: pair["share"]["mean"])
    tiles = Tiles(
        [
            ("same kept experts", exact_percent(worst["share"]["mean"]), "mean over the layers"),
            ("in the least alike layer", exact_percent(worst["share"]["min"]), f"layer {worst['share']['layer']}"),
            ("random sets", exact_percent(worst["chance"], 0), "what chance gives"),
        ]
    )
    rows = [
        (letter, places[letter], one["criterion"], one["ratio"] or "–", f"{one['kept']:,} of {one['experts']:,}")
        for letter, one in found["selections"].items()
    ]
    columns = [("", "left"), ("selection", "left"), ("criterion", "left"), ("ratio", "right"), ("kept", "right")]
    blocks: list[Any] = [tiles, Note("info", found["answer"]), PageTable(columns, rows)]
    if asked := how(found):
        blocks.append(
            PageTable(
                [("setting", "left"), *((letter, "left") for letter in found["selections"])],
                [(name, *said) for name, said in asked],
                "Requested differently",
            )
        )
    return Page(
        "Which experts differ?",
        "reapkit comparison of selections",
        [PageSection("answer", "The answer", blocks, "", "Answer"), layers_section(found)],
        footer=(
            "Kept sets say which experts differ, not what that costs: measured quality is in the reports of the runs."
        ),
    )


def layers_section(found: Mapping[str, Any]) -> PageSection:
    """Overlap and counts over the layers, and the experts by name."""
    worst = min(found["pairs"].values(), key=lambda pair: pair["share"]["mean"])
    inner: list[Any] = [overlap_chart(found["pairs"], f"{agreement(worst)}.")]
    counts = {letter: one["kept_by_layer"] for letter, one in found["selections"].items()}
    if len({tuple(kept.values()) for kept in counts.values()}) > 1 or any(
        len(set(kept.values())) > 1 for kept in counts.values()
    ):
        inner.append(_counts_chart(counts))
    inner += overlap_numbers(found["pairs"], ranked=False)
    for name, pair in found["pairs"].items():
        a, b = name.split("-")
        rows = [
            (layer, *(" ".join(map(str, experts)) or "–" for experts in one["only"]))
            for layer, one in pair["layers"].items()
            if any(one["only"])
        ]
        if rows:
            inner.append(
                Folded(
                    f"{name}: experts that differ",
                    [PageTable([("layer", "right"), (f"only {a} keeps", "left"), (f"only {b} keeps", "left")], rows)],
                )
            )
    return PageSection("layers", "Which experts, layer by layer", inner, "", "Experts")


def _counts_chart(counts: Mapping[str, Mapping[str, int]]) -> Chart:
    data = [
        line(list(kept), list(kept.values()), letter, f"--c{index % 8 + 1}", "layer %{x}: %{y} kept")
        for index, (letter, kept) in enumerate(counts.items())
    ]
    said = "; ".join(
        f"{letter} keeps {human_experts(kept)} experts per layer, {sum(kept.values()):,} in all"
        for letter, kept in counts.items()
    )
    return Chart(
        "counts",
        "How many are kept",
        f"{said}.",
        data,
        {"xaxis": axis("layer", type="category", nticks=16), "yaxis": axis("experts kept", rangemode="tozero")},
    )
