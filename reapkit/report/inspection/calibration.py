"""Inspects a calibration or a pack: what was obtained per source against what was requested, and what is scored.
Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from reapkit.core.formatting import narrow_percent
from reapkit.report.inspection.recognise import read_json
from reapkit.report.inspection.render import Block, excerpt, highlighted, lines, notes, table

NEEDED = (
    "kind",
    "asked",
    "score",
    "packing",
    "overflow",
    "max_length",
    "seed",
    "rows",
    "tokens",
    "scored_tokens",
    "signal_tokens",
    "tokenizer",
    "duplicates",
    "warnings",
    "sources",
)
KEPT = (
    "name",
    "source",
    "config",
    "split",
    "revision",
    "filter",
    "weight",
    "format",
    "spans",
    "asked",
    "samples",
    "rows",
    "tokens",
    "scored_tokens",
    "signal_tokens",
    "lengths",
    "row_lengths",
    "samples_cut",
    "tokens_cut",
    "tool_calls",
    "rows_read",
    "order",
    "dropped",
    "sha256",
    "example",
)
SHARED_OUT = {"samples": "samples", "tokens": "tokens", "scored_tokens": "scored tokens"}
"""What weights may share out, and how it is called."""
SHARED = tuple(SHARED_OUT)


def facts(directory: Path) -> dict[str, Any]:
    """calibration.json without its long lists (indices, hashes of every sample), and each source's shares, asked and
    real."""
    summary = read_json(directory / "calibration.json", NEEDED)
    shares = _shares(summary)
    sources = [
        {name: source.get(name) for name in KEPT} | {"shares": shares[source["name"]]} for source in summary["sources"]
    ]
    about = {name: summary[name] for name in NEEDED if name not in ("kind", "sources")}
    return {
        "of": summary["kind"],
        **about,
        "date": summary.get("date"),
        "balance": summary.get("balance"),
        "parts": summary.get("parts"),
        "extra": summary.get("extra", []),
        "sources": sources,
    }


def _shares(summary: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """By source: the share its weight asks for (None for extra packs, outside the mix) and its share of what came
    out."""
    extra = summary.get("extra", [])
    weights = {
        source["name"]: Fraction(source["weight"]) for source in summary["sources"] if source["name"] not in extra
    }
    whole = {unit: sum(source[unit] for source in summary["sources"]) for unit in SHARED}
    return {
        source["name"]: {
            "asked": float(weights[source["name"]] / sum(weights.values())) if source["name"] in weights else None
        }
        | {unit: source[unit] / whole[unit] if whole[unit] else None for unit in SHARED}
        for source in summary["sources"]
    }


def blocks(found: Mapping[str, Any], *, colour: bool) -> list[Block]:
    """Tables per source, warnings, duplicates, and one sample of each source with its scored tokens highlighted."""
    sources = found["sources"]
    return [
        _heading(found),
        _amounts(found),
        _shares_table(found),
        _lengths(sources),
        *notes("dropped", _dropped(sources)),
        *notes("warnings", found["warnings"]),
        lines(duplicates_line(found["duplicates"]), ""),
        *_examples(found, colour),
    ]


def _heading(found: Mapping[str, Any]) -> Block:
    asked = ", ".join(
        f"{amount:,} {name}" if name in SHARED else f"{name} {amount}" for name, amount in found["asked"].items()
    )
    parts = "; ".join(
        f"{name}: {part['rows']:,} rows, {part['samples']:,} samples" for name, part in (found["parts"] or {}).items()
    )
    balance = f", weights sharing out {SHARED_OUT[found['balance']]}" if found["balance"] else ""
    return lines(
        f"{found['of']}: requested {asked}{balance}; rows of at most {found['max_length']:,} tokens",
        f"packing {found['packing']}, overflow {found['overflow']}, score {found['score']}, seed {found['seed']}"
        + (f", chat templates see {found['date']}" if found["date"] else ""),
        f"tokenizer {found['tokenizer'][:12]}",
        *([parts] if parts else []),
    )


def _amounts(found: Mapping[str, Any]) -> Block:
    rows = [
        (
            source["name"],
            source["samples"],
            source["rows"],
            source["tokens"],
            source["scored_tokens"],
            narrow_percent(_ratio(source["scored_tokens"], source["tokens"])),
            source["sha256"][:12],
        )
        for source in found["sources"]
    ]
    total = (
        "all",
        sum(source["samples"] for source in found["sources"]),
        found["rows"],
        found["tokens"],
        found["scored_tokens"],
        narrow_percent(_ratio(found["scored_tokens"], found["tokens"])),
        "",
    )
    return table(
        "What was obtained",
        ("source", "samples", "rows", "tokens", "scored", "share", "sha256"),
        [*rows, total],
        left=("sha256",),
    )


def _shares_table(found: Mapping[str, Any]) -> Block:
    def asked(source: Mapping[str, Any]) -> str:
        amounts = ", ".join(f"{amount:,} {SHARED_OUT[unit]}" for unit, amount in source["asked"].items())
        return amounts if source["shares"]["asked"] is not None else f"{amounts} (extra)"

    rows = [
        (
            source["name"],
            asked(source),
            narrow_percent(source["shares"]["asked"]),
            *(narrow_percent(source["shares"][unit]) for unit in SHARED),
        )
        for source in found["sources"]
    ]
    return table(
        "Requested and obtained shares",
        ("source", "requested", "share of the mix", "samples", "tokens", "scored"),
        rows,
        left=("requested",),
    )


def _lengths(sources: Sequence[Mapping[str, Any]]) -> Block:
    rows = [
        (
            source["name"],
            *((source["lengths"] or {}).get(name) for name in ("min", "median", "max")),
            source["samples_cut"],
            source["tokens_cut"],
            sum(reason["count"] for reason in source["dropped"].values()),
            ", ".join(source["spans"] or ()) or "-",
        )
        for source in sources
    ]
    return table(
        "Tokens per sample, what was cut or dropped, how the assistant was found",
        ("source", "least", "median", "most", "cut", "tokens cut", "dropped", "by"),
        rows,
        left=("by",),
    )


def _dropped(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{source['name']}: {why['count']:,} {reason} (first: {why['first']})"
        for source in sources
        for reason, why in source["dropped"].items()
    ]


def duplicates_line(shared: Mapping[str, int]) -> str:
    """Which sources share samples of equal content."""
    pairs = ", ".join(f"{pair} {count:,}" for pair, count in shared.items())
    return f"samples of equal content in two sources: {pairs or 'none'}"


def _examples(found: Mapping[str, Any], colour: bool) -> list[Block]:
    how = "highlighted" if colour else "between ⟦ and ⟧"
    what = (
        "every token is scored (score: all); the assistant's are"
        if found["score"] == "all"
        else "scored tokens, which the model must predict, are"
    )
    made: list[Block] = [lines(f"One sample of each source; {what} {how}.", "")]
    for source in found["sources"]:
        made += [lines(source["name"], style="bold"), highlighted(excerpt(source["example"] or []), colour=colour)]
    return made


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
