"""What a preparation noticed about its sources: little or nothing scored, columns that nothing reads, tools, thoughts
and ends of turns that cannot be seen in the text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from reapkit.calibration.draw_samples import Gathered
from reapkit.calibration.spans import Notes
from reapkit.calibration.token_journal import Samples
from reapkit.core.errors import UnusableError
from reapkit.recipe.schema import Spans

LOW_SCORED_SHARE = 0.05
"""Below this share of scored tokens a source is mostly context, and the user is told."""


def scored_little(score: str, sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warnings about sources of which little is scored. Raises UnusableError where nothing is, although completions
    are."""
    silent = [source for source in sources if score == "completion" and not source["scored_tokens"]]
    if silent:
        raise UnusableError(
            "\n".join(
                f"source '{source['name']}': none of its {source['tokens']:,} tokens is scored; assistant tokens were"
                f" sought by {source['spans_text']}. {_way_out(source)}"
                for source in silent
            )
        )
    return [
        f"source '{source['name']}': {source['scored_tokens']:,} of {source['tokens']:,} tokens are scored "
        f"({source['scored_tokens'] / source['tokens']:.1%}); the rest is context and says nothing about experts. "
        f"{_way_out(source)}"
        for source in sources
        if score == "completion" and source["scored_tokens"] < LOW_SCORED_SHARE * source["tokens"]
    ]


def noticed(samples: Samples, chosen: Sequence[int]) -> dict[str, Any]:
    """What was noticed in a source: columns that nothing reads, thoughts that the template leaves out. Nothing where
    nothing was."""
    left_out = sum(Notes(*samples.notes[sample]).left_out for sample in chosen)
    return {
        **({"unread": sorted(samples.unread)} if samples.unread else {}),
        **({"thoughts_left_out": left_out} if left_out else {}),
    }


def unread(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"source '{source['name']}': not read: {', '.join(source['unread'])}. Name columns in `format` to read them."
        for source in sources
        if source.get("unread")
    ]


def hidden_tools(sources: Sequence[Mapping[str, Any]], gathered: Sequence[Gathered]) -> list[str]:
    warnings = []
    for source, made in zip(sources, gathered, strict=True):
        hidden = sum(Notes(*made.samples.notes[sample]).hidden_tools for sample in made.chosen)
        if hidden:
            warnings.append(
                f"source '{source['name']}': the chat template does not show the tools' schemas, which {hidden} samples"
                " have. Give calibration.chat_template."
            )
    return warnings


def refuse_unclosed(gathered: Sequence[Gathered], markers: Spans | None) -> None:
    """Raises UnusableError where no end marker is found behind any start marker of a source."""
    for source in gathered:
        notes = [Notes(*source.samples.notes[sample]) for sample in source.chosen]
        found = sum(note.marked for note in notes)
        if markers is not None and found and sum(note.unclosed for note in notes) == found:
            raise UnusableError(
                f"source '{source.entry.name}': calibration.spans: the end marker {json.dumps(markers.end)} follows"
                f" none of {found} start markers. Compare it with how the samples are rendered (reapkit inspect)."
            )


def _way_out(source: Mapping[str, Any]) -> str:
    if source["samples_cut"]:
        return f"{source['samples_cut']} samples were cut; try calibration.overflow: window, or a larger max_length."
    if "markers" in source["spans"]:
        return "Compare calibration.spans with how the samples are rendered."
    if "generation" in source["spans"]:
        return "Check the template's {% generation %} blocks, or give calibration.spans."
    return "Check the source's assistant turns, or choose calibration.score: all."
