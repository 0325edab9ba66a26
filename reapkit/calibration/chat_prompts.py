"""Prompts of a source: what its conversations say before the assistant first speaks, as tokens and as turns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from reapkit.calibration.encoder import format_of
from reapkit.calibration.formats import Format, to_sample
from reapkit.calibration.inputs import Inputs
from reapkit.calibration.renderer import Renderer, SourceRefused
from reapkit.calibration.sources import Walk, open_walk
from reapkit.calibration.template_fit import TurnsHidden
from reapkit.calibration.template_process import TemplateProcess, TemplateStopped
from reapkit.core.errors import UnusableError
from reapkit.core.formatting import plural
from reapkit.core.hashing import digest
from reapkit.recipe.schema import MixEntry

BLOCK = 64
"""Rows that are read together."""
MOST_SKIPPED = 64
"""Rows of an endless source that may give no prompt for each that is wanted."""
OPENED = re.compile(r"<(?:think|thinking)>\s*\Z")
NO_PROMPT, TOO_LONG, TWICE, UNREADABLE = "no prompt", "too long", "asked before", "cannot be rendered"


@dataclass(frozen=True)
class ChatPrompt:
    """Turns and tools that ask, the tokens that the model reads, and what of the answer the template itself opens: a
    thought's tag, or nothing."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    input_ids: tuple[int, ...]
    opened: str

    @property
    def name(self) -> str:
        """Names what the model reads."""
        return digest(self.input_ids)


def draw_chat_prompts(
    inputs: Inputs, entry: MixEntry, count: int, longest: int | None
) -> tuple[list[ChatPrompt], Mapping[str, int]]:
    """The first `count` prompts of a mix entry, in the order in which the calibration draws its rows, and how many rows
    gave none, by reason; fewer where the source has no more. `longest`: tokens that a prompt may have.

    Raises UnusableError naming source and row for what is wrong with the recipe or the template, and for a source
    without prompts.
    """
    walk = open_walk(entry, inputs.recipe_directory, seed=inputs.calibration.seed)
    found: dict[str, ChatPrompt] = {}
    skipped: Counter[str] = Counter()
    unreadable: list[str] = []
    with closing(TemplateProcess()) as process, inputs.progress.task(f"read {entry.name}", count, "prompts") as task:
        renderer = Renderer(inputs.calibration, inputs.tokenizer(), inputs.template, process)
        format = format_of(entry, walk)
        position = 0
        while len(found) < count and (walk.length is None or position < walk.length):
            block = range(position, position + BLOCK if walk.length is None else min(position + BLOCK, walk.length))
            rows = walk.read_each(block)
            for place, row in zip(block, rows, strict=False):
                prompt = _prompt(renderer, walk, place, row, format)
                if isinstance(prompt, ValueError):
                    unreadable.append(str(prompt).rstrip("."))
                    skipped[UNREADABLE] += 1
                elif isinstance(prompt, str):
                    skipped[prompt] += 1
                elif longest is not None and len(prompt.input_ids) > longest:
                    skipped[TOO_LONG] += 1
                elif prompt.name in found:
                    skipped[TWICE] += 1
                elif len(found) < count:
                    found[prompt.name] = prompt
                    task.advance()
            position = block.stop
            if len(rows) < len(block) or sum(skipped.values()) > MOST_SKIPPED * (len(found) + count):
                break
    if unreadable:
        inputs.progress.warn(
            f"source '{entry.name}': {plural(len(unreadable), 'row')} left out that cannot be rendered. The first:"
            f" {unreadable[0]}."
        )
    if not found:
        told = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
        raise UnusableError(
            f"source '{entry.name}': no prompts in {entry.source} ({told or 'it has no rows'}). Give a source of"
            " conversations that begin with a user's turn."
        )
    return list(found.values()), dict(sorted(skipped.items()))


def _prompt(
    renderer: Renderer, walk: Walk, place: int, row: Mapping[str, Any] | ValueError, format: Format
) -> ChatPrompt | str | ValueError:
    """The prompt of the row at a place of the walk, or why it has none: an error where the row cannot be rendered."""
    try:
        if isinstance(row, ValueError):
            raise row
        sample = to_sample(row, format)
        rendered = renderer.prompt(sample)
    except (SourceRefused, TurnsHidden, TemplateStopped) as error:
        raise UnusableError(f"{walk.place(place)}: {error}.") from None
    except (ValueError, RecursionError) as error:
        told = str(error).removeprefix(f"{walk.rows.place(walk.number(place))}: ")
        return ValueError(f"{walk.rows.place(walk.number(place))}: {told}")
    if rendered is None:
        return NO_PROMPT
    messages, text = rendered
    ids = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    opened = OPENED.search(text)
    return ChatPrompt(messages, sample.tools, tuple(ids), opened.group() if opened else "")
