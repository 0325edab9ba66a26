"""Compares runs: sizes, quality with intervals, verdicts, and the fields in which their recipes differ. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from reapkit.core.errors import UnusableError
from reapkit.core.formatting import human_bytes
from reapkit.evaluation.gates import UNION
from reapkit.evaluation.metrics.metric import Metric
from reapkit.evaluation.metrics.table import METRICS, in_view
from reapkit.evaluation.outcome import outcome
from reapkit.planning.recipe_differences import differing_fields
from reapkit.report.blocks import Chart, Folded, Grid, Note, Page, PageSection, PageTable
from reapkit.report.charts import axis, names_axis, whiskers
from reapkit.report.comparison.overlap import agreement
from reapkit.report.comparison.recipes import said
from reapkit.report.comparison.selections import compare_selections, layers_section
from reapkit.report.comparison.terms import ComparisonTerms
from reapkit.report.inspection.recognise import Found, read_json
from reapkit.report.inspection.render import Block, lines, table
from reapkit.report.measures import TONES, axis_form, badge, with_interval
from reapkit.selection.selection import Selection

KINDS = {
    "mask": "a mask on its base before any quantization",
    "pruned": "the pruned directory",
    "quantized": "the quantized directory",
}
WHERE_IT_RAN = ("runtime", "output", "name", "description")


def facts(found: Mapping[str, Found], terms: ComparisonTerms) -> dict[str, Any]:
    """Per run its verdict, sizes and final quality; the fields that differ; the kept sets, where the runs decided on
    one model's experts."""
    runs = {letter: _one(each.place) for letter, each in found.items()}
    recipes = [_recipe(each.place) for each in found.values()]
    fields = (
        []
        if any(recipe is None for recipe in recipes)
        else [
            {"path": path, "values": dict(zip(runs, values, strict=True))} for path, values in differing_fields(recipes)
        ]
    )
    models = {run["identity"] for run in runs.values()}
    rows = {run["packs"] for run in runs.values()}
    selections = {
        letter: selection
        for letter, each in found.items()
        if (selection := _selection(each.place, runs[letter]["candidate"])) is not None
    }
    decided = None
    if len(models) == 1 and len(selections) == len(runs):
        try:
            decided = compare_selections(selections)
        except UnusableError:  # other layers, such as an MTP block: sizes and quality still compare
            decided = None
    comparable = len(models) == 1 and len(rows) == 1 and len({run["length"] for run in runs.values()}) == 1
    return {
        "runs": runs,
        "fields": fields,
        "comparable": comparable,
        "same_model": len(models) == 1,
        "selections": decided,
        "answer": _answer(runs, comparable, len(models) == 1),
    }


def _one(directory: Path) -> dict[str, Any]:
    run = read_json(directory / "run.json", ("name", "model", "stages"))
    stages = run["stages"]

    def summary(stage: str) -> dict[str, Any]:
        return stages.get(stage, {}).get("summary", {})

    verified = (
        read_json(directory / "verify.json") if (directory / "verify.json").is_file() and "verify" in stages else {}
    )
    evaluated = directory / "evaluation" / "evaluation.json"
    evaluation = read_json(evaluated) if evaluated.is_file() else {}
    measured, length, groups = _quality(verified, evaluation)
    lock = directory / "lock.json"
    identity = (read_json(lock).get("model") or {}).get("identity") if lock.is_file() else None
    return {
        "name": run["name"],
        "model": run["model"],
        "identity": identity or run["model"],
        **_ending(evaluation, verified),
        "candidate": summary("prune").get("candidate") or evaluation.get("chosen"),
        "packs": (stages.get("packs") or {}).get("key"),
        "sizes": [
            {name: row.get(name) for name in ("name", "experts", "bytes", "parameters", "perplexity")}
            for row in verified.get("rows", ())
        ],
        "measured": measured,
        "length": length,
        "quality": groups,
        "seconds": sum(stage["seconds"] for stage in stages.values() if stage.get("executed")),
    }


def _ending(evaluation: Mapping[str, Any], verified: Mapping[str, Any]) -> dict[str, str]:
    """The verdict in words, its tone, and what was judged by which gates."""
    found = outcome(evaluation or None, verified or None)
    return {"verdict": found.word, "tone": found.tone, "judged": found.sentence}


def _quality(
    verified: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> tuple[str | None, str | None, dict[str, Any]]:
    """(what was measured, length of the rows, group -> metric -> value and interval): of the final directory, else of
    the chosen mask."""
    written = [name for name in verified.get("metrics") or {} if name != "base"]
    if written:
        by_length, what = verified["metrics"][written[-1]], written[-1]
    else:
        chosen = next(
            (each for each in evaluation.get("candidates", ()) if each["name"] == evaluation.get("chosen")), {}
        )
        by_length, what = (evaluation.get("confirm") or chosen).get("metrics") or {}, "mask"
    if not by_length:
        return None, None, {}
    length = max(by_length, key=int)
    return (
        what,
        length,
        {
            group: {
                metric: {"value": found[metric]["value"], "interval": found[metric].get("interval")}
                for metric in dict.fromkeys(metric.name for metric in (*in_view("final"), *in_view("distances")))
                if metric in found
            }
            for group, found in by_length[length].items()
        },
    )


def _recipe(directory: Path) -> dict[str, Any] | None:
    file = directory / "recipe.resolved.yaml"
    if not file.is_file():
        return None
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {name: value for name, value in recipe.items() if name not in WHERE_IT_RAN}


def _selection(directory: Path, candidate: str | None) -> Selection | None:
    places = [directory / "selection" / "candidates" / candidate] if candidate else []
    place = next((place for place in (*places, directory / "selection") if (place / "selection.json").is_file()), None)
    return None if place is None else Selection.load(place)


def _answer(runs: Mapping[str, Any], comparable: bool, same_model: bool) -> str:
    kl = {
        letter: run["quality"][UNION]["kl_mean"]
        for letter, run in runs.items()
        if "kl_mean" in run["quality"].get(UNION, {})
    }
    if len(kl) < 2:
        return "Fewer than two runs measured a result, so they cannot be ranked yet. Finish the other runs."
    if not same_model:
        return (
            "The runs start from different models. Their numbers are relative to different bases, so they"
            " cannot be ranked."
        )
    best, *others = sorted(kl, key=lambda letter: kl[letter]["value"])
    second = others[0]
    told = (
        f"{best} is closest to the base: mean KL {with_interval('kl_mean', kl[best])}, next {second} with"
        f" {with_interval('kl_mean', kl[second])}"
    )
    kinds = {letter: runs[letter]["measured"] for letter in (best, second)}
    if len({kind == "mask" for kind in kinds.values()}) > 1:
        return f"{told}; but {best} was measured as {KINDS[kinds[best]]}, {second} as {KINDS[kinds[second]]}."
    if not comparable:
        return f"{told}; but they were measured on different held-out rows, so small differences mean nothing."
    if kl[best]["interval"] and kl[second]["interval"] and kl[best]["interval"][1] < kl[second]["interval"][0]:
        return f"{told}; the intervals do not touch."
    return f"{told}; the intervals touch, so this may be noise."


def blocks(found: Mapping[str, Any]) -> list[Block]:
    """The answer, sizes, quality over the mix, source by source, recipe differences, kept sets."""
    runs = found["runs"]
    sizes = [
        (
            f"{letter} {row['name']}",
            row["experts"],
            human_bytes(row["bytes"]),
            f"{row['perplexity']:.3f}",
            run["verdict"] if last else "",
        )
        for letter, run in runs.items()
        for last, row in _with_last(run["sizes"])
    ]
    unmeasured = [
        f"{letter}: not measured to its end ({run['verdict']})" for letter, run in runs.items() if not run["sizes"]
    ]
    shown: list[Block] = [
        lines(found["answer"], ""),
        table("Sizes and verdicts", ("", "experts", "size", "perplexity", "verdict"), sizes, left=("verdict",)),
        *([lines(*unmeasured, "")] if unmeasured else []),
    ]
    measured = {letter: run for letter, run in runs.items() if run["quality"]}
    rows = [
        (
            f"{letter} {run['measured']}",
            *(_brief(metric, run["quality"].get(UNION, {}).get(metric.name)) for metric in in_view("distances")),
        )
        for letter, run in measured.items()
    ]
    if rows:
        shown.append(
            table(
                "Against the base, over the mix (95% intervals)",
                ("", *(metric.label for metric in in_view("distances"))),
                rows,
            )
        )
        shown.append(_sources(measured))
    if found["fields"]:
        differing = [(each["path"], *(said(value) for value in each["values"].values())) for each in found["fields"]]
        shown.append(table("Recipe fields that differ", ("field", *runs), differing, left=tuple(runs)))
    else:
        shown.append(lines("The recipes have no differences.", ""))
    if found["selections"]:
        shown.append(lines(*(f"{name}: {agreement(pair)}" for name, pair in found["selections"]["pairs"].items())))
    return shown


def _with_last(rows: list[Any]) -> list[tuple[bool, Any]]:
    return [(index == len(rows) - 1, row) for index, row in enumerate(rows)]


def _brief(metric: Metric, measured: Mapping[str, Any] | None, *, interval: bool = True) -> str:
    """`0.341 [0.32, 0.36]`, shares in percent."""
    if measured is None:
        return "-"
    scale, digits, unit = (100, 1, "%") if metric.is_share else (1, 3, "")
    ends = measured["interval"] if interval else None
    return f"{scale * measured['value']:.{digits}f}{unit}" + (
        f" [{scale * ends[0]:.{digits}f}, {scale * ends[1]:.{digits}f}]" if ends else ""
    )


def _sources(measured: Mapping[str, Any]) -> Block:
    groups = list(dict.fromkeys(group for run in measured.values() for group in run["quality"] if group != UNION))
    rows = [
        (
            group,
            *(
                _brief(METRICS["kl_mean"], run["quality"].get(group, {}).get("kl_mean"), interval=len(measured) <= 3)
                for run in measured.values()
            ),
        )
        for group in groups
    ]
    return table("Mean KL, source by source", ("source", *measured), rows)


# ---------------------------------------------------------------------------------------------- the page


def page(found: Mapping[str, Any], places: Mapping[str, str]) -> Page:
    """The same to look at."""
    runs, right = found["runs"], "right"
    measured = {letter: run for letter, run in runs.items() if run["quality"]}
    columns = [
        ("", "left"),
        ("run", "left"),
        ("result", "left"),
        ("experts", right),
        ("size", right),
        ("perplexity", right),
        ("verdict", "left"),
    ]
    rows = [
        (
            letter,
            places[letter],
            row["name"],
            row["experts"],
            human_bytes(row["bytes"]),
            f"{row['perplexity']:.3f}",
            badge(run["verdict"], run["tone"]) if last else "",
        )
        for letter, run in runs.items()
        for last, row in _with_last(run["sizes"])
    ]
    rows += [
        (letter, places[letter], "not measured to its end", "–", "–", "–", badge(run["verdict"], run["tone"]))
        for letter, run in runs.items()
        if not run["sizes"]
    ]
    sections = [
        PageSection(
            "answer",
            "The answer",
            [Note("info" if found["comparable"] else "warn", found["answer"]), PageTable(columns, rows)],
            "",
            "Answer",
        )
    ]
    if measured:
        sections.append(_quality_section(measured))
    if found["selections"]:
        sections.append(layers_section(found["selections"]))
    fields = [(each["path"], *(said(value) for value in each["values"].values())) for each in found["fields"]]
    inner = (
        [PageTable([("field", "left"), *((letter, "left") for letter in runs)], fields)]
        if fields
        else [Note("info", "The recipes have no differences.")]
    )
    sections.append(
        PageSection("recipes", "How the recipes differ", inner, "Names, output and runtime are left out.", "Recipes")
    )
    worst = next((run["verdict"] for run in runs.values() if run["verdict"] == "reject"), None)
    return Page(
        "Which run is better?",
        "reapkit comparison of runs",
        sections,
        ", ".join(f"{letter}: {run['name']}" for letter, run in runs.items()),
        badge=(TONES["reject"], "One was rejected by its gates") if worst else None,
        footer="Whiskers and brackets are 95 % bootstrap intervals over held-out rows.",
    )


def _quality_section(measured: Mapping[str, Any]) -> PageSection:
    charts = [_chart(measured, metric) for metric in in_view("distances")]
    columns = [("source", "left"), ("run", "left"), *((metric.label, "right") for metric in in_view("distances"))]
    groups = list(dict.fromkeys(group for run in measured.values() for group in run["quality"]))
    rows = [
        (
            "all of the mix" if group == UNION else group,
            letter,
            *(with_interval(metric.name, run["quality"][group].get(metric.name)) for metric in in_view("distances")),
        )
        for group in groups
        for letter, run in measured.items()
        if group in run["quality"]
    ]
    lengths = ", ".join(dict.fromkeys(run["length"] for run in measured.values()))
    return PageSection(
        "quality",
        "Quality side by side",
        [Grid(charts[:2], wide=True), *charts[2:], Folded("All numbers", [PageTable(columns, rows)])],
        f"Held-out rows of {lengths} tokens, each run against its own base.",
        "Quality",
    )


def _chart(measured: Mapping[str, Any], metric: Metric) -> Chart:
    data, values = [], {}
    for index, (letter, run) in enumerate(measured.items()):
        found = {group: each[metric.name] for group, each in run["quality"].items() if metric.name in each}
        names = ["all" if group == UNION else group for group in found]
        values[letter] = found.get(UNION, {}).get("value")
        data.append(
            whiskers(
                names,
                list(found.values()),
                [with_interval(metric.name, each) for each in found.values()],
                f"--c{index % 8 + 1}",
                name=f"{letter} {run['measured']}",
                symbol=("circle", "diamond", "square")[index % 3],
                whisker=f"--c{index % 8 + 1}",
            )
        )
    told = "; ".join(
        f"{letter} {with_interval(metric.name, run['quality'].get(UNION, {}).get(metric.name))}"
        for letter, run in measured.items()
    )
    layout = {
        "margin": {"l": 20, "b": 28},
        "xaxis": axis(form=axis_form(metric), nticks=6, zeroline=False),
        "yaxis": names_axis(),
    }
    rows = max(len(run["quality"]) for run in measured.values())
    return Chart(
        f"compare-{metric.name.replace('_', '-')}",
        metric.heading,
        f"Over the mix: {told}.",
        data,
        layout,
        100 + (22 + 10 * len(measured)) * rows,
    )
