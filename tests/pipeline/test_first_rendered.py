"""A chat template that refuses the data, hides it or cannot mark it is told by `validate` and `plan`, with the rest."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reapkit.calibration import first_rendered
from reapkit.core.errors import RecipeError
from reapkit.pipeline.planned import load_and_plan
from tests.support.command import command
from tests.support.words import CHATML, write_lines

CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": "Paris"}}}
CHAT = [{"role": "user", "content": "how is the weather"}, {"role": "assistant", "content": "it is fine in Paris"}]
CALLS = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
WITHOUT_CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + (m.content or '') + '<|im_end|>' }}{% endfor %}"
)
STRICT = "{% if messages[0].role != 'system' %}{{ raise_exception('say who you are') }}{% endif %}" + CHATML
SILENT = "{% for m in messages %}{{ m.role }}{% endfor %}"
LOUD = "{% for m in messages %}{{ m.role + ': ' + (m.content or '') | upper }}{% endfor %}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(chats: Sequence[Sequence[Mapping[str, Any]]], template: str | None = None, calibration: str = "") -> None:
    write_lines(Path("d.jsonl"), [{"messages": list(chat)} for chat in chats])
    if template is not None:
        Path("own.jinja").write_text(template)
        calibration += "\n  chat_template: own.jinja"
    Path("r.yaml").write_text(
        f"version: 1\nname: mine\nmodel: {{source: 'builtin:demo'}}\ncalibration:\n  samples: 8\n{calibration}\n"
        "  mix: [{name: d, source: d.jsonl}]\nprune: {ratio: 0.5}\nquantize: {group_size: 64}\n"
    )


def told(*overrides: str) -> list[str]:
    try:
        load_and_plan("r.yaml", overrides)
    except RecipeError as error:
        return [f"{problem.path} {problem.message}" for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("chats", "template", "calibration", "wanted"),
    [
        ([CHAT], None, "", None),
        ([CHAT], CHATML, "", None),
        ([CALLS], None, "", None),
        ([CALLS], WITHOUT_CALLS, "", "does not show the call of 'look' in turn 2"),
        ([CHAT], STRICT, "", "none of its first rows can be rendered. The first: the chat template refuses"),
        ([CHAT] * 70, STRICT, "", "say who you are"),
        ([CHAT, [{"role": "system", "content": "a helper"}, *CHAT]], STRICT, "", None),  # one row of two renders
        ([CHAT], SILENT, "", "the chat template does not show what turn 1 says"),
        ([CHAT], LOUD, "", "the chat template does not show what turn 1 says"),
        ([CHAT], "{{ nothing.at.all }}", "", "UndefinedError"),
        (
            [CHAT],
            CHATML,
            "  spans: {start: '<|model|>', end: '<|im_end|>'}",
            "nothing in its first rows stands between",
        ),
        ([CHAT], CHATML, "  spans: {start: '<|im_start|> assistant', end: '<|im_end|>'}", None),
        ([CHAT], CHATML, "  spans: {start: '<|im_start|>', end: 'fine'}", "holds what another role says"),
        ([[CHAT[0]], CHAT], CHATML, "", None),  # a prompt alone is no fault of the template's
    ],
)
def test_what_a_template_does_to_the_data(
    chats: Sequence[Sequence[Mapping[str, Any]]], template: str | None, calibration: str, wanted: str | None
) -> None:
    recipe(chats, template, calibration)
    problems = told()
    if wanted is None:
        assert problems == []
    else:
        [problem] = problems
        assert problem.startswith("calibration.mix[0].source d.jsonl") and wanted in problem
        assert problem.endswith(".")


def test_it_is_told_with_everything_else_and_with_its_line() -> None:
    recipe([CHAT], STRICT)
    Path("r.yaml").write_text(Path("r.yaml").read_text().replace("ratio: 0.5", "ratio: 0.5, bogus: 1"))
    done = command("validate", "r.yaml")
    assert done.code == 2 and "prune.bogus" in done.stderr and "say who you are" in done.stderr
    assert "r.yaml:8:27 calibration.mix[0].source" in done.stderr.replace("\n", " ")
    for also in ("prune.ratio=0.99", "saliency.criterion=wrong"):
        recipe([CHAT], STRICT)
        problems = told(also)
        assert len(problems) == 2 and any("say who you are" in problem for problem in problems)


def test_rows_that_the_filter_leaves_out_are_not_rendered() -> None:
    recipe([CHAT], STRICT)
    system = {"role": "system", "content": "a helper"}
    rows = [{"messages": CHAT, "kind": "bare"}, {"messages": [system, *CHAT], "kind": "whole"}]
    write_lines(Path("d.jsonl"), rows)
    assert told("calibration.mix=[{name: d, source: d.jsonl, filter: {kind: whole}}]") == []
    assert told("calibration.mix=[{name: d, source: d.jsonl, filter: {kind: bare}}]")


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz", "arrow"])
def test_of_tables_and_packed_files_too(kind: str) -> None:
    recipe([CHAT], STRICT)
    table = pa.table({"messages": [CHAT] * 3})
    name = f"d.{kind}"
    if kind == "parquet":
        pq.write_table(table, name)
    elif kind == "arrow":
        with pa.OSFile(name, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        Path(name).write_bytes(gzip.compress((json.dumps({"messages": CHAT}) + "\n").encode()))
    [problem] = told(f"calibration.mix=[{{name: d, source: {name}}}]")
    assert "say who you are" in problem


def test_what_is_calibrated_already_is_not_rendered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    chats = [[{**CHAT[0], "content": f"how many are {number}"}, CHAT[1]] for number in range(20)]
    recipe(chats, CHATML, "  max_length: 64")
    small = ("evaluate.packs={samples: 2, lengths: [64]}",)
    assert command("apply", "r.yaml", "--until", "packs", "--set", *small).code == 0

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a row was rendered")

    monkeypatch.setattr(first_rendered, "rendering_problems", never)
    assert load_and_plan("r.yaml", small).stage("calibrate").artifact
    with pytest.raises(AssertionError, match="rendered"):
        load_and_plan("r.yaml", ("calibration.samples=4", *small))
    load_and_plan("demo")  # packaged rows in the packaged model's template are known to fit
