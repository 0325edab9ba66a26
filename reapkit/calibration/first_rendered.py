"""Renders a row of each source before anything runs, so that a chat template that refuses the data or cannot mark what
the assistant says is told by a plan, not after an hour. Torch-free; loads the model's tokenizer where there are chats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from reapkit.calibration.clock import dated
from reapkit.calibration.data_files import is_local_data
from reapkit.calibration.first_rows import first_rows
from reapkit.calibration.formats import recognise, to_sample
from reapkit.calibration.inputs import load_tokenizer
from reapkit.calibration.renderer import Renderer, SourceRefused, read_template
from reapkit.calibration.sources import open_walk
from reapkit.calibration.template_fit import TurnsHidden
from reapkit.calibration.template_process import TemplateProcess, TemplateStopped
from reapkit.core.errors import Problem, UnusableError
from reapkit.recipe.schema import CalibrationSpec, MixEntry

ROWS = 64
"""Rows of which one must render: a source may hold some that do not."""


def rendering_problems(
    calibration: CalibrationSpec,
    sources: Mapping[str, MixEntry],
    model_directory: Path,
    recipe_directory: Path,
    *,
    trust_remote_code: bool = False,
) -> list[Problem]:
    """What keeps the first rows of each source from being rendered and marked as a run does it.

    `sources` by their path in the recipe. Nothing is said of sources that do not lie on this machine, of those whose
    rows only the whole file tells, and of those that are no chats.
    """
    heads = {path: list(_rows(entry, recipe_directory)) for path, entry in sources.items()}
    chats = {path: rows for path, rows in heads.items() if rows and _is_chat(sources[path], rows[0])}
    if not chats:
        return []
    try:
        template = read_template(calibration.chat_template, recipe_directory)
        tokenizer = load_tokenizer(model_directory, trust_remote_code)
    except UnusableError as error:
        where = "calibration.chat_template" if str(error).startswith("calibration.chat_template") else "model.source"
        return [Problem(where, str(error).removeprefix("calibration.chat_template: "))]
    process = TemplateProcess()
    try:
        render = Renderer(dated(calibration, model_directory, recipe_directory), tokenizer, template, process)
        told = {path: _problem(render, sources[path], rows) for path, rows in chats.items()}
    finally:
        process.close()
    return [Problem(f"{path}.source", message) for path, message in told.items() if message is not None]


def _rows(entry: MixEntry, directory: Path) -> Iterator[Mapping[str, Any]]:
    if entry.source.startswith("builtin:"):
        return iter(open_walk(entry, directory, seed=0).read(range(1)))
    return first_rows(entry, directory, ROWS) if is_local_data(entry.source, directory) else iter(())


def _is_chat(entry: MixEntry, row: Mapping[str, Any]) -> bool:
    try:
        return to_sample(row, entry.format or recognise(row)).messages is not None
    except ValueError:
        return False  # the check of the first row says so


def _problem(renderer: Renderer, entry: MixEntry, rows: Iterable[Mapping[str, Any]]) -> str | None:
    """What is wrong with the template, or with every one of the rows, told of the first; None where one renders."""
    refused: str | None = None
    for row in rows:
        try:
            sample = to_sample(row, entry.format or recognise(row))
            rendered = renderer.render(sample)
        except (SourceRefused, TurnsHidden, TemplateStopped) as error:
            return f"{entry.source}, first row: {error}."
        except (ValueError, RecursionError) as error:
            refused = refused or f"{entry.source}: none of its first rows can be rendered. The first: {error}."
            continue
        answered = any(turn["role"] == "assistant" for turn in sample.messages or ())
        if rendered.spans or renderer.score == "all" or not answered:
            return None
        refused = refused or f"{entry.source}: {_unmarked(renderer)}"
    return refused


def _unmarked(renderer: Renderer) -> str:
    if renderer.markers is None:
        return (
            "the chat template shows nothing of what the assistant says in its first rows, so that nothing would be"
            " scored. Give calibration.chat_template, or set calibration.score to all."
        )
    return (
        f"nothing in its first rows stands between calibration.spans' {renderer.markers.start!r} and"
        f" {renderer.markers.end!r}, so that nothing would be scored. Correct the markers, or remove them: without"
        " markers each turn is looked for in what the template renders."
    )
