"""Files that people have: compressed, tables, saved folders, names with brackets, byte order marks, parts of splits.
The expected rows are written out."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reapkit.calibration.first_rows import first_row_problems
from reapkit.calibration.sources import open_walk
from reapkit.core.errors import UnusableError
from reapkit.recipe.schema import MixEntry

ROWS = [{"question": "Is 1 < 2?", "answer": "NA"}, {"question": 'A "b", c', "answer": "two\nlines"}]
MORE = [{"text": f"row number {number}"} for number in range(30)]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def entry(source: str | Path, **fields: Any) -> MixEntry:
    return MixEntry.model_validate({"name": "data", "source": str(source), **fields}, strict=False)


def rows(folder: Path, source: str, **fields: Any) -> list[dict[str, Any]]:
    """A source's rows in the order of its files; nothing is said against them before the run."""
    assert first_row_problems(entry(source, **fields), "mix[0]", folder) == []
    walk = open_walk(entry(source, **fields), folder, seed=1)
    read = walk.read(range(walk.length))
    return [row for _, row in sorted(zip(walk.numbers.tolist(), read, strict=True), key=lambda pair: pair[0])]


def texts(folder: Path, source: str, **fields: Any) -> list[str]:
    return [row["text"] for row in rows(folder, source, **fields)]


def numbers(folder: Path, source: str, **fields: Any) -> list[int]:
    return [int(text.split()[-1]) for text in texts(folder, source, **fields)]


def refusal(folder: Path, source: str, **fields: Any) -> str:
    with pytest.raises(UnusableError) as error:
        open_walk(entry(source, **fields), folder, seed=1)
    return str(error.value)


def lines(of: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in of)


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstd,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
CSV = '\ufeffquestion,answer\r\nIs 1 < 2?,NA\r\n"A ""b"", c","two\nlines"\r\n'.encode()
CONTENTS = {
    "jsonl": lines(ROWS),
    "ndjson": lines(ROWS),
    "json": json.dumps(ROWS).encode(),
    "csv": CSV,
    "tsv": b'question\tanswer\nIs 1 < 2?\tNA\n"A ""b"", c"\t"two\nlines"\n',
}


@pytest.mark.parametrize("suffix", CONTENTS)
@pytest.mark.parametrize("packer", ["", *PACKERS])
def test_rows_are_the_same_in_every_file(suffix: str, packer: str, tmp_path: Path) -> None:
    """What is in a file is text as written: NA is no missing value, and no number is made of digits."""
    name = f"data.{suffix}.{packer}" if packer else f"data.{suffix}"
    (tmp_path / name).write_bytes(PACKERS[packer](CONTENTS[suffix]) if packer else CONTENTS[suffix])
    assert rows(tmp_path, name) == ROWS


def write_arrow(path: Path, of: list[dict[str, Any]], stream: bool) -> None:
    table = pa.Table.from_pylist(of)
    with (
        pa.OSFile(str(path), "wb") as sink,
        (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as to,
    ):
        to.write_table(table)


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files(stream: bool, tmp_path: Path) -> None:
    write_arrow(tmp_path / "data.arrow", ROWS, stream)
    assert rows(tmp_path, "data.arrow") == ROWS


def test_packed_tables(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "plain.parquet")
    write_arrow(tmp_path / "plain.arrow", ROWS, stream=True)
    for kind in ("parquet", "arrow"):
        (tmp_path / f"data.{kind}.gz").write_bytes(gzip.compress((tmp_path / f"plain.{kind}").read_bytes()))
        assert rows(tmp_path, f"data.{kind}.gz") == ROWS


@pytest.mark.parametrize("name", ["DATA.JSONL", "Data.Csv", "data.JSONL.GZ", "DATA.PARQUET"])
def test_suffixes_in_upper_case(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("PARQUET"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        kind = name.lower().split(".")[1]
        path.write_bytes(gzip.compress(CONTENTS[kind]) if name.endswith("GZ") else CONTENTS[kind])
    assert rows(tmp_path, name) == ROWS
    path.unlink()
    [problem] = first_row_problems(entry(name), "mix[0]", tmp_path)  # a file's name all the same, never a hub id
    assert problem.message.startswith(f"found '{name}', but the file does not exist")


def test_names_with_brackets(tmp_path: Path) -> None:
    for name, text in (("notes[1].txt", "brackets"), ("notes1.txt", "one"), ("notes2.txt", "two")):
        (tmp_path / name).write_text(text)
    assert texts(tmp_path, "notes[1].txt") == ["brackets"]  # it is there
    assert texts(tmp_path, "notes[12].txt") == ["one", "two"]  # it is not, so it is a pattern
    folder = tmp_path / "runs [old]"
    folder.mkdir()
    (folder / "a.txt").write_text("inside")
    pq.write_table(pa.table({"text": ["table"]}), folder / "b[2].parquet")
    assert texts(tmp_path, "runs [old]/*.txt") == texts(folder, "*.txt") == ["inside"]
    assert texts(folder, "b[2].parquet") == texts(folder, "*.parquet") == ["table"]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "lines.json", "data.txt", "data.md", "data.csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(name: str, tmp_path: Path) -> None:
    kind = name.split(".")[1]
    content = {"txt": b"hello there", "md": b"hello there", "csv": b"text\nhello there\n"}.get(kind)
    content = content or (b'[{"text": "hello there"}]' if name == "data.json" else b'{"text": "hello there"}\n')
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert rows(tmp_path, name) == [{"text": "hello there"}]


def test_byte_order_marks_of_files_that_were_joined(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbf\n\xef\xbb\xbftwo\n")
    assert texts(tmp_path, "a.txt") == ["one", "two"]


def test_files_whose_columns_differ(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "id": [1]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"text": ["b"], "id": ["x"]}), tmp_path / "2.parquet")
    pq.write_table(pa.table({"id": ["y"], "text": ["c"]}), tmp_path / "3.parquet")
    (tmp_path / "4.csv").write_text("text,url\nd,e\n")
    (tmp_path / "5.jsonl").write_text('{"text": "f", "meta": {"k": null}}\n')
    assert rows(tmp_path, "[1-5].*") == [
        {"text": "a", "id": 1},
        {"text": "b", "id": "x"},
        {"id": "y", "text": "c"},
        {"text": "d", "url": "e"},
        {"text": "f", "meta": {"k": None}},
    ]


def test_tables_with_the_same_columns_are_one(tmp_path: Path) -> None:
    for part in range(3):
        pq.write_table(pa.Table.from_pylist(MORE[part * 10 : part * 10 + 10]), tmp_path / f"{part}.parquet")
    assert numbers(tmp_path, "*.parquet") == list(range(30))
    assert open_walk(entry("*.parquet"), tmp_path, seed=1).rows.place(12) == "3 parquet files row 12"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of save_to_disk (one split and two), one in the hub's layout, and a file."""
    folder = tmp_path_factory.mktemp("saved")
    train = datasets.Dataset.from_list(MORE)
    train.save_to_disk(str(folder / "one"), num_shards=2)
    both = datasets.DatasetDict({"train": train, "test": datasets.Dataset.from_list(MORE[:4])})
    both.save_to_disk(str(folder / "two"))
    (folder / "layout" / "data").mkdir(parents=True)
    for split, of in (("train", MORE), ("test", MORE[:4])):
        pq.write_table(pa.Table.from_pylist(of), folder / "layout" / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "data.jsonl").write_bytes(lines(MORE))
    pq.write_table(pa.Table.from_pylist(MORE), folder / "data.parquet")
    return folder


EVERY = ["one", "two", "layout", "data.jsonl", "data.parquet"]


@pytest.mark.parametrize("source", EVERY)
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(30)),
        ("train[:10]", range(10)),
        ("train[:10%]", range(3)),
        ("train[50%:]", range(15, 30)),
        ("train[-2:]", range(28, 30)),
        ("train[:2]+train[10:12]", [0, 1, 10, 11]),
    ],
)
def test_parts_of_a_split(saved: Path, source: str, split: str, expected: list[int]) -> None:
    assert numbers(saved, source, split=split) == list(expected)


@pytest.mark.parametrize("source", ["two", "layout"])
def test_other_splits_and_sums(saved: Path, source: str) -> None:
    assert numbers(saved, source, split="test") == [0, 1, 2, 3]
    assert numbers(saved, source, split="train[:2]+test[2:]") == [0, 1, 2, 3]


def test_a_part_is_taken_before_the_filter(saved: Path) -> None:
    kept = {"text": {"matches": "[05]$"}}
    assert numbers(saved, "data.jsonl", split="train[:50%]", filter=kept) == [0, 5, 10]
    assert numbers(saved, "one", split="train[:50%]", filter=kept) == [0, 5, 10]


@pytest.mark.parametrize(
    ("source", "fields", "field", "message"),
    [
        (
            "data.jsonl",
            {"split": "test"},
            "split",
            "'test', but files have no splits: all their rows are 'train'. Write train, or a part of it such as"
            " train[:1000].",
        ),
        (
            "data.parquet",
            {"split": "train+test"},
            "split",
            "'train+test', but files have no splits: all their rows are 'train'. Write train, or a part of it such as"
            " train[:1000].",
        ),
        ("data.jsonl", {"config": "en"}, "config", "'en', but files have no configurations. Remove it."),
        (
            "two",
            {"config": "en"},
            "config",
            "'en', but a folder that save_to_disk wrote has no configurations. Remove it.",
        ),
        (
            "two",
            {"split": "validation"},
            "split",
            "'validation', but the folder has the splits train, test. Choose among them.",
        ),
        ("one", {"split": "test"}, "split", "'test', but the folder has the splits train. Choose among them."),
        ("layout", {"revision": "main"}, "revision", "'main', but only datasets on the hub have revisions. Remove it."),
    ],
)
def test_fields_that_mean_nothing_are_refused(
    saved: Path, source: str, fields: dict[str, str], field: str, message: str
) -> None:
    [problem] = first_row_problems(entry(source, **fields), "mix[0]", saved)
    assert (problem.path, problem.message) == (f"mix[0].{field}", f"found {message}")
    assert refusal(saved, source, **fields) == f"source 'data': {field}: {message}"


@pytest.mark.parametrize("source", EVERY)
def test_the_first_row_is_looked_at_before_anything_runs(saved: Path, source: str) -> None:
    wrong = entry(source, format={"prompt": "q", "completion": "a"})
    problems = first_row_problems(wrong, "mix[0]", saved)
    assert [problem.path for problem in problems] == ([] if source == "layout" else ["mix[0].format"])


def test_large_datasets_are_streamed_in_parts(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert numbers(saved, "layout") == list(range(30))
    monkeypatch.setattr("reapkit.calibration.tables.STREAM_ABOVE_BYTES", 0)

    def streamed(split: str) -> list[int]:
        walk = open_walk(entry("layout", split=split), saved, seed=1)
        assert walk.order.startswith("stream")
        return sorted(int(row["text"].split()[-1]) for row in walk.read(range(100)))

    assert streamed("train[5:8]+test") == [0, 1, 2, 3, 5, 6, 7]
    assert streamed("train[25:]") == [25, 26, 27, 28, 29]
    assert streamed("train[:10%]") == [0, 1, 2]  # its size is known since it was read whole


def test_a_stream_of_unknown_size_has_no_per_cents(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("reapkit.calibration.tables.STREAM_ABOVE_BYTES", 0)
    shutil.copytree(saved / "layout", tmp_path / "layout")
    assert refusal(tmp_path, "layout", split="train[:10%]") == (
        "source 'data': split train[:10%]: layout is streamed and does not say how many rows 'train' has, so only"
        " numbers of rows from its start can be taken. Write train[:1000]."
    )


class TestDamaged:
    """Each error names source and file, and what is wrong with it."""

    @pytest.mark.parametrize("packer", PACKERS)
    def test_a_compressed_file_cut_short(self, packer: str, tmp_path: Path) -> None:
        name = f"data.jsonl.{packer}"
        packed = PACKERS[packer](lines([{"text": f"{number * 7919 % 10007}"} for number in range(3000)]))
        (tmp_path / name).write_bytes(packed[: len(packed) // 2])
        assert refusal(tmp_path, name).startswith(f"source 'data', {name}: cannot be unpacked (")

    @pytest.mark.parametrize("packer", PACKERS)
    def test_a_file_that_is_not_compressed(self, packer: str, tmp_path: Path) -> None:
        name = f"data.jsonl.{packer}"
        (tmp_path / name).write_bytes(lines(ROWS))
        assert refusal(tmp_path, name).startswith(f"source 'data', {name}: cannot be unpacked (")
        [problem] = first_row_problems(entry(name), "mix[0]", tmp_path)
        assert problem.path == "mix[0].source" and problem.message.startswith(f"{name}: cannot be unpacked (")

    @pytest.mark.parametrize("kind", ["parquet", "arrow"])
    def test_a_table_that_is_none(self, kind: str, tmp_path: Path) -> None:
        (tmp_path / f"data.{kind}").write_text("no table")
        said = f"data.{kind}: not {'an' if kind == 'arrow' else 'a'} {kind} file ("
        assert refusal(tmp_path, f"data.{kind}").startswith(f"source 'data', {said}")
        [problem] = first_row_problems(entry(f"data.{kind}"), "mix[0]", tmp_path)
        assert problem.message.startswith(said)

    def test_one_csv_of_several_has_a_row_that_is_too_long(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("question,answer\nq,a\n")
        (tmp_path / "b.csv").write_text("question,answer\nq,a\nq,a,more\n")
        said = refusal(tmp_path, "*.csv")
        assert said.startswith("source 'data', b.csv: DatasetGenerationError: ")
        assert "Caused by ParserError: " in said and "Expected 2 fields in line 3, saw 3" in said

    def test_a_folder_whose_files_differ_says_columns_and_file(self, tmp_path: Path) -> None:
        for number, column in enumerate(("text", "body")):
            pq.write_table(pa.table({column: ["x"]}), tmp_path / f"train-{number}.parquet")
        said = refusal(tmp_path.parent, tmp_path.name)
        assert "train-1.parquet" in said and "body" in said

    def test_a_table_damaged_inside_shows_the_cause(self, tmp_path: Path) -> None:
        pq.write_table(pa.Table.from_pylist(MORE * 100), tmp_path / "data.parquet", compression="none")
        content = bytearray((tmp_path / "data.parquet").read_bytes())
        content[4:60] = b"\xff" * 56
        (tmp_path / "data.parquet").write_bytes(content)
        said = refusal(tmp_path, "data.parquet")
        assert said.startswith("source 'data', data.parquet: ") and " Caused by " in said

    @pytest.mark.parametrize("name", ["data.csv", "data.parquet", "data.jsonl.gz"])
    def test_files_without_rows(self, name: str, tmp_path: Path) -> None:
        if name.endswith("parquet"):
            pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / name)
        else:
            (tmp_path / name).write_bytes(gzip.compress(b"\n") if name.endswith("gz") else b"text\n")
        [problem] = first_row_problems(entry(name), "mix[0]", tmp_path)
        assert problem.message == f"{name} has no rows. Give a file with rows, or remove this source."

    def test_text_that_is_not_utf8_is_never_told_to_be_converted_where_it_is_packed(self, tmp_path: Path) -> None:
        (tmp_path / "data.csv").write_bytes("text\ncafé\n".encode("latin-1"))
        assert refusal(tmp_path, "data.csv").startswith("source 'data', data.csv: ")
        (tmp_path / "data.bin").write_bytes(b"\x1f\x8b\x08\xff\xff")
        walk = open_walk(entry("data.bin"), tmp_path, seed=1)
        [error] = walk.read_each([0])
        assert str(error) == (
            "data.bin: not UTF-8 at byte 1 (0x8b). Save the file as UTF-8, or give it the suffix of what it holds:"
            " .jsonl, .ndjson, .json, .txt, .parquet, .csv, .tsv, .arrow, .gz, .zst, .bz2, .xz."
        )


def test_a_file_that_is_exchanged_under_its_old_time_is_read_anew(tmp_path: Path) -> None:
    """`datasets` keeps what it made of a path, size and time."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for source in ("d.csv", "d.parquet", "d.arrow", "folder"):
        for text in ("first words", "other words"):
            table = pa.table({"text": [text]})
            place = folder / "train.csv" if source == "folder" else tmp_path / source
            if source == "d.arrow":
                with pa.OSFile(str(place), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                    writer.write_table(table)
            elif source == "d.parquet":
                pq.write_table(table, place)
            else:
                place.write_text(f"text\n{text}\n")
            os.utime(place, (1e9, 1e9))
            found = MixEntry.model_validate({"name": "d", "source": source})
            assert [row["text"] for row in open_walk(found, tmp_path, seed=1).read([0])] == [text], source
