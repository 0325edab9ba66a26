"""What a calibration's key is made of: whatever can change its rows changes it, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from reapkit.calibration import identity
from reapkit.calibration.builtin import generators
from reapkit.calibration.hub_files import HubAddress, hub_address
from reapkit.calibration.identity import pinned_entries, source_identity, template_identity, tokenizer_identity
from reapkit.calibration.sources import open_walk
from reapkit.checkpoint.hub import known_commit
from reapkit.checkpoint.locate import MODEL_DIRECTORY
from reapkit.core.errors import UnusableError
from reapkit.pipeline import publishing
from reapkit.pipeline.planned import make_plan
from reapkit.planning.lock import make_lock, revisions
from reapkit.recipe.loading import load
from reapkit.recipe.schema import MixEntry
from tests.support.command import command
from tests.support.fake_hub import COMMIT, Hub, Repository, reached, serve
from tests.support.words import write_lines

BESIDE = Path(generators.__file__).parent
MOVED = "beef" * 10


@pytest.mark.parametrize(
    "name", sorted(file.name for file in BESIDE.iterdir() if file.is_file() and file.name != "generators.py")
)
def test_every_file_of_the_generators_counts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(BESIDE, tmp_path / "builtin", ignore=shutil.ignore_patterns("__pycache__", "demo_model"))
    monkeypatch.setattr(generators, "__file__", str(copy / "generators.py"))
    before = identity._generators_identity.__wrapped__()
    with (copy / name).open("a") as file:
        file.write("\n")
    assert identity._generators_identity.__wrapped__() != before


TOKENIZER = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "entity_vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "bpe.codes", "normalizer.json", "dict.txt", "source.spm", "qwen.tiktoken", "tokenization_own.py"),
    *("helper.py", "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"),
]
OTHER = ["README.md", "model.safetensors", "generation_config.json", "original/params.json", "additional/rag.jinja"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    for name in (*TOKENIZER, *OTHER):
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(name)
    return tmp_path / "model"


@pytest.mark.parametrize("name", TOKENIZER)
def test_every_file_of_the_tokenizer_counts(name: str, tokenizer: Path) -> None:
    before = tokenizer_identity(tokenizer)
    (tokenizer / name).write_text("other")
    changed = tokenizer_identity(tokenizer)
    (tokenizer / name).unlink()
    assert before != changed != tokenizer_identity(tokenizer) != before


@pytest.mark.parametrize("name", OTHER)
def test_files_that_no_tokenizer_reads_do_not_count(name: str, tokenizer: Path) -> None:
    before = tokenizer_identity(tokenizer)
    (tokenizer / name).write_text("other")
    assert tokenizer_identity(tokenizer) == before


def test_code_alone_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "modeling_own.py").write_text("")
    assert tokenizer_identity(tmp_path) == {}


def test_the_recipes_own_template_counts(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("a")
    before = template_identity("chat.jinja", tmp_path)
    (tmp_path / "chat.jinja").write_text("b")
    assert template_identity("chat.jinja", tmp_path) != before is not None


def named(folder: Path, source: str, **fields: Any) -> dict[str, Any]:
    return source_identity(entry(source, **fields), folder)


def entry(source: str, **fields: Any) -> MixEntry:
    return MixEntry.model_validate({"name": "data", "source": source, **fields}, strict=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files of one name in several folders, a folder in the hub's layout, and what save_to_disk writes."""
    for folder in ("a", "b", "set/data", "set/.cache"):
        (tmp_path / folder).mkdir(parents=True)
        write_lines(tmp_path / folder / "train.jsonl", [{"text": f"row of {folder}"}])
    rows = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "saved"))
    rows.save_to_disk(str(tmp_path / "single"))
    return tmp_path


def rewrite(path: Path) -> None:
    """Another content of the same size and age."""
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def swap(folder: Path) -> None:
    (folder / "a/train.jsonl").rename(folder / "kept")
    (folder / "b/train.jsonl").rename(folder / "a/train.jsonl")
    (folder / "kept").rename(folder / "b/train.jsonl")


@pytest.mark.parametrize(
    ("source", "change"),
    [
        ("a/train.jsonl", lambda at: rewrite(at / "a/train.jsonl")),
        ("*/train.jsonl", lambda at: rewrite(at / "a/train.jsonl")),
        ("*/train.jsonl", lambda at: rewrite(at / "b/train.jsonl")),
        ("*/train.jsonl", swap),
        ("*/train.jsonl", lambda at: (at / "b/train.jsonl").unlink()),
        ("*/train.jsonl", lambda at: shutil.copytree(at / "a", at / "c")),
        ("set", lambda at: rewrite(at / "set/data/train.jsonl")),
        ("set", lambda at: (at / "set/data/train.jsonl").rename(at / "set/data/test.jsonl")),
        ("set", lambda at: (at / "set/README.md").write_text("---\nconfigs: []\n---\n")),
        ("saved", lambda at: rewrite(at / "saved/train/data-00000-of-00001.arrow")),
        ("saved", lambda at: rewrite(at / "saved/train/state.json")),
        ("single", lambda at: rewrite(at / "single/data-00000-of-00001.arrow")),
        ("single", lambda at: rewrite(at / "single/dataset_info.json")),
    ],
)
def test_every_byte_that_is_read_counts(source: str, change: Callable[[Path], Any], data: Path) -> None:
    before = named(data, source)
    change(data)
    assert named(data, source) != before


@pytest.mark.parametrize(
    ("source", "change"),
    [
        ("a/train.jsonl", lambda at: rewrite(at / "b/train.jsonl")),
        ("*/train.jsonl", lambda at: (at / "a/notes.txt").write_text("x")),
        ("*/train.jsonl", lambda at: os.utime(at / "a/train.jsonl", (1, 1))),
        ("set", lambda at: os.utime(at / "set/data/train.jsonl", (1, 1))),
        ("set", lambda at: rewrite(at / "set/.cache/train.jsonl")),
        ("set", lambda at: (at / "set/.gitattributes").write_text("x")),
        ("saved", lambda at: rewrite(at / "saved/test/data-00000-of-00001.arrow")),
        ("saved", lambda at: (at / "saved/train/cache-0123.arrow").write_text("x")),
    ],
)
def test_what_is_not_read_does_not_count(source: str, change: Callable[[Path], Any], data: Path) -> None:
    before = named(data, source)
    change(data)
    assert named(data, source) == before


def test_a_folder_may_be_elsewhere(data: Path) -> None:
    before = [named(data, source) for source in ("a/train.jsonl", "*/train.jsonl", "set", "saved")]
    moved = data.rename(data.with_name("elsewhere [2]"))
    assert [named(moved, source) for source in ("a/train.jsonl", "*/train.jsonl", "set", "saved")] == before


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf://datasets/org/name/data/a.jsonl", HubAddress("org/name", None, "data/a.jsonl")),
        ("hf://datasets/org/name@v1/data/*.jsonl", HubAddress("org/name", "v1", "data/*.jsonl")),
        ("hf://datasets/org/name/a.jsonl@v1", HubAddress("org/name", "v1", "a.jsonl")),
        ("hf://datasets/org/name@refs%2Fconvert%2Fparquet/a", HubAddress("org/name", "refs/convert/parquet", "a")),
        ("hf://datasets/org/name", HubAddress("org/name", None, "")),
        ("org/name", None),
        ("https://example.org/a.jsonl", None),
        ("hf://models/org/name/a", None),
    ],
)
def test_addresses_on_the_hub(source: str, expected: HubAddress | None) -> None:
    assert hub_address(source) == expected


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a dataset of three files, and an empty cache."""
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    for name in ("data/a.jsonl", "data/b[1].jsonl", "c.csv"):
        (folder / name).write_text("text\nfrom c\n" if name == "c.csv" else json.dumps({"text": f"from {name}"}) + "\n")
    with serve() as hub:
        reached(hub, tmp_path / "cache", monkeypatch)
        hub.repositories["datasets/org/data"] = Repository(folder)
        yield hub
    close_session()


def texts(source: str, **fields: Any) -> list[str]:
    walk = open_walk(entry(source, **fields), Path("."), seed=1)
    return sorted(row["text"] for row in walk.read(range(walk.length)))


class TestHub:
    def test_a_dataset_that_moved_has_another_key(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        before = named(Path("."), "org/data")
        assert before["revision"] == COMMIT and named(Path("."), "org/data", revision="main") == before
        hub.repositories["datasets/org/data"].commit = MOVED
        assert named(Path("."), "org/data")["revision"] == MOVED
        assert named(Path("."), "org/data", revision=COMMIT)["revision"] == COMMIT

    def test_offline_the_cached_commit_counts(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        assert texts("hf://datasets/org/data/data/a.jsonl") == ["from data/a.jsonl"]
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        close_session()
        assert named(Path("."), "org/data")["revision"] == COMMIT
        assert texts("hf://datasets/org/data/data/a.jsonl") == ["from data/a.jsonl"]
        assert known_commit("org/other", "dataset", None) is None
        assert named(Path("."), "org/other")["revision"] is None  # nothing of it can be read here
        with pytest.raises(UnusableError, match=r"source 'data': hf://datasets/org/other/a\.jsonl cannot be fetched"):
            texts("hf://datasets/org/other/a.jsonl")

    def test_offline_one_cached_commit_alone_is_meant(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        assert texts("hf://datasets/org/data/data/a.jsonl", revision=COMMIT) == ["from data/a.jsonl"]  # leaves no name
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        close_session()
        assert known_commit("org/data", "dataset", None) == known_commit("org/data", "dataset", "main") == COMMIT
        assert known_commit("org/data", "dataset", "v2") is None
        (Path(constants.HF_HUB_CACHE) / "datasets--org--data" / "snapshots" / MOVED).mkdir()
        assert known_commit("org/data", "dataset", None) is None
        with pytest.raises(UnusableError, match="the local cache holds none or several"):
            texts("org/data")

    def test_a_runs_lock_says_what_was_read(self, hub: Hub, tmp_path: Path) -> None:
        write_lines(tmp_path / "local.jsonl", [{"text": "one"}])
        (tmp_path / "r.yaml").write_text(RECIPE.replace("SOURCE", "org/data", 1).replace("SOURCE", "local.jsonl"))
        plan = make_plan(load(tmp_path / "r.yaml"))
        lock = make_lock(plan.loaded)
        assert publishing._lock(plan) == lock
        hub.repositories["datasets/org/data"].commit = MOVED
        write_lines(tmp_path / "local.jsonl", [{"text": "two"}])
        assert publishing._lock(plan) == lock != make_lock(plan.loaded)

    def test_files_of_a_dataset(self, hub: Hub) -> None:
        assert texts("hf://datasets/org/data/data/*.jsonl") == ["from data/a.jsonl", "from data/b[1].jsonl"]
        assert texts("hf://datasets/org/data@main/c.csv") == ["from c"]
        assert texts(f"hf://datasets/org/data/c.csv@{COMMIT}") == ["from c"]
        assert texts("hf://datasets/org/data/data/a.jsonl", split="train[:1]", revision=COMMIT) == ["from data/a.jsonl"]
        with pytest.raises(UnusableError, match=r"org/data has no file d\.csv"):
            texts("hf://datasets/org/data/d.csv")
        with pytest.raises(UnusableError, match=r"cannot be fetched \(RevisionNotFoundError"):
            texts("hf://datasets/org/data@nowhere/c.csv")

    def test_what_is_read_is_what_the_key_says(self, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "r.yaml").write_text(RECIPE.replace("SOURCE", "hf://datasets/org/data/data/a.jsonl"))
        loaded = load(tmp_path / "r.yaml")
        plan = make_plan(loaded)
        [mix], [extra] = plan.calibration.mix, plan.evaluation.extra_packs
        hub.repositories["datasets/org/data"].commit = MOVED
        assert (mix.revision, extra.revision) == (COMMIT, COMMIT)
        assert pinned_entries([mix], [named(tmp_path, mix.source, revision=mix.revision)]) == (mix,)
        assert make_plan(loaded).stage("calibrate").key != plan.stage("calibrate").key
        assert make_plan(loaded).stage("packs").key != plan.stage("packs").key

    def test_the_lock_pins_mix_and_extra_packs(self, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "r.yaml").write_text(RECIPE.replace("SOURCE", "org/data"))
        loaded = load(tmp_path / "r.yaml")
        lock = make_lock(loaded)
        assert {place: source["revision"] for place, source in lock["sources"].items()} == {
            "calibration.mix.d": COMMIT,
            "evaluate.extra_packs.e": COMMIT,
        }
        pinned = load(tmp_path / "r.yaml", revisions(lock, loaded))
        hub.repositories["datasets/org/data"].commit = MOVED
        assert make_lock(pinned)["sources"] == lock["sources"] != make_lock(loaded)["sources"]


RECIPE = """
version: 1
name: t
model: {source: "builtin:demo"}
calibration: {samples: 4, mix: [{name: d, source: "SOURCE"}]}
evaluate: {extra_packs: [{name: e, source: "SOURCE"}]}
prune: {ratio: 0.5}
quantize: {group_size: 64}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model in a folder, with a recipe and data beside it."""
    folder = tmp_path_factory.mktemp("keys")
    shutil.copytree(MODEL_DIRECTORY, folder / "model")
    write_lines(folder / "data.jsonl", [{"text": "a row of the data"}])
    return folder


def calibrate_key(folder: Path, source: str) -> str | None:
    (folder / "r.yaml").write_text(RECIPE.replace("SOURCE", source).replace("builtin:demo", "./model"))
    return make_plan(load(folder / "r.yaml")).stage("calibrate").key


@pytest.mark.parametrize(
    ("name", "change", "counts"),
    [
        ("config.json", {"tokenizer_class": "Other"}, True),
        ("config.json", {"bos_token_id": 7}, False),
        ("tokenizer_config.json", {"note": 1}, True),
        ("generation_config.json", {"temperature": 0.5}, False),
    ],
)
def test_what_of_a_model_counts_for_the_calibration(
    name: str, change: dict[str, Any], counts: bool, model: Path
) -> None:
    before, original = calibrate_key(model, "data.jsonl"), (model / "model" / name).read_text()
    try:
        (model / "model" / name).write_text(json.dumps(json.loads(original) | change))
        assert (calibrate_key(model, "data.jsonl") != before) == counts
    finally:
        (model / "model" / name).write_text(original)
    assert calibrate_key(model, "data.jsonl") == before


def test_a_tokenizer_longer_than_the_embedding_ends_in_an_error_that_names_source_and_row(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command: exit code 3, before anything is observed."""
    shutil.copytree(model / "model", tmp_path / "model")
    size = json.loads((tmp_path / "model/config.json").read_text())["vocab_size"]
    tokenizer = json.loads((tmp_path / "model/tokenizer.json").read_text())
    extra = {"id": size, "content": "<extra>", "special": False, "normalized": False}
    tokenizer["added_tokens"].append(extra | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(tokenizer))
    write_lines(tmp_path / "data.jsonl", [{"text": "a plain row of words"}, {"text": "a row with one <extra> token"}])
    recipe = (
        RECIPE.replace("SOURCE", "data.jsonl").replace("builtin:demo", "./model").replace("samples: 4", "samples: 2")
    )
    (tmp_path / "r.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    done = command("apply", "r.yaml", "--until", "calibrate")
    assert done.code == 3
    assert "source 'd': 1 of 2 rows cannot be used, but calibration.max_dropped allows 1.00%." in done.stderr
    assert f"data.jsonl:2: token id {size}, but the model knows ids below {size}" in done.stderr
