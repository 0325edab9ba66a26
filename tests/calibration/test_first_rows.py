"""What is wrong with local data is said by `validate` and `plan`, with its place and the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reapkit.calibration.first_rows import first_row_problems
from reapkit.recipe.schema import MixEntry
from tests.support.command import command

CHAT = {"messages": [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]}
RECIPE = """
version: 1
name: t
model: builtin:demo
calibration:
  samples: 8
  mix:
    - {name: a, source: data/chats.jsonl}
    - {name: b, source: train.jsonl}
    - {name: c, source: data/missing/*.parquet}
    - {name: d, source: data/empty.jsonl}
    - {name: e, source: data/chats.jsonl, format: {prompt: question, completion: answer}}
    - {name: f, source: data/chats.jsonl, filter: {language: en}}
prune: {ratio: 0.5, bogus: 1}
quantize: {group_size: 64}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    (data / "chats.jsonl").write_text("\n" + json.dumps(CHAT) + "\n")
    (data / "empty.jsonl").write_text("\n \n")
    (data / "broken.jsonl").write_text("{'a': 1}\n")
    (data / "list.jsonl").write_text("[1]\n")
    (data / "notes.txt").write_text("a note\n")
    (data / "latin.txt").write_bytes("\xe9t\xe9 \xe0 Paris\n".encode("latin-1"))
    (data / "array.json").write_text(json.dumps([CHAT]))
    (data / "essay.md").write_text("words")
    pq.write_table(pa.table({"text": ["words"]}), data / "rows.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), data / "none.parquet")
    (data / "fake.parquet").write_text("no table")
    return tmp_path


def said(folder: Path, source: str, **settings: object) -> list[tuple[str, str]]:
    entry = MixEntry.model_validate({"name": "s", "source": source, **settings}, strict=False)
    return [(problem.path, problem.message) for problem in first_row_problems(entry, "mix[0]", folder)]


@pytest.mark.parametrize(
    "source",
    [
        *("builtin:code", "org/name", "hf://datasets/org/name/train.parquet", "data"),
        *("data/chats.jsonl", "data/*.parquet", "data/notes.txt", "data/array.json", "data/essay.md"),
    ],
)
def test_what_can_be_read_and_what_only_the_hub_knows_is_let_through(folder: Path, source: str) -> None:
    for name in ("none.parquet", "fake.parquet"):
        (folder / "data" / name).unlink()
    assert said(folder, source) == []


@pytest.mark.parametrize(
    ("source", "settings", "path", "message"),
    [
        (
            "data/chat.jsonl",
            {},
            "mix[0].source",
            "found 'data/chat.jsonl', but the file does not exist (looked in {folder}/data). Did you mean"
            " 'chats.jsonl'? Paths start from the recipe's folder.",
        ),
        (
            "dat/chats.jsonl",
            {},
            "mix[0].source",
            "found 'dat/chats.jsonl', but the file does not exist (looked in {folder}). Did you mean 'data'?"
            " Paths start from the recipe's folder.",
        ),
        (
            "data/a/b.c",
            {},
            "mix[0].source",
            "found 'data/a/b.c', but the file does not exist (looked in {folder}/data). Paths start from the recipe's"
            " folder.",
        ),
        (
            "data/*.jsonx",
            {},
            "mix[0].source",
            "found 'data/*.jsonx', but no file matches this pattern (looked in {folder}/data). Paths start from the"
            " recipe's folder.",
        ),
        (
            "data/empty.jsonl",
            {},
            "mix[0].source",
            "empty.jsonl has no rows. Give a file with rows, or remove this source.",
        ),
        (
            "data/none.parquet",
            {},
            "mix[0].source",
            "none.parquet has no rows. Give a file with rows, or remove this source.",
        ),
        (
            "data/list.jsonl",
            {},
            "mix[0].source",
            "list.jsonl: the first line is list, not an object. Give a file of rows that can be read.",
        ),
        (
            "data/chats.jsonl",
            {"format": {"prompt": "q", "completion": "a"}},
            "mix[0].format",
            "chats.jsonl, first row: column 'q' is missing; the row has messages.",
        ),
        (
            "data/chats.jsonl",
            {"filter": {"lang": "en"}},
            "mix[0].filter.lang",
            "chats.jsonl has no column 'lang'; its first row has messages. Filter by one of these.",
        ),
    ],
)
def test_each_kind_is_named(folder: Path, source: str, settings: dict, path: str, message: str) -> None:
    assert said(folder, source, **settings) == [(path, message.format(folder=folder))]


@pytest.mark.parametrize("source", ["data/broken.jsonl", "data/latin.txt", "data/fake.parquet"])
def test_files_that_are_not_what_their_name_says(folder: Path, source: str) -> None:
    [(path, message)] = said(folder, source)
    assert path == "mix[0].source" and message.startswith(f"{Path(source).name}: ")
    assert message.endswith(" Give a file of rows that can be read.")


@pytest.mark.parametrize("name", ["validate", "plan"])
def test_all_sources_are_checked_in_the_round_of_everything_else(folder: Path, name: str, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "r.yaml").write_text(RECIPE)
    done = command(name, "r.yaml")
    assert done.code == 2
    assert [line.split()[1].rstrip(":") for line in done.stderr.splitlines()] == [
        "calibration.mix[1].source",
        "calibration.mix[2].source",
        "calibration.mix[3].source",
        "calibration.mix[4].format",
        "calibration.mix[5].filter.language",
        "prune.bogus",
    ]


def test_a_large_file_costs_nothing(folder: Path) -> None:
    """Only the first row is read: a file of a terabyte, most of it holes, is looked at in no time."""
    with (folder / "data" / "chats.jsonl").open("r+b") as file:
        file.truncate(1 << 40)
    assert said(folder, "data/chats.jsonl") == []
