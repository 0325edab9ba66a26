"""Disks that are full, fill up meanwhile, take no more files or no large ones: each command says so with a code that is
documented, loses nothing, and goes on to the same bytes once there is room."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from reapkit.checkpoint.locate import MODEL_DIRECTORY
from tests.selection.test_foreign_formats import state
from tests.support import synthetic_report as synthetic
from tests.support.broken_machines import RECIPE, artifacts, assert_told, copied, from_stage
from tests.support.disks import filled, mounted
from tests.support.fake_hub import Repository, serve
from tests.support.forked import Forks
from tests.support.paths import ROOT

ROOM = """
import shutil
plain = shutil.disk_usage
shutil.disk_usage = lambda path: plain("/")._replace(free=10**12)
"""
"""There was room when the run was planned: others take it meanwhile."""
FILLING = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import reapkit.pipeline.run as run
from tests.support.disks import fill
execute = run._execute
def full(this, stage, progress):
    if stage.name == "STAGE":
        fill(Path("DISK"), LEFT)
    return execute(this, stage, progress)
run._execute = full
"""
STREAMING = ("--set=runtime.placement=streaming", "--set=runtime.checkpoint_minutes=0.0000001")
KILOBYTE = 1 << 10
STAGES = {  # what is left when the stage begins: nothing, and what is gone in its middle
    "calibrate": ("calibrate", (), (0, 4 * KILOBYTE)),
    "packs": ("packs", (), (0, 4 * KILOBYTE)),
    "observe, resident": ("observe", (), (0, 50 * KILOBYTE, 150 * KILOBYTE)),
    "observe, a layer at a time": ("observe", STREAMING, (0, 60 * KILOBYTE, 280 * KILOBYTE)),
    "select": ("select", (), (0, 8 * KILOBYTE)),
    "repair": ("repair", ("--set=prune.repair=ridge",), (0, 800 * KILOBYTE)),
    "evaluate, resident": ("evaluate", (), (0, 100 * KILOBYTE)),
    "evaluate, a layer at a time": ("evaluate", STREAMING[:1], (0,)),
    "prune": ("prune", (), (0, 2000 * KILOBYTE)),
    "quantize, rtn": ("quantize", (), (100 * KILOBYTE, 600 * KILOBYTE)),
    "report": ("report", (), (0, 1000 * KILOBYTE, 2300 * KILOBYTE)),
}
LONG = {
    "quantize, gptq": ("quantize", ("--set=quantize.method=gptq",), (0, 600 * KILOBYTE)),
    "quantize, layers on disk": (
        "quantize",
        ("--set=quantize.method=gptq", "--set=runtime.placement=streaming"),
        (0, 900 * KILOBYTE),
    ),
    "verify": ("verify", ("--set=evaluate.equal_bytes=true",), (0, 3000 * KILOBYTE)),
    "observe, re-routed": ("observe", ("--set=observe.reroute_tokens=64",), (0, 12 * KILOBYTE, 60 * KILOBYTE)),
    "observe, in a table": ("observe", ("--set=observe.trace_bytes=0",), (0, 900 * KILOBYTE)),
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "size=60m") as disk:
        yield disk


def leftovers(directory: Path) -> list[str]:
    """What writers that failed would have left."""
    return [str(file) for file in directory.rglob(".*") if file.name.startswith((".tmp",)) or ".partial" in file.name]


@pytest.mark.parametrize("case", [*STAGES, *(pytest.param(case, marks=pytest.mark.long) for case in LONG)])
def test_a_disk_that_fills_up_in_a_stage(commands: Forks, finished: Path, disk: Path, case: str) -> None:
    stage, settings, lefts = (STAGES | LONG)[case]
    until = ("small.yaml", *settings, *(() if stage == "report" else (f"--until={stage}",)))
    copied(finished, disk, *from_stage("evaluate" if stage == "repair" else stage))
    for left in lefts:
        before = ROOM + FILLING.replace("STAGE", stage).replace("DISK", str(disk)).replace("LEFT", str(left))
        ended = commands.run("apply", *until, directory=disk, before=before)
        told = assert_told(ended, 3, 4)
        assert "No space left on device. Free some space" in told or "is full. Free space there" in told, told
        assert str(disk) in told or " runs/" in told, told
        assert not leftovers(disk)
        (disk / ".filler").unlink()
    assert_told(commands.run("apply", *until, directory=disk), 0)
    if settings:
        other = disk.parent / "undisturbed"
        copied(finished, other, *from_stage("evaluate" if stage == "repair" else stage))
        assert_told(commands.run("apply", *until, directory=other), 0)
        assert artifacts(disk) == artifacts(other)
    else:
        expected = artifacts(finished)
        assert {name: expected[name] for name in artifacts(disk)} == artifacts(disk)


def test_a_disk_without_room_is_seen_before_anything_runs(commands: Forks, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=4m") as disk:
        (disk / "small.yaml").write_text(RECIPE)
        told = assert_told(commands.run("apply", "small.yaml", directory=disk), 3)
        assert f"reapkit: disk: {disk}: " in told and "will be written by the end of quantize, but only" in told, told
        assert sorted(os.listdir(disk)) == ["small.yaml"]
        planned = commands.run("plan", "small.yaml", directory=disk)
        assert planned.code == 0 and "will be written by the end of quantize, but only" in planned.stdout
        told = commands.run("plan", "small.yaml", "--json", directory=disk).json()
        assert told["disk_shortage"].startswith(f"{disk}: ")


def test_a_disk_that_takes_no_more_files(commands: Forks, finished: Path, tmp_path: Path) -> None:
    for inodes in (20, 40, 60):
        with mounted(tmp_path / "disk", f"nr_inodes={inodes},size=60m") as disk:
            (disk / "small.yaml").write_text(RECIPE)
            ended = commands.run("apply", "small.yaml", "--until=select", directory=disk, stderr=tmp_path / "stderr")
            said = (tmp_path / "stderr").read_text()
            (tmp_path / "stderr").unlink()
            assert ended.code in (3, 4) and "No space left on device" in said and "internal error" not in said
            shutil.copytree(disk, tmp_path / f"copy-{inodes}")
        assert_told(commands.run("apply", "small.yaml", "--until=select", directory=tmp_path / f"copy-{inodes}"), 0)
        expected = artifacts(finished)
        found = artifacts(tmp_path / f"copy-{inodes}")
        assert len(found) == 3 and {name: expected[name] for name in found} == found


@pytest.mark.parametrize(("limit", "told"), [(1000, "tokens.safetensors"), (20_000, "group-00000"), (300_000, "prune")])
def test_a_limit_on_the_size_of_files(commands: Forks, finished: Path, tmp_path: Path, limit: int, told: str) -> None:
    stage = {1000: "calibrate", 20_000: "observe", 300_000: "prune"}[limit]
    copied(finished, tmp_path, *from_stage(stage), link=True)
    until = ("small.yaml", f"--until={stage}")
    said = assert_told(commands.run("apply", *until, directory=tmp_path, limits={"FSIZE": limit}), 4)
    assert told in said and "File too large. Raise the limit of a file's size (ulimit -f)" in said, said
    assert_told(commands.run("apply", *until, directory=tmp_path), 0)
    expected = artifacts(finished)
    assert {name: expected[name] for name in artifacts(tmp_path)} == artifacts(tmp_path)


def test_the_runs_directory_on_a_full_disk(commands: Forks, finished: Path, tmp_path: Path, disk: Path) -> None:
    copied(finished, tmp_path, link=True)
    where = ("small.yaml", f"--set=output.directory={disk / 'run'}")
    with filled(disk, 3_000_000):
        told = assert_told(commands.run("apply", *where, directory=tmp_path), 3)
        assert f"{disk}: " in told and "will be written by the end of publish, but only" in told, told
        told = assert_told(commands.run("apply", *where, directory=tmp_path, before=ROOM), 3)
        assert f"{disk}/run/" in told and "No space left on device" in told and not leftovers(disk), told
    assert_told(commands.run("apply", *where, directory=tmp_path), 0)
    assert_told(commands.run("verify", disk / "run", directory=tmp_path), 0)


def test_the_directory_of_what_waits_on_a_full_disk(
    commands: Forks, finished: Path, tmp_path: Path, disk: Path
) -> None:
    copied(finished, tmp_path, *from_stage("observe"), link=True)
    no_memory = "import reapkit.planning.estimates as it\nit.hidden_budget = lambda *_: 1000"
    where = ("small.yaml", "--until=observe", *STREAMING, f"--set=runtime.offload_directory={disk}")
    with filled(disk, 8 * KILOBYTE):
        ended = commands.run("apply", *where, directory=tmp_path, before=ROOM + no_memory)
        assert f"observe: {disk}: No space left on device" in assert_told(ended, 4)
        assert os.listdir(disk) == [".filler"]
    assert_told(commands.run("apply", *where, directory=tmp_path, before=no_memory), 0)
    assert not os.listdir(disk)


def test_temporary_files_on_a_full_disk(commands: Forks, finished: Path, tmp_path: Path, disk: Path) -> None:
    copied(finished, tmp_path, "verify", "report", link=True)
    there = f"import tempfile\ntempfile.tempdir = {str(disk)!r}"
    with filled(disk):
        told = assert_told(commands.run("apply", "small.yaml", directory=tmp_path, before=ROOM + there), 4)
        assert f"verify: {disk}/reapkit-verify-" in told and "No space left on device" in told, told
        assert os.listdir(disk) == [".filler"]
    nowhere = "import tempfile\ntempfile.tempdir = None\ntempfile._candidate_tempdir_list = lambda: ['/proc']"
    told = assert_told(commands.run("apply", "small.yaml", directory=tmp_path, before=nowhere), 4)
    assert "No usable temporary directory found in ['/proc']. Set TMPDIR to a folder that can be written to" in told


def test_datasets_in_a_cache_on_a_full_disk(commands: Forks, tmp_path: Path, disk: Path) -> None:
    rows = {"text": [f"sentence number {number} about a small matter" for number in range(20_000)]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet")
    (tmp_path / "small.yaml").write_text(RECIPE.replace("builtin:code", "rows.parquet"))
    cache = f"import datasets.config as it; from pathlib import Path\nit.HF_DATASETS_CACHE = Path({str(disk)!r})"
    apply = ("apply", "small.yaml", "--until=calibrate")
    with filled(disk, 100 * KILOBYTE):
        told = assert_told(commands.run(*apply, directory=tmp_path, before=cache), 3)
        assert "source 'code': No space left on device. Free some space, or set HF_HOME to a folder on" in told, told
    assert_told(commands.run(*apply, directory=tmp_path, before=cache), 0)


def test_a_model_of_the_hub_in_a_cache_on_a_full_disk(commands: Forks, tmp_path: Path, disk: Path) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE.replace("builtin:demo", "org/demo"))
    with serve() as hub:
        hub.repositories["org/demo"] = Repository(MODEL_DIRECTORY)
        there = (
            f"from huggingface_hub import constants as it\nit.HF_HUB_CACHE, it.ENDPOINT = {str(disk)!r},"
            f" {hub.endpoint!r}\nit.HF_HUB_OFFLINE = False\n"
            "it.HUGGINGFACE_CO_URL_TEMPLATE = it.ENDPOINT + '/{repo_id}/resolve/{revision}/{filename}'\n"
        )
        apply = ("apply", "small.yaml", "--until=observe")
        with filled(disk, 3_000_000):
            told = assert_told(commands.run(*apply, directory=tmp_path, before=there, NO_PROXY="127.0.0.1"), 3)
            assert "will be written by the end of download, but only" in told and "set HF_HUB_CACHE to" in told, told
            told = assert_told(commands.run(*apply, directory=tmp_path, before=there + ROOM, NO_PROXY="127.0.0.1"), 3)
            assert "model.source: org/demo: No space left on device. Free some space, or set HF_HOME to" in told, told
        assert_told(commands.run(*apply, directory=tmp_path, before=there, NO_PROXY="127.0.0.1"), 0)


WRITING = {
    "init": ("init", "builtin:demo", "-o", "out.yaml"),
    "lock": ("lock", "small.yaml"),
    "export": ("export", "observation", "out"),
    "report": ("report", "observation", "-o", "out.html"),
    "compare": ("compare", "observation", "observation", "--html", "out.html"),
    "merge": ("merge", "observation", "observation", "-o", "out"),
    "import": ("import", "state.pt", "-o", "out"),
}


@pytest.mark.parametrize("name", WRITING)
def test_what_one_command_writes_is_there_whole_or_not_at_all(commands: Forks, disk: Path, name: str) -> None:
    (disk / "small.yaml").write_text(RECIPE)
    synthetic.observation().save(disk / "observation")
    torch.save(state(), disk / "state.pt")
    before = sorted(os.listdir(disk))
    with filled(disk):
        told = assert_told(commands.run(*WRITING[name], directory=disk), 3)
        assert "No space left on device. Free some space" in told and (" out" in told or "small.lock" in told), told
    assert [each for each in sorted(os.listdir(disk)) if each not in before] in ([], ["out"])
    assert not (disk / "out").exists() or not os.listdir(disk / "out"), "an empty folder at most"
    assert_told(commands.run(*WRITING[name], directory=disk), 0)
    assert sorted(os.listdir(disk)) != before


def test_what_is_printed_into_a_file_on_a_full_disk(commands: Forks, disk: Path) -> None:
    (disk / "small.yaml").write_text(RECIPE)
    for command in (("schema",), ("schema", "--markdown"), ("plan", "small.yaml"), ("inspect", "small.yaml")):
        with filled(disk):
            told = assert_told(commands.run(*command, directory=disk, stdout=disk / "out"), 3)
        assert told.startswith("reapkit: standard output: No space left on device. Free some space"), told
        (disk / "out").unlink(missing_ok=True)
