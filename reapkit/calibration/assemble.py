"""Gathered samples become the artifact: rows packed, interleaved, written, and everything counted."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reapkit.calibration.formats import describe
from reapkit.calibration.gather import dropped_summary, packing_of
from reapkit.calibration.packing import Piece, group_bounds, interleave, limit, pack, pieces_of
from reapkit.calibration.spans import WAYS
from reapkit.calibration.tokens import PARTS, SUMMARY_FILE, TOKENS_FILE, create_tensors
from reapkit.errors import UnusableError
from reapkit.hashing import digest
from reapkit.recipe.schema import TokensFormat
from reapkit.resolve import tokenizer_identity
from reapkit.store import write_json

LOW_SCORED_SHARE = 0.05
"""Below this share of scored tokens a source is mostly context, and the user is told."""
EXAMPLE_TOKENS = 400
"""Tokens of the sample that is shown of each source."""


@dataclass(frozen=True)
class Stream:
    """Samples of one source that share rows; a pack has two per source, one per part."""

    source: int
    gathered: Any
    samples: Sequence[int]
    part: int = 0


@dataclass(frozen=True)
class Plan:
    """Rows in their final order: (source, part, pieces)."""

    rows: list[tuple[int, int, list[Piece]]]

    @property
    def lengths(self) -> list[int]:
        return [sum(map(len, pieces)) for _, _, pieces in self.rows]


def assemble(inputs: Any, gathered: Sequence[Any], streams: Sequence[Stream], out: Path, about: Mapping[str, Any], *,
             removable: bool) -> dict[str, Any]:
    """Writes `tokens.safetensors` and, last, `calibration.json` below `out`; returns the latter's content.

    Raises UnusableError naming every source of which nothing would be scored.
    """
    calibration = inputs.calibration
    out.mkdir(parents=True, exist_ok=True)
    plan = _plan(inputs, streams)
    bounds, snapshots = group_bounds(plan.lengths)
    temporary = out / f".{TOKENS_FILE}"
    counts = _write(inputs, gathered, plan, temporary, about["kind"] == "packs")
    sources = [_source_summary(inputs, source, number, plan, counts) for number, source in enumerate(gathered)]
    warnings = _check(calibration.score, sources)
    for warning in warnings:
        inputs.progress.warn(warning)
    temporary.replace(out / TOKENS_FILE)
    summary = {
        "version": 1,
        **about,
        "score": calibration.score, "packing": calibration.packing, "overflow": calibration.overflow,
        "max_length": calibration.max_length, "seed": calibration.seed,
        "rows": len(plan.rows), "tokens": int(sum(plan.lengths)),
        "scored_tokens": int(counts["scored"].sum()), "signal_tokens": int(counts["signal"].sum()),
        "groups": bounds, "snapshots": snapshots,
        "tokenizer": digest(tokenizer_identity(inputs.tokenizer_directory)),
        "duplicates": _duplicates(gathered),
        "warnings": warnings,
        "sources": sources,
    }
    if about["kind"] == "packs":
        parts = [part for _, part, _ in plan.rows]
        summary["parts"] = {name: {"rows": parts.count(number), "samples": sum(len(s.samples) for s in streams if s.part == number)}
                            for number, name in enumerate(PARTS)}
    write_json(out / SUMMARY_FILE, summary)
    if removable:
        shutil.rmtree(inputs.work, ignore_errors=True)
    return summary


def _plan(inputs: Any, streams: Sequence[Stream]) -> Plan:
    """Every stream's samples packed into rows; parts one after another, the rows of a part interleaved."""
    packed = [_pack_stream(inputs, stream) for stream in streams]
    rows = []
    for part in sorted({stream.part for stream in streams}):
        chosen = [number for number, stream in enumerate(streams) if stream.part == part]
        rows += [(streams[chosen[stream]].source, part, packed[chosen[stream]][row])
                 for stream, row in interleave([len(packed[number]) for number in chosen])]
    return Plan(rows)


def _pack_stream(inputs: Any, stream: Stream) -> list[list[Piece]]:
    calibration, source = inputs.calibration, stream.gathered
    samples, packing = source.samples, packing_of(calibration, source.format)
    end_token = inputs.end_token() if packing == "concat" else None
    pieces = list(itertools.chain.from_iterable(
        pieces_of(number, samples.lengths[number], samples.last_assistant[number], samples.last_token[number] == end_token,
                  calibration.max_length, calibration.overflow, packing) for number in stream.samples))
    if source.target.tokens is not None:
        pieces = limit(pieces, source.target.tokens)
    return pack(pieces, calibration.max_length, packing)


def _write(inputs: Any, gathered: Sequence[Any], plan: Plan, path: Path, is_pack: bool) -> dict[str, np.ndarray]:
    """Copies the rows' tokens into the safetensors file; returns tokens, scored and signal positions per row, int64 [rows]."""
    lengths = np.array(plan.lengths, np.int64)
    parts = sum(len(pieces) for _, _, pieces in plan.rows)
    shapes = {"input_ids": ("int32", int(lengths.sum())), "assistant": ("uint8", int(lengths.sum())),
              "row_offsets": ("int64", len(lengths) + 1), "row_source": ("int16", len(lengths)),
              "sample_offsets": ("int64", parts + 1), "part_sample": ("int32", parts)}
    file = create_tensors(path, shapes | ({"row_part": ("uint8", len(lengths))} if is_pack else {}))
    file["row_offsets"][0] = 0
    file["row_offsets"][1:] = np.cumsum(lengths)
    file["row_source"][:] = [source for source, _, _ in plan.rows]
    if is_pack:
        file["row_part"][:] = [part for _, part, _ in plan.rows]
    end_token = inputs.end_token() if any(piece.end_token for _, _, pieces in plan.rows for piece in pieces) else 0
    stored = [source.samples.tokens() for source in gathered]
    scored, signal = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    position = part = 0
    with inputs.progress.task("write rows", len(lengths), "rows") as task:
        for row, (source, _, pieces) in enumerate(plan.rows):
            ids, assistant, offsets = stored[source]
            for piece in pieces:
                begin, size = int(offsets[piece.sample]), piece.stop - piece.start
                stretch = slice(begin + piece.start, begin + piece.stop)
                file["input_ids"][position : position + size] = ids[stretch]
                file["assistant"][position : position + size] = marks = assistant[stretch]
                if piece.end_token:
                    file["input_ids"][position + size], file["assistant"][position + size] = end_token, 0
                predicted = int(marks[1:].sum()) if inputs.calibration.score == "completion" else len(piece) - 1
                scored[row] += predicted if inputs.calibration.score == "completion" else len(piece)
                signal[row] += predicted
                file["sample_offsets"][part], file["part_sample"][part] = position, piece.sample
                position, part = position + len(piece), part + 1
            task.advance()
    file["sample_offsets"][part] = position
    for tensor in file.values():
        if isinstance(tensor, np.memmap):
            tensor.flush()
    return {"lengths": lengths, "scored": scored, "signal": signal}


def _source_summary(inputs: Any, source: Any, number: int, plan: Plan, counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    entry, samples, used = source.entry, source.samples, source.used
    rows = [row for row, (owner, _, _) in enumerate(plan.rows) if owner == number]
    pieces = [piece for row in rows for piece in plan.rows[row][2]]
    hashes = samples.hashes[:used]
    lengths = np.array(samples.lengths[:used])
    read = samples.positions[used - 1] + 1 if used else 0
    packing = packing_of(inputs.calibration, source.format)
    kept = sum(piece.stop - piece.start for piece in pieces)
    ways = sorted(set(samples.ways[:used]))
    return {
        "name": entry.name, "source": entry.source, "config": entry.config, "split": entry.split, "revision": entry.revision,
        "filter": entry.filter, "weight": str(entry.weight), "format": describe(source.format), "packing": packing,
        "spans": ways, "spans_text": "; ".join(WAYS[way] for way in ways),
        "asked": {source.target.unit: source.target.amount},
        "samples": used, "rows": len(rows), "tokens": sum(map(len, pieces)),
        "scored_tokens": int(counts["scored"][rows].sum()), "signal_tokens": int(counts["signal"][rows].sum()),
        "end_tokens": sum(piece.end_token for piece in pieces),
        "lengths": _length_summary(lengths), "row_lengths": _length_summary(counts["lengths"][rows]),
        "samples_cut": _samples_cut(pieces, lengths), "tokens_cut": int(lengths.sum()) - kept,
        "tool_calls": sum(samples.tool_calls[:used]),
        "available_rows": source.walk.length, "rows_read": read, "order": source.walk.order,
        "dropped": dropped_summary([entry for entry in samples.dropped if entry[0] < read]),
        "sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "example": _example(inputs, source, pieces),
        "indices": [source.walk.number(position) for position in samples.positions[:used]],
        "hashes": hashes,
    }


def _length_summary(lengths: np.ndarray) -> dict[str, float]:
    """min, median, mean, 90th percentile and max, in tokens."""
    if not len(lengths):
        return {}
    return {"min": int(lengths.min()), "median": int(np.sort(lengths)[(len(lengths) - 1) // 2]), "mean": round(float(lengths.mean()), 1),
            "p90": int(np.sort(lengths)[-(-9 * len(lengths) // 10) - 1]), "max": int(lengths.max())}


def _samples_cut(pieces: Sequence[Piece], lengths: np.ndarray) -> int:
    """Samples of which some tokens are in no row."""
    kept = np.zeros(len(lengths), np.int64)
    for piece in pieces:
        kept[piece.sample] += piece.stop - piece.start
    return int((kept < lengths).sum())


def _example(inputs: Any, source: Any, pieces: Sequence[Piece]) -> list[list[Any]]:
    """The source's first piece as [text, is the assistant's] stretches, from a little before its first assistant token."""
    if not pieces:
        return []
    ids, assistant, offsets = source.samples.tokens()
    piece = min(pieces, key=lambda piece: (piece.sample, piece.start))
    begin = int(offsets[piece.sample])
    ids, marks = ids[begin + piece.start : begin + piece.stop], assistant[begin + piece.start : begin + piece.stop]
    first = int(np.argmax(marks)) if marks.any() else 0
    window = slice(max(0, min(first - EXAMPLE_TOKENS // 2, len(ids) - EXAMPLE_TOKENS)), None)
    ids, marks = ids[window][:EXAMPLE_TOKENS], marks[window][:EXAMPLE_TOKENS]
    borders = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(ids)]
    given = isinstance(source.format, TokensFormat)
    tokenizer = None if given else inputs.tokenizer()
    return [[str(ids[a:b].tolist()) if given else tokenizer.decode(ids[a:b].tolist()), bool(marks[a])] for a, b in itertools.pairwise(borders) if b > a]


def _check(score: str, sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warnings about what came out. Raises UnusableError where a source has no assistant token although completions are scored."""
    silent = [source for source in sources if score == "completion" and not source["scored_tokens"]]
    if silent:
        raise UnusableError("\n".join(
            f"source '{source['name']}': none of its {source['tokens']:,} tokens is scored; assistant tokens were sought by "
            f"{source['spans_text']}. {_way_out(source)}" for source in silent))
    return [f"source '{source['name']}': {source['scored_tokens']:,} of {source['tokens']:,} tokens are scored "
            f"({source['scored_tokens'] / source['tokens']:.1%}); the rest is context and says nothing about experts. {_way_out(source)}"
            for source in sources if score == "completion" and source["scored_tokens"] < LOW_SCORED_SHARE * source["tokens"]]


def _way_out(source: Mapping[str, Any]) -> str:
    if source["samples_cut"]:
        return f"{source['samples_cut']} samples were cut; try calibration.overflow: window, or a larger max_length."
    if "markers" in source["spans"]:
        return "Compare calibration.spans with how the samples are rendered."
    if "generation" in source["spans"]:
        return "Check the template's {% generation %} blocks, or give calibration.spans."
    return "Check the source's assistant turns, or choose calibration.score: all."


def _duplicates(gathered: Sequence[Any]) -> dict[str, int]:
    """Samples with equal content in two sources, as `first/second` to how many; equal ones within a source were dropped."""
    contents = {source.entry.name: set(source.samples.hashes[: source.used]) for source in gathered}
    return {f"{a}/{b}": shared for a, b in itertools.combinations(contents, 2) if (shared := len(contents[a] & contents[b]))}
