"""Renders conversations through a chat template and finds in the text what the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from reapkit.calibration.clock import CLOCK
from reapkit.calibration.formats import Sample
from reapkit.calibration.shown_turns import NotFound, Render, opening, shared_length, shown_turns
from reapkit.calibration.spans import Notes, Rendered, closed_spans
from reapkit.calibration.template_fit import Fitter, Way, in_parts
from reapkit.calibration.template_process import TemplateProcess, TemplateRefused, TemplateStopped
from reapkit.calibration.turns import Message
from reapkit.checkpoint.locate import local_path
from reapkit.core.errors import UnusableError
from reapkit.recipe.schema import CalibrationSpec

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class SourceRefused(ValueError):
    """What is wrong with the recipe or the template, not with one row: the source is refused, not the row dropped."""


class Renderer:
    """Samples to text with assistant spans, by the first way that applies: markers, {% generation %}, prefix rendering,
    what the whole rendering shows of each turn.

    A `chat_template` of the recipe replaces the model's. Plain text counts as written by the assistant throughout,
    unless markers are given: it has no prompt that could be left out.
    """

    def __init__(
        self, calibration: CalibrationSpec, tokenizer: Any, own_template: str | None, process: TemplateProcess
    ):
        self.tokenizer = tokenizer
        self.score = calibration.score
        self.date = calibration.date
        self.markers = calibration.spans
        self.own_template = own_template
        self._process = process
        self._fitters: dict[str, Fitter] = {}

    def template(self, tools: list[dict[str, Any]] | None) -> str:
        """The chat template in use. Raises SourceRefused where there is none."""
        if self.own_template is None and not self.tokenizer.chat_template:
            raise SourceRefused(
                "the model ships no chat template. Give calibration.chat_template (a Jinja file), "
                "or render the chats yourself into a text column and give calibration.spans"
            )
        return (
            self.own_template if self.own_template is not None else self.tokenizer.get_chat_template(None, tools=tools)
        )

    def reads(self, key: str) -> bool:
        """Whether any chat template in use mentions a turn's key."""
        own = self.own_template if self.own_template is not None else self.tokenizer.chat_template
        return key in str(own)

    def prompt(self, sample: Sample) -> tuple[list[Message], str] | None:
        """What a chat sample says before the assistant first speaks, and the text after which the model would go on;
        None where nothing is said before, or the sample is no chat.

        Raises as `render`.
        """
        turns = sample.messages or []
        first = next((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
        asked = turns[:first]
        if not any(turn["role"] == "user" for turn in asked):
            return None
        messages, _, chat = self._fitted(replace(sample, messages=asked))
        return asked, chat.text(messages, prompt=True)

    def render(self, sample: Sample) -> Rendered:
        """Text and spans of a text or chat sample.

        Raises ValueError saying what is wrong with the sample, SourceRefused what is wrong with its source.
        """
        if sample.text is not None:
            return self._render_text(sample.text)
        messages, way, chat = self._fitted(sample)
        template, fitter = chat.template, self._fitters[chat.template]
        hidden = bool(sample.tools) and not fitter.shows_tools(chat.given(messages), sample.tools)
        notes = Notes(int(hidden), way.left_out)
        if self.markers is None and GENERATION.search(template):
            text, spans = chat.marked(messages)
            return Rendered(text, spans, "generation", False, notes)
        text = chat.text(messages)
        if self.markers is not None:
            return self._between_markers(chat, messages, text, notes)
        if self.score == "all":
            return Rendered(text, [], "none", False, notes)
        nested = prefix_spans(messages, text, chat.text)
        if nested is not None:
            return Rendered(text, nested, "prefix", False, notes)
        try:
            spans = shown_turns(messages, text, chat.text, self._added).spans
        except NotFound as error:
            raise ValueError(
                f"{error}, so that its assistant tokens cannot be found. Give a calibration.chat_template with"
                " {% generation %} blocks, or render the chats yourself into a text column and give calibration.spans"
            ) from None
        return Rendered(text, spans, "shown", False, notes)

    def _fitted(self, sample: Sample) -> tuple[list[Message], Way, _Chat]:
        """A chat's turns as its template reads them, how that is, and what renders them."""
        assert sample.messages is not None, "samples of tokens are not rendered"
        template = self.template(sample.tools)
        if self.date is None and CLOCK in template:
            raise SourceRefused(
                "the chat template reads the clock, which no file of the model showed. Copy it into a file, and give it"
                " as calibration.chat_template"
            )
        if template not in self._fitters:
            self._fitters[template] = Fitter(
                template, lambda turns, tools: self._apply(template, turns, tools, False, False)
            )
        messages, way = self._fitters[template].fitted(sample.messages, sample.tools)
        return messages, way, _Chat(self._apply, template, sample.tools, way.as_parts)

    def _render_text(self, text: str) -> Rendered:
        bos = self.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        if self.markers is None:
            return Rendered(text, [(0, len(text))], "whole text", special)
        found = closed_spans(text, self.markers)
        notes = Notes(marked=len(found), unclosed=sum(not closed for _, closed in found))
        return Rendered(text, [span for span, _ in found], "markers", special, notes)

    def _between_markers(self, chat: _Chat, messages: list[Message], text: str, notes: Notes) -> Rendered:
        assert self.markers is not None
        found = closed_spans(text, self.markers)
        spans = [span for span, _ in found]
        try:
            others = shown_turns(messages, text, chat.text, self._added).others
        except TemplateStopped:
            raise
        except ValueError:
            others = []  # the template changes what is said: nothing to compare with
        if any(start < end and begin < stop for start, stop in spans for begin, end in others):
            raise SourceRefused(
                f"calibration.spans: what stands between {self.markers.start!r} and {self.markers.end!r} holds what"
                " another role says. Correct the markers, or remove them: without markers each turn is looked for in"
                " what the template renders"
            )
        notes = replace(notes, marked=len(found), unclosed=sum(not closed for _, closed in found))
        return Rendered(text, spans, "markers", False, notes)

    @cached_property
    def _added(self) -> tuple[str, ...]:
        return tuple(self.tokenizer.get_added_vocab())

    def _apply(self, template: str, messages: Sequence[Message], tools: Any, prompt: bool, marked: bool) -> Any:
        rendered, spans = self._process.render(
            template,
            self.date,
            conversations=[list(messages)],
            tools=tools,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marked,
            **self.tokenizer.special_tokens_map,
        )
        return (rendered[0], spans[0]) if marked else rendered[0]


@dataclass(frozen=True)
class _Chat:
    """Renders conversations with one template and the tools of one sample. Raises ValueError where the template
    refuses."""

    apply: Callable[..., Any]
    template: str
    tools: list[dict[str, Any]] | None
    as_parts: bool

    def given(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template takes them."""
        return in_parts(messages) if self.as_parts else list(messages)

    def text(self, messages: Sequence[Message], prompt: bool = False) -> str:
        return self._rendered(messages, prompt, False)

    def marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text with its generation spans."""
        text, spans = self._rendered(messages, False, True)
        return text, [(start, stop) for start, stop in spans]

    def _rendered(self, messages: Sequence[Message], prompt: bool, marked: bool) -> Any:
        try:
            return self.apply(self.template, self.given(messages), self.tools, prompt, marked)
        except TemplateRefused as error:
            raise ValueError(f"the chat template refuses this conversation ({error})") from error


def prefix_spans(messages: Sequence[Message], whole: str, render: Render) -> list[tuple[int, int]] | None:
    """What each assistant turn adds to the rendering of the turns before it; None where the template renders earlier
    turns otherwise, or where the assistant speaks first and nothing is there to compare with.

    A turn's span begins where the rendering with it and that of a generation prompt part (a prompt that opens a thought
    parts from a turn without one), and ends where the rendering up to it ends. That rendering must be a prefix of the
    whole conversation, and the turns before it a prefix of that.
    """
    spans: list[tuple[int, int]] = []
    if messages[0]["role"] == "assistant":
        return None
    try:
        for number, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            upto = render(messages[: number + 1])
            prompt = render(messages[:number], prompt=True)
            nests = upto.startswith(prompt)
            before = prompt if nests else render(messages[:number])
            if not whole.startswith(upto) or not upto.startswith(before):
                return None
            start = len(before) + (0 if nests else shared_length(prompt.removeprefix(before), upto[len(before) :]))
            if messages[number - 1]["role"] != "user":  # some prompts add nothing behind a tool's answer
                header = opening(messages, render)
                start += len(header) if upto.startswith(header, start) else 0
            spans.append((start, len(upto)))
    except TemplateStopped:
        raise
    except ValueError:
        return None  # conversations that end there are refused
    return spans


def read_template(path: str | None, recipe_directory: Path) -> str | None:
    """The text of the recipe's `chat_template`, if it has one. Raises UnusableError where the file cannot be read."""
    if path is None:
        return None
    file = local_path(path, recipe_directory)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableError(
            f"calibration.chat_template: {file} cannot be read ({type(error).__name__}). "
            "Paths start from the recipe's folder."
        ) from None
