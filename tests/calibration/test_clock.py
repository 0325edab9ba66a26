"""Chat templates that read the clock see one date, whatever the day, and what they draw at random is the same each
time."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from reapkit.calibration import clock
from reapkit.calibration.clock import CLOCK, dated, reads_clock
from reapkit.calibration.prepare import prepare
from reapkit.calibration.template_process import TemplateProcess
from reapkit.calibration.tokens import CalibrationTokens
from reapkit.core.errors import UnusableError
from tests.support.words import CHATML, all_shown, spec, word_tokenizer, write_lines

TODAY = "{{ '<|system|> ' + strftime_now('%d %b %Y') + ' <|im_end|> ' }}" + CHATML
ROWS = [{"messages": [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "good day"}]}]
WORDS = ["hello there good day user assistant 03 04 Mar 2025 Jan 1999 01"]


@pytest.fixture(autouse=True)
def another_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the clock says must be seen nowhere."""

    class Wrong(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return cls(1999, 1, 1)

    monkeypatch.setattr(chat_template_utils, "datetime", Wrong)
    monkeypatch.setattr(clock, "today", lambda: "2025-03-03")


def made(directory: Path, template: str = TODAY, out: str = "out", **fields: Any) -> tuple[list[str], dict[str, Any]]:
    tokenizer = word_tokenizer(directory / "tokenizer", WORDS, template)
    write_lines(directory / "data.jsonl", ROWS)
    calibration = spec({"name": "chat", "source": "data.jsonl"}, packing="none", max_length=64, **fields)
    summary = prepare(calibration, directory / "tokenizer", directory, directory / out, work=directory / "work")
    return all_shown(CalibrationTokens.load(directory / out), tokenizer), summary


def row(date: str) -> str:
    return (
        f"<|system|> {date} <|im_end|> <|im_start|> user hello there <|im_end|> <|im_start|> assistant [good] [day]"
        " [<|im_end|>]"
    )


def test_a_template_sees_the_recipes_date_or_todays(tmp_path: Path) -> None:
    shown, summary = made(tmp_path, date="2025-03-04")
    assert (shown, summary["date"]) == ([row("04 Mar 2025")], "2025-03-04")
    shown, summary = made(tmp_path, out="again")  # out of the same cache, which must not hold the other date's tokens
    assert (shown, summary["date"]) == ([row("03 Mar 2025")], "2025-03-03")


def test_a_template_without_clock_has_no_date(tmp_path: Path) -> None:
    _, summary = made(tmp_path, CHATML, date="2025-03-04")
    assert "date" not in summary


@pytest.mark.parametrize(
    "file",
    ["chat_template.jinja", "additional_chat_templates/tool_use.jinja", "chat_template.json", "tokenizer_config.json"],
)
def test_every_place_of_a_template_is_looked_at(tmp_path: Path, file: str) -> None:
    calibration = spec({"name": "chat", "source": "data.jsonl"})
    assert not reads_clock(calibration, tmp_path, tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps({"chat_template": "{{ strftime_now('%Y') }}"}))
    assert reads_clock(calibration, tmp_path, tmp_path)
    (tmp_path / "own.jinja").write_text(CHATML)  # takes the place of all of them
    own = spec({"name": "chat", "source": "data.jsonl"}, chat_template="own.jinja", date="2025-03-04")
    assert not reads_clock(own, tmp_path, tmp_path) and dated(own, tmp_path, tmp_path).date is None


def test_a_clock_that_no_file_shows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "reads_clock", lambda *_: False)  # as for a tokenizer whose own code brings the template
    with pytest.raises(
        UnusableError, match=r"data.jsonl:1: the chat template reads the clock.*calibration\.chat_templ"
    ):
        made(tmp_path)


def test_what_a_template_draws_is_the_same_each_time() -> None:
    process = TemplateProcess()
    chats: dict[str, Any] = {"conversations": [[{"role": "user", "content": "hello"}]] * 2}
    drawn = [process.render("{{ range(99999) | random }} {{ lipsum(1) }}", **chats)[0] for _ in range(2)]
    process.close()
    assert drawn[0] == drawn[1]


def test_templates_are_given_no_other_way_to_the_time() -> None:
    compiled = chat_template_utils._compile_jinja_template("x")
    drawing = {"lipsum"}
    harmless = {"range", "dict", "cycler", "joiner", "namespace", "raise_exception"}
    assert set(compiled.environment.globals) == {CLOCK, *drawing, *harmless}
