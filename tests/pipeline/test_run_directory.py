"""Nothing of the user's is lost in a run's directory, and nothing published is changed by what another run does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reapkit.core.artifact_store import Artifact
from reapkit.core.errors import RecipeError, UnusableError
from reapkit.core.progress import SILENT
from reapkit.core.run_record import RECORD
from reapkit.pipeline.planned import load_and_plan
from reapkit.pipeline.run import walk
from reapkit.pipeline.run_directory import RunDirectory, foreign
from reapkit.pruning.manifest import check_directory
from tests.support.heard import Heard
from tests.support.paths import ROOT

SMALL = (
    "calibration.samples=16",
    "calibration.max_length=512",
    "evaluate.packs={samples: 8, lengths: [512]}",
    "evaluate.throughput=null",
    "evaluate.equal_bytes=false",
    "evaluate.controls=[]",
    "evaluate.gates={kl_mean: {max: 9}}",
    "evaluate.generation=null",
    "quantize.scheme=null",
)


def artifact(root: Path, key: str, files: dict[str, str]) -> Artifact:
    directory = root / "store" / f"made-{key}"
    for name, text in files.items():
        (directory / "payload" / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / "payload" / name).write_text(text)
    return Artifact("made", key, directory, {"summary": {}})


def files_of(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): file.read_text()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and not file.name.startswith(".reapkit-run")
    }


# ---------------------------------------------------------------------------------------------- the directory itself


def test_weights_are_shared_and_read_only_everything_else_is_a_copy(tmp_path: Path) -> None:
    made = artifact(tmp_path, "a", {"model.safetensors": "weights", "config.json": "{}", "deep/notes.txt": "n"})
    with RunDirectory.opened(tmp_path / "run", SILENT) as run:
        run.mirror(made, "pruned")
    shard, config = tmp_path / "run/pruned/model.safetensors", tmp_path / "run/pruned/config.json"
    assert shard.samefile(made.payload / "model.safetensors") and shard.stat().st_mode & 0o777 == 0o444
    assert not config.samefile(made.payload / "config.json")
    config.write_text("edited in place")
    assert (made.payload / "config.json").read_text() == "{}"


def test_a_second_run_of_the_same_leaves_every_file_alone(tmp_path: Path) -> None:
    made = artifact(tmp_path, "a", {"model.safetensors": "weights", "README.md": "card", "config.json": "{}"})
    with RunDirectory.opened(tmp_path / "run", SILENT) as run:
        run.mirror(made, "pruned")
    (tmp_path / "run/pruned/README.md").write_text("my own words")
    (tmp_path / "run/pruned/notes.txt").write_text("beside the weights")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run/pruned").iterdir()}
    heard = Heard()
    with RunDirectory.opened(tmp_path / "run", heard) as run:
        run.mirror(made, "pruned")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run/pruned").iterdir()} == before
    assert heard.said == [f"{tmp_path / 'run/pruned/README.md'}: left as you changed it"]


def test_what_a_new_run_replaces_is_kept_beside_it_and_named(tmp_path: Path) -> None:
    first = artifact(tmp_path, "a", {"README.md": "card", "config.json": "{}", "gone.txt": "old", "edited.txt": "old"})
    second = artifact(tmp_path, "b", {"README.md": "another card", "config.json": "{}"})
    with RunDirectory.opened(tmp_path / "run", SILENT) as run:
        run.mirror(first, "pruned")
    (tmp_path / "run/pruned/README.md").write_text("my own words")
    (tmp_path / "run/pruned/edited.txt").write_text("mine")
    heard = Heard()
    with RunDirectory.opened(tmp_path / "run", heard) as run:
        run.mirror(second, "pruned")
    expected = {"README.md": "another card", "README.md.yours": "my own words", "config.json": "{}"}
    assert files_of(tmp_path / "run/pruned") == expected | {"edited.txt": "mine"}
    assert len(heard.said) == 1 and "yours is kept as README.md.yours" in heard.said[0]


def test_what_was_never_ours_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "run/pruned").mkdir(parents=True)
    (tmp_path / "run/pruned/config.json").write_text("the user's")
    with RunDirectory.opened(tmp_path / "run", SILENT) as run:
        with pytest.raises(UnusableError, match="reapkit did not write this file"):
            run.mirror(artifact(tmp_path, "a", {"config.json": "{}"}), "pruned")
        run.remove("pruned")
    assert files_of(tmp_path / "run") == {"pruned/config.json": "the user's"}


def test_a_killed_run_knows_its_files_again(tmp_path: Path) -> None:
    made = artifact(tmp_path, "a", {f"{number}.txt": "x" for number in range(20)})
    code = (
        "import os, sys; from pathlib import Path\n"
        "from reapkit.core.artifact_store import Artifact; from reapkit.core.progress import SILENT\n"
        "from reapkit.pipeline import run_directory\n"
        "copied = []; plain = run_directory.copy_file\n"
        "def dying(source, target):\n"
        "    plain(source, target); copied.append(target); len(copied) == 7 and os.kill(os.getpid(), 9)\n"
        "run_directory.copy_file = dying\n"
        "root = Path(sys.argv[1])\n"
        "with run_directory.RunDirectory.opened(root / 'run', SILENT) as run:\n"
        "    run.mirror(Artifact('made', 'a', root / 'store/made-a', {}), 'pruned')\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -9 and len(list((tmp_path / "run/pruned").iterdir())) == 7
    assert foreign(tmp_path / "run", ["pruned"]) == []
    with RunDirectory.opened(tmp_path / "run", SILENT) as run:
        run.mirror(made, "pruned")
    assert len(files_of(tmp_path / "run/pruned")) == 20


def test_two_runs_of_one_directory_take_turns(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from reapkit.core.progress import SILENT\n"
        "from reapkit.pipeline.run_directory import RunDirectory\n"
        "with RunDirectory.opened(Path(sys.argv[1]), SILENT): print('in', flush=True); time.sleep(1.5)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert other.stdout is not None and other.stdout.readline() == b"in\n"
    heard, started = Heard(), time.monotonic()
    with RunDirectory.opened(tmp_path, heard):
        assert time.monotonic() - started > 0.5
    assert heard.said == [f"{tmp_path}: another run writes there; waiting"] and other.wait() == 0


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"files": {"a": 3}}', '{"files": {"a": {"size": 1}}}'])
def test_a_damaged_record_is_refused_not_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(UnusableError, match="the record of what runs wrote there cannot be read"):
        foreign(tmp_path, ["pruned"])
    assert (tmp_path / RECORD).read_text() == text


# ---------------------------------------------------------------------------------------------- whole runs


def settings(tmp_path: Path, *more: str) -> tuple[str, ...]:
    return (*SMALL, f"runtime.store={tmp_path / 'store'}", f"output.directory={tmp_path / 'run'}", *more)


@pytest.mark.parametrize(
    "name",
    [
        "pruned/model-00001-of-00002.safetensors",
        "pruned/tokenizer.json",
        "pruned.rejected/README.md",
        "packs/512/tokens.safetensors",
        "observation/trace.safetensors",
        "selection/candidates/mine/selection.json",
    ],
)
def test_a_users_file_in_our_folder_is_refused_where_a_later_run_needs_its_name(tmp_path: Path, name: str) -> None:
    directory = name.partition("/")[0]
    with RunDirectory.opened(tmp_path / "run", SILENT) as run:
        run.mirror(artifact(tmp_path, "a", {"ours.txt": "ours"}), directory)
    for free in ("notes.txt", "adapter_model.safetensors", "README.md.yours"):
        (tmp_path / "run" / directory / free).write_text("the user's")
    load_and_plan("demo", settings(tmp_path))
    (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / name).write_text("the user's")
    with pytest.raises(RecipeError) as refused:
        load_and_plan("demo", settings(tmp_path))
    told = str(refused.value)
    assert (
        f"a run would write {tmp_path / 'run' / name}, and reapkit did not make what is there. Choose another" in told
    )
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").glob("calibrate-*"))
    assert (tmp_path / "run" / name).read_text() == "the user's"


@pytest.mark.parametrize(
    "name", ["calibration", "pruned", "quantized.rejected", "evaluation", "report.html", "run.json", "lock.json"]
)
def test_a_users_own_folder_of_our_name_is_refused_before_anything_runs(tmp_path: Path, name: str) -> None:
    own = tmp_path / "run" / name
    own.parent.mkdir(parents=True)
    if "." in name and not name.endswith(".rejected"):
        own.write_text("the user's")
    else:
        own.mkdir()
        (own / "rows.jsonl").write_text("the user's")
    before = files_of(tmp_path / "run")
    expected = rf"output\.directory.*: a run would write .*{name}, and reapkit did not make"
    with pytest.raises(RecipeError, match=expected):
        load_and_plan("demo", settings(tmp_path))
    assert files_of(tmp_path / "run") == before and not (tmp_path / "store").exists()


def test_results_survive_edits_failures_and_other_runs(tmp_path: Path) -> None:
    walk(load_and_plan("demo", settings(tmp_path)))
    run = tmp_path / "run"
    assert all(finding.passed for finding in check_directory(run / "pruned"))
    record, kept = (run / "run.json").read_text(), files_of(run / "selection")
    # an edit in place reaches neither the store nor a run of another name, and verify notices it
    (run / "pruned/config.json").write_text("{}")
    other = walk(load_and_plan("demo", settings(tmp_path, f"output.directory={tmp_path / 'other'}")))
    assert other.executed == [] and json.loads((tmp_path / "other/pruned/config.json").read_text())["num_experts"] == 16
    failed = {finding.name for finding in check_directory(run / "pruned") if not finding.passed}
    assert "other files" in failed
    # an attempt that fails, or is rejected, leaves the finished run's record and results
    with pytest.raises(Exception, match="kl_mean"):
        walk(load_and_plan("demo", settings(tmp_path, "evaluate.gates={kl_mean: {max: 0.000001}}")))
    assert (run / "run.json").read_text() == record and files_of(run / "selection") == kept
    assert "kl_mean" in json.loads((run / "run.failed.json").read_text())["error"]
    assert (run / "report.rejected.html").is_file() and (run / "report.html").is_file()
    again = walk(load_and_plan("demo", settings(tmp_path)))
    assert again.executed == [] and not (run / "run.failed.json").exists()
    assert (run / "pruned/config.json").read_text() == "{}", "what the user changed stays"
