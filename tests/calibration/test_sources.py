"""Sources: which rows they hold, the order in which they are tried, and the error that each kind of bad data ends
in."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from reapkit.calibration import tables
from reapkit.calibration.builtin import generators
from reapkit.calibration.encoder import format_of
from reapkit.calibration.prepare import prepare
from reapkit.calibration.sources import PACK_START, Walk, open_walk, permutation
from reapkit.core.errors import UnusableError
from reapkit.recipe.schema import MixEntry, TextFormat
from tests.support.words import spec, word_tokenizer, write_lines

ROWS = [
    {"text": f"row number {number} of the file", "domain": "code" if number % 3 else "prose"} for number in range(30)
]


def entry(source: str | Path, **fields: object) -> MixEntry:
    return MixEntry.model_validate({"name": "data", "source": str(source), **fields}, strict=False)


def texts(walk: Walk) -> list[str]:
    return [row["text"] for row in walk.read(range(walk.length))]


def in_order(walk: Walk) -> list[str]:
    return [text for _, text in sorted(zip(walk.numbers.tolist(), texts(walk), strict=True))]


def test_jsonl_lines_blank_ones_apart(tmp_path: Path) -> None:
    write_lines(tmp_path / "data.jsonl", [ROWS[0], "", ROWS[1], "   ", ROWS[2]])
    walk = open_walk(entry("data.jsonl"), tmp_path, seed=1)
    assert in_order(walk) == [row["text"] for row in ROWS[:3]]
    assert [walk.rows.place(number) for number in range(3)] == ["data.jsonl:1", "data.jsonl:3", "data.jsonl:5"]


def test_json_array_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=1))
    write_lines(tmp_path / "lines.json", ROWS)
    assert in_order(open_walk(entry("array.json"), tmp_path, seed=1)) == in_order(
        open_walk(entry("lines.json"), tmp_path, seed=1)
    )


def test_text_files_are_lines_and_others_documents(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("first line\n\nsecond line\r\n")
    (tmp_path / "a.md").write_text("# Title\n\nText\n")
    (tmp_path / "b.md").write_text("other")
    assert in_order(open_walk(entry("notes.txt"), tmp_path, seed=1)) == ["first line", "second line"]
    assert in_order(open_walk(entry("*.md"), tmp_path, seed=1)) == ["# Title\n\nText\n", "other"]


def test_globs_join_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write_lines(tmp_path / "deep" / "b.jsonl", ROWS[5:8])
    write_lines(tmp_path / "a.jsonl", ROWS[:5])
    walk = open_walk(entry("**/*.jsonl"), tmp_path, seed=1)
    assert in_order(walk) == [row["text"] for row in ROWS[:8]]
    assert walk.rows.place(6) == "b.jsonl:2"


def test_parquet(tmp_path: Path) -> None:
    for number, part in enumerate((ROWS[:12], ROWS[12:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"part-{number}.parquet")
    walk = open_walk(entry("part-*.parquet"), tmp_path, seed=1)
    assert in_order(walk) == [row["text"] for row in ROWS]


def dataset_directory(path: Path) -> Path:
    """A dataset in the hub's layout, with two splits."""
    (path / "data").mkdir(parents=True)
    for split, rows in (("train", ROWS), ("tool", ROWS[:4])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path / "data" / f"{split}-00000-of-00001.parquet")
    return path


def test_hub_layout_with_splits(tmp_path: Path) -> None:
    dataset_directory(tmp_path / "set")
    assert in_order(open_walk(entry("set"), tmp_path, seed=1)) == [row["text"] for row in ROWS]
    assert in_order(open_walk(entry("set", split="tool"), tmp_path, seed=1)) == [row["text"] for row in ROWS[:4]]


def test_large_datasets_are_streamed_in_a_seeded_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "STREAM_ABOVE_BYTES", 0)
    dataset_directory(tmp_path / "set")

    def streamed(seed: int, **fields: object) -> list[str]:
        walk = open_walk(entry("set", **fields), tmp_path, seed=seed)
        assert walk.length is None and walk.order.startswith("stream")
        return [row["text"] for row in walk.read(range(10)) + walk.read(range(10, 40))]

    first = streamed(1)
    assert first == streamed(1) != streamed(2)
    assert sorted(first) == sorted(row["text"] for row in ROWS)
    assert sorted(streamed(1, filter={"domain": "prose"})) == sorted(row["text"] for row in ROWS[::3])


def test_an_unknown_split_names_the_source(tmp_path: Path) -> None:
    dataset_directory(tmp_path / "set")
    with pytest.raises(
        UnusableError, match=r"source 'data': .*split nowhere\) cannot be opened: .*Check the name, config and split"
    ):
        open_walk(entry("set", split="nowhere"), tmp_path, seed=1)


def test_filter_keeps_rows_by_value_or_list_of_values(tmp_path: Path) -> None:
    write_lines(tmp_path / "data.jsonl", ROWS)
    assert in_order(open_walk(entry("data.jsonl", filter={"domain": "prose"}), tmp_path, seed=1)) == [
        row["text"] for row in ROWS[::3]
    ]
    assert len(texts(open_walk(entry("data.jsonl", filter={"domain": ["prose", "code"]}), tmp_path, seed=1))) == 30
    with pytest.raises(UnusableError, match=r"source 'data': none of 30 rows passes the filter \{'domain': 'math'\}"):
        open_walk(entry("data.jsonl", filter={"domain": "math"}), tmp_path, seed=1)
    with pytest.raises(
        UnusableError,
        match=r"source 'data', data\.jsonl:1: the filter's column 'topic' is missing; the row has text, domain",
    ):
        open_walk(entry("data.jsonl", filter={"topic": "math"}), tmp_path, seed=1)


def test_builtin_rows_come_from_their_generator() -> None:
    walk = open_walk(entry("builtin:tools"), Path("."), seed=7)
    expected = list(itertools.islice(generators.generate("tools", seed=7), 5))
    assert walk.read([0, 1, 2]) + walk.read([4, 3]) == [*expected[:3], expected[4], expected[3]]
    held_out = open_walk(entry("builtin:tools"), Path("."), seed=7, held_out=True)
    assert held_out.read([0]) == [next(generators.generate("tools", seed=7, start=PACK_START))]
    with pytest.raises(UnusableError, match="nothing"):
        open_walk(entry("builtin:nothing"), Path("."), seed=7)


def test_permutation_is_pinned() -> None:
    """The same on every machine and version: recipes' indices are stored and compared."""
    pinned = [0, 9, 2, 7, 3, 6, 8, 5, 1, 4]
    assert permutation(10, 42, "code").tolist() == pinned
    assert permutation(10, 43, "code").tolist() != pinned
    assert permutation(10, 42, "tools").tolist() != pinned
    assert sorted(permutation(1000, 1, "x").tolist()) == list(range(1000))


def test_held_out_rows_are_drawn_from_the_other_end(tmp_path: Path) -> None:
    write_lines(tmp_path / "data.jsonl", ROWS)
    front, back = (
        open_walk(entry("data.jsonl"), tmp_path, seed=3, held_out=held_out).numbers for held_out in (False, True)
    )
    assert np.array_equal(front[::-1], back)


def prepared(directory: Path, source: str, **fields: object) -> dict:
    word_tokenizer(directory / "tokenizer", ["row number of the file"])
    return prepare(
        spec({"name": "data", "source": source}, **{"samples": 20, "packing": "none", **fields}),
        directory / "tokenizer",
        directory,
        directory / "out",
    )


class TestBadData:
    """Each ends in one error that names source and row, where more rows are bad than may be dropped."""

    def test_broken_json_in_row_17(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "data.jsonl", [*ROWS[:16], '{"text": "unfinished', *ROWS[16:19]])
        with pytest.raises(
            UnusableError,
            match=(
                r"^source 'data': 1 of 20 rows cannot be used, but calibration.max_dropped allows 1.00%\. The first of"
                r" them:\n  data\.jsonl:17: invalid JSON \(Unterminated string .*\)\. Every line must"
            ),
        ):
            prepared(tmp_path, "data.jsonl")

    def test_a_column_of_none(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "data.jsonl", [{"text": None}] * 20)
        with pytest.raises(
            UnusableError,
            match=(
                r"^source 'data' yields 0 of 20 samples: 20 rows were read, dropped: 20 empty \(first:"
                r" data.jsonl:\d+\). "
                r"Give it more data, a smaller weight, or lower calibration.samples.$"
            ),
        ):
            prepared(tmp_path, "data.jsonl")

    def test_a_missing_column(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "data.jsonl", [*ROWS[:19], {"body": "x"}])
        with pytest.raises(
            UnusableError,
            match=(
                r"^source 'data': 1 of 20 rows cannot be used, but calibration.max_dropped allows 1.00%\. The first of"
                r" them:\n  data\.jsonl:20: column 'text' is missing; the row has body\n"
            ),
        ):
            prepared(tmp_path, "data.jsonl")

    def test_one_huge_sample(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "data.jsonl", [*ROWS[:19], {"text": "word " * (20 << 20)}])
        with pytest.raises(
            UnusableError,
            match=(
                r"^source 'data': 1 of 20 rows cannot be used, but calibration.max_dropped allows 1.00%\. The first of"
                r" them:\n  data\.jsonl:20: one sample has more than 8,388,608 bytes; the limit is 8,388,608\."
            ),
        ):
            prepared(tmp_path, "data.jsonl")

    def test_a_huge_document(self, tmp_path: Path) -> None:
        (tmp_path / "book.md").write_text("word " * (2 << 20))
        with pytest.raises(UnusableError, match=r"^source 'data', book\.md: one sample has 10,485,760 bytes"):
            prepared(tmp_path, "book.md")

    def test_invalid_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "data.jsonl").write_bytes(
            b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[:19]) + b'{"text": "caf\xe9"}\n'
        )
        with pytest.raises(
            UnusableError,
            match=(
                r"^source 'data': 1 of 20 rows cannot be used, but calibration.max_dropped allows 1.00%\. The first of"
                r" them:\n  data\.jsonl:20: not UTF-8 at byte 13 \(0xe9\)\."
            ),
        ):
            prepared(tmp_path, "data.jsonl")

    def test_messages_without_roles(self, tmp_path: Path) -> None:
        good = [{"messages": [{"role": "user", "content": f"row number {number}"}]} for number in range(19)]
        write_lines(tmp_path / "data.jsonl", [*good, {"messages": [{"content": "row"}]}])
        with pytest.raises(
            UnusableError,
            match=(
                r"^source 'data': 1 of 20 rows cannot be used, but calibration.max_dropped allows 1.00%\. The first of"
                r" them:\n  data\.jsonl:20: turn 1 has no role; it has content\n"
            ),
        ):
            (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
            prepared(tmp_path, "data.jsonl", chat_template="chat.jinja")

    def test_half_a_surrogate_pair(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "data.jsonl", [*ROWS[:19], '{"text": "broken emoji \\ud83d"}'])
        with pytest.raises(
            UnusableError,
            match=(
                r"^source 'data': 1 of 20 rows cannot be used, but calibration.max_dropped allows 1.00%\. The first of"
                r" them:\n  data\.jsonl:20: half of a surrogate pair"
            ),
        ):
            prepared(tmp_path, "data.jsonl")

    def test_few_are_dropped_and_counted_by_reason(self, tmp_path: Path) -> None:
        rows = [{"text": f"row number {number}"} for number in range(30)]
        write_lines(tmp_path / "data.jsonl", [*rows, '{"text": "unfinished', {"text": 3}, {"text": 4}])
        summary = prepared(tmp_path, "data.jsonl", samples=30, max_dropped=0.1)
        dropped = summary["sources"][0]["dropped"]
        assert {reason: found["count"] for reason, found in dropped.items()} == {
            "unusable: invalid JSON": 1,
            "unusable: column 'text' holds int, not text": 2,
        }

    def test_whether_a_run_ends_does_not_depend_on_the_draw(self, tmp_path: Path) -> None:
        """The first row of the walk tells the format; where it is bad, another one does."""
        rows = [{"text": f"row number {number}"} for number in range(150)]
        write_lines(tmp_path / "data.jsonl", [*rows, "{"])
        for seed in range(151):
            calibration = spec({"name": "data", "source": "data.jsonl"}, samples=150, seed=seed)
            walk = open_walk(calibration.mix[0], tmp_path, seed=seed)
            assert format_of(calibration.mix[0], walk) == TextFormat(text="text")
        assert prepared(tmp_path, "data.jsonl", samples=150)["sources"][0]["samples"] == 150

    def test_deeply_nested_json(self, tmp_path: Path) -> None:
        rows = [{"messages": [{"role": "user", "content": f"row number {number}"}]} for number in range(19)]
        deep = '{"messages": [{"role": "user", "content": "row"}], "tools": ' + "[" * 100_000 + "]" * 100_000 + "}"
        write_lines(tmp_path / "data.jsonl", [*rows, deep])
        (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
        with pytest.raises(UnusableError, match=r"1 of 20 rows cannot be used(.|\n)*data\.jsonl:20: invalid JSON"):
            prepared(tmp_path, "data.jsonl", chat_template="chat.jinja", score="all")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UnusableError, match="'data': no file matches"):
            prepared(tmp_path, "./nothing.jsonl")

    def test_an_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "data.jsonl").write_text("")
        with pytest.raises(UnusableError, match=r"^source 'data': data\.jsonl has no rows\. Give a source with rows"):
            prepared(tmp_path, "data.jsonl")

    def test_a_template_that_refuses(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "data.jsonl", [{"messages": [{"role": "assistant", "content": "row number of"}]}] * 20)
        (tmp_path / "chat.jinja").write_text("{{ raise_exception('roles must alternate') }}")
        with pytest.raises(
            UnusableError, match=r"the chat template refuses this conversation \(TemplateError: roles must alternate\)"
        ):
            prepared(tmp_path, "data.jsonl", chat_template="chat.jinja")


def test_filter_of_a_table_reads_its_columns_only(tmp_path: Path) -> None:
    dataset_directory(tmp_path / "set")
    assert in_order(open_walk(entry("set", filter={"domain": "prose"}), tmp_path, seed=1)) == [
        row["text"] for row in ROWS[::3]
    ]
    with pytest.raises(
        UnusableError,
        match="source 'data', set row 0: the filter's column 'topic' is missing; the row has text, domain",
    ):
        open_walk(entry("set", filter={"topic": "x"}), tmp_path, seed=1)


def test_the_hubs_commit_is_read_from_its_file_addresses() -> None:
    address = f"hf://datasets/org/name@{'0a' * 20}/data/train.parquet"
    builder = SimpleNamespace(config=SimpleNamespace(data_files={"train": [address]}))
    assert tables._commit(builder, entry("org/name")) == "0a" * 20
    builder = SimpleNamespace(config=SimpleNamespace(data_files=None))
    assert tables._commit(builder, entry("org/name", revision="main")) == "main"
