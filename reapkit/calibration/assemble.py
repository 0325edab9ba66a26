"""Packs and interleaves the drawn samples into calibration rows, writes them and counts what was written."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reapkit.calibration.draw_samples import Gathered, dropped_summary
from reapkit.calibration.encoder import packing_of
from reapkit.calibration.formats import describe
from reapkit.calibration.inputs import Inputs
from reapkit.calibration.noticed import hidden_tools, noticed, refuse_unclosed, scored_little, unread
from reapkit.calibration.packing import PARTS, Piece, group_bounds, interleave, limit, pack, pieces_of
from reapkit.calibration.spans import WAYS, Notes
from reapkit.calibration.token_journal import Samples
from reapkit.calibration.tokens import SUMMARY_FILE, TOKENS_FILE
from reapkit.core.atomic_files import replacing, write_at, write_json
from reapkit.core.mapped_safetensors import create_tensors
from reapkit.recipe.schema import TokensFormat

EXAMPLE_TOKENS = 400
"""Tokens of the sample that is shown of each source."""


@dataclass(frozen=True)
class Stream:
    """Samples of one source that share rows; a pack has two per source, one per part."""

    source: int
    gathered: Gathered
    samples: Sequence[int]
    part: int = 0


@dataclass(frozen=True)
class RowPlan:
    """Rows in their final order: (source, part, pieces)."""

    rows: list[tuple[int, int, list[Piece]]]

    @property
    def lengths(self) -> list[int]:
        return [sum(map(len, pieces)) for _, _, pieces in self.rows]


def assemble(
    inputs: Inputs,
    gathered: Sequence[Gathered],
    streams: Sequence[Stream],
    out: Path,
    about: Mapping[str, Any],
    *,
    removable: bool,
) -> dict[str, Any]:
    """Writes `tokens.safetensors` and, last, `calibration.json` below `out`; returns the latter's content.

    Raises UnusableError naming every source of which nothing would be scored.
    """
    calibration = inputs.calibration
    refuse_unclosed(gathered, calibration.spans)
    plan = _plan(inputs, streams)
    bounds, snapshots = group_bounds(plan.lengths)
    with replacing(out / TOKENS_FILE) as partial:
        counts = _write(inputs, gathered, plan, partial, about["kind"] == "packs")
        sources = [_source_summary(inputs, source, number, plan, counts) for number, source in enumerate(gathered)]
        warnings = scored_little(calibration.score, sources) + hidden_tools(sources, gathered)
        for warning in warnings:
            inputs.progress.warn(warning)
        for note in unread(sources):
            inputs.progress.say(note)
    summary = {
        "version": 1,
        **about,
        "score": calibration.score,
        "packing": calibration.packing,
        "overflow": calibration.overflow,
        "max_length": calibration.max_length,
        "seed": calibration.seed,
        **({"date": calibration.date} if calibration.date else {}),
        "rows": len(plan.rows),
        "tokens": int(sum(plan.lengths)),
        "scored_tokens": int(counts["scored"].sum()),
        "signal_tokens": int(counts["signal"].sum()),
        "groups": bounds,
        "snapshots": snapshots,
        "tokenizer": inputs.tokenizer_hash,
        "duplicates": _duplicates(gathered),
        "warnings": warnings,
        "sources": sources,
    }
    if about["kind"] == "packs":
        parts = [part for _, part, _ in plan.rows]
        samples = [sum(len(stream.samples) for stream in streams if stream.part == part) for part in range(len(PARTS))]
        summary["parts"] = {
            name: {"rows": parts.count(part), "samples": samples[part]} for part, name in enumerate(PARTS)
        }
    write_json(out / SUMMARY_FILE, summary)
    if removable:
        shutil.rmtree(inputs.work, ignore_errors=True)
    return summary


def _plan(inputs: Inputs, streams: Sequence[Stream]) -> RowPlan:
    """Every stream's samples packed into rows; parts one after another, the rows of a part interleaved."""
    packed = [_pack_stream(inputs, stream) for stream in streams]
    rows = []
    for part in sorted({stream.part for stream in streams}):
        chosen = [number for number, stream in enumerate(streams) if stream.part == part]
        rows += [
            (streams[chosen[stream]].source, part, packed[chosen[stream]][row])
            for stream, row in interleave([len(packed[number]) for number in chosen])
        ]
    return RowPlan(rows)


def _pack_stream(inputs: Inputs, stream: Stream) -> list[list[Piece]]:
    calibration, source = inputs.calibration, stream.gathered
    samples, packing = source.samples, packing_of(calibration, source.format)
    end_token = inputs.end_token() if packing == "concat" else None
    pieces = list(
        itertools.chain.from_iterable(
            pieces_of(
                number,
                samples.lengths[number],
                samples.last_assistant[number],
                samples.last_token[number] == end_token,
                calibration.max_length,
                calibration.overflow,
                packing,
            )
            for number in stream.samples
        )
    )
    if source.target.tokens is not None:
        pieces = limit(pieces, source.target.tokens)
    return pack(pieces, calibration.max_length, packing)


def _write(
    inputs: Inputs, gathered: Sequence[Gathered], plan: RowPlan, path: Path, is_pack: bool
) -> dict[str, np.ndarray]:
    """Copies the rows' tokens into the safetensors file, a row at a time; returns `lengths`, `scored`, `signal`:
    tokens, scored positions and those with a signal per row, int64 [rows].
    """
    lengths = np.array(plan.lengths, np.int64)
    pieces = [piece for _, _, pieces in plan.rows for piece in pieces]
    shapes = {
        "input_ids": ("int32", int(lengths.sum())),
        "assistant": ("uint8", int(lengths.sum())),
        "row_offsets": ("int64", len(lengths) + 1),
        "row_source": ("int16", len(lengths)),
        "sample_offsets": ("int64", len(pieces) + 1),
        "part_sample": ("int32", len(pieces)),
    }
    file = create_tensors(path, shapes | ({"row_part": ("uint8", len(lengths))} if is_pack else {}))
    file["row_offsets"][:] = np.concatenate([[0], np.cumsum(lengths)])
    file["row_source"][:] = [source for source, _, _ in plan.rows]
    file["sample_offsets"][:] = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
    file["part_sample"][:] = [piece.sample for piece in pieces]
    if is_pack:
        file["row_part"][:] = [part for _, part, _ in plan.rows]
    end_token = inputs.end_token() if any(piece.end_token for piece in pieces) else None
    completion = inputs.calibration.score == "completion"
    scored, signal, position = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64), 0
    with ExitStack() as open_files, inputs.progress.task("write rows", len(lengths), "rows") as task:
        stored = [open_files.enter_context(source.samples.reader()) for source in gathered]
        out = open_files.enter_context(path.open("r+b")).fileno()
        for row, (source, _, row_pieces) in enumerate(plan.rows):
            read = [
                _with_end(
                    *stored[source](piece.sample, piece.start, piece.stop), end_token if piece.end_token else None
                )
                for piece in row_pieces
            ]
            # Written, not mapped: the pages of a map would count as this process's memory.
            write_at(out, np.concatenate([ids for ids, _ in read]).tobytes(), file["input_ids"].offset + 4 * position)
            write_at(out, np.concatenate([marks for _, marks in read]).tobytes(), file["assistant"].offset + position)
            signal[row] = sum(int(marks[1:].sum()) if completion else len(marks) - 1 for _, marks in read)
            scored[row] = signal[row] if completion else lengths[row]
            position += int(lengths[row])
            task.advance()
    for tensor in file.values():
        tensor.flush()
    return {"lengths": lengths, "scored": scored, "signal": signal}


def _with_end(ids: np.ndarray, marks: np.ndarray, end_token: int | None) -> tuple[np.ndarray, np.ndarray]:
    """A piece with its end token, which packing wrote and not the assistant."""
    return (ids, marks) if end_token is None else (np.append(ids, np.int32(end_token)), np.append(marks, np.uint8(0)))


def _source_summary(
    inputs: Inputs, source: Gathered, number: int, plan: RowPlan, counts: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    entry, samples, chosen = source.entry, source.samples, source.chosen
    rows = [row for row, (owner, _, _) in enumerate(plan.rows) if owner == number]
    pieces = [piece for row in rows for piece in plan.rows[row][2]]
    hashes = [samples.hashes[sample] for sample in chosen]
    lengths = np.array([_whole_length(samples, sample) for sample in chosen])
    read = samples.positions[chosen[-1]] + 1 if chosen else 0
    packing = packing_of(inputs.calibration, source.format)
    kept = sum(piece.stop - piece.start for piece in pieces)
    ways = sorted({samples.ways[sample] for sample in chosen})
    return {
        "name": entry.name,
        "source": entry.source,
        "config": entry.config,
        "split": entry.split,
        "revision": source.walk.revision,
        "filter": entry.model_dump(mode="json")["filter"],
        "weight": str(entry.weight),
        **({"max_tokens": entry.max_tokens} if entry.max_tokens else {}),
        "format": describe(source.format),
        "packing": packing,
        "spans": ways,
        "spans_text": "; ".join(WAYS[way] for way in ways),
        "asked": dict(source.asked),
        "samples": len(chosen),
        "rows": len(rows),
        "tokens": sum(map(len, pieces)),
        "scored_tokens": int(counts["scored"][rows].sum()),
        "signal_tokens": int(counts["signal"][rows].sum()),
        "end_tokens": sum(piece.end_token for piece in pieces),
        "lengths": _length_summary(lengths),
        "row_lengths": _length_summary(counts["lengths"][rows]),
        "samples_cut": _samples_cut(pieces, source),
        "tokens_cut": int(lengths.sum()) - kept,
        "tool_calls": sum(samples.tool_calls[sample] for sample in chosen),
        "available_rows": source.walk.length,
        "rows_read": read,
        "order": source.walk.order,
        "dropped": dropped_summary([entry for entry in (*samples.dropped, *source.refused) if entry[0] < read]),
        **noticed(samples, chosen),
        "sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "example": _example(inputs, source, pieces),
        "indices": [source.walk.number(samples.positions[sample]) for sample in chosen],
        "hashes": hashes,
    }


def _length_summary(lengths: np.ndarray) -> dict[str, float]:
    """min, median, mean, 90th percentile and max, in tokens."""
    if not len(lengths):
        return {}
    ordered = np.sort(lengths)
    return {
        "min": int(ordered[0]),
        "median": int(ordered[(len(ordered) - 1) // 2]),
        "mean": round(float(ordered.mean()), 1),
        "p90": int(ordered[-(-9 * len(ordered) // 10) - 1]),
        "max": int(ordered[-1]),
    }


def _samples_cut(pieces: Sequence[Piece], source: Gathered) -> int:
    """Samples of which some tokens are in no row."""
    kept = Counter[int]()
    for piece in pieces:
        kept[piece.sample] += piece.stop - piece.start
    return sum(kept[sample] < _whole_length(source.samples, sample) for sample in source.chosen)


def _whole_length(samples: Samples, sample: int) -> int:
    """Tokens of a sample before its source's `max_tokens` cut it."""
    return samples.lengths[sample] + Notes(*samples.notes[sample]).shortened


def _example(inputs: Inputs, source: Gathered, pieces: Sequence[Piece]) -> list[list[Any]]:
    """The source's first piece as [text, is the assistant's] stretches, from a little before its first assistant
    token."""
    if not pieces:
        return []
    piece = min(pieces, key=lambda piece: (piece.sample, piece.start))
    with source.samples.reader() as read:
        ids, marks = read(piece.sample, piece.start, piece.stop)
    first = int(np.argmax(marks)) if marks.any() else 0
    window = slice(max(0, min(first - EXAMPLE_TOKENS // 2, len(ids) - EXAMPLE_TOKENS)), None)
    ids, marks = ids[window][:EXAMPLE_TOKENS], marks[window][:EXAMPLE_TOKENS]
    borders = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(ids)]
    in_words = str if isinstance(source.format, TokensFormat) else inputs.tokenizer().decode
    return [[in_words(ids[start:stop].tolist()), bool(marks[start])] for start, stop in itertools.pairwise(borders)]


def _duplicates(gathered: Sequence[Gathered]) -> dict[str, int]:
    """Samples with equal content in two sources, as `first/second` to how many; equal ones within a source were
    dropped."""
    contents = {source.entry.name: {source.samples.hashes[sample] for sample in source.chosen} for source in gathered}
    return {
        f"{a}/{b}": shared for a, b in itertools.combinations(contents, 2) if (shared := len(contents[a] & contents[b]))
    }
