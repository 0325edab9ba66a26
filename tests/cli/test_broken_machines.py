"""Machines that lack what runs like to have: locks, links, permissions, memory, a terminal, a directory to stand in.
Each command ends with a documented code and says what it was, nothing is lost, and once that is mended the bytes are
the same."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.broken_machines import RECIPE, artifacts, assert_told, copied, from_stage
from tests.support.disks import mounted, remount
from tests.support.forked import CLOSED, NOBODY, Forks
from tests.support.paths import ROOT

NO_FLOCK = """
import errno, fcntl
from reapkit.core import locks
locks.LOOK_SECONDS = 0.05
def refuse(*_):
    raise OSError(errno.NUMBER, "no locks here")
fcntl.flock = refuse
"""
NO_LINKS = """
import errno, os
def refuse(*_, **__):
    raise OSError(errno.NUMBER, "no links here")
os.link = refuse
"""
NOBODY_SPECIAL = """
import os
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
os.environ["HOME"] = "/nonexistent"
"""
CUT_SHORT = """
import os
import reapkit.observation.observation as it
plain = it.map_tensors
def map_tensors(path):
    found = plain(path)
    if path.name == "observation.safetensors":
        os.truncate(path, 4096)
    return found
it.map_tensors = map_tensors
"""


def same(directory: Path, finished: Path) -> bool:
    expected, found = artifacts(finished), artifacts(directory)
    return {name: expected[name] for name in found} == found


def needs_root() -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")


# ---------------------------------------------------------------------------------------------- locks and links


@pytest.mark.parametrize("number", ["ENOLCK", "ENOTSUP", "ENOSYS"])
def test_no_flock(commands: Forks, finished: Path, tmp_path: Path, number: str) -> None:
    copied(finished, tmp_path, "select", link=True)
    ended = commands.run(
        "apply", "small.yaml", "--until=select", directory=tmp_path, before=NO_FLOCK.replace("NUMBER", number)
    )
    assert_told(ended, 0)
    assert same(tmp_path, finished) and not list((tmp_path / "runs").rglob("*.held"))


@pytest.mark.parametrize("number", ["EPERM", "EMLINK", "EXDEV", "ENOTSUP"])
def test_no_hard_links(commands: Forks, finished: Path, tmp_path: Path, number: str) -> None:
    copied(finished, tmp_path)
    before = NO_LINKS.replace("NUMBER", number)
    assert_told(commands.run("apply", "small.yaml", directory=tmp_path, before=before), 0)
    shard = next(tmp_path.glob("runs/.store/prune-*/payload/model.safetensors"))
    assert (tmp_path / "runs/small/pruned/model.safetensors").read_bytes() == shard.read_bytes()
    assert shard.stat().st_nlink == 1 and (tmp_path / "runs/small/report.html").is_file()
    assert_told(commands.run("verify", "runs/small", directory=tmp_path), 0)


def test_a_store_and_a_run_on_two_disks(commands: Forks, finished: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "other", "size=60m") as other:
        copied(finished, tmp_path)
        assert_told(commands.run("apply", "small.yaml", f"--set=output.directory={other}/run", directory=tmp_path), 0)
        assert_told(commands.run("verify", other / "run", directory=tmp_path), 0)


# ---------------------------------------------------------------------------------------------- many at once


def test_twelve_at_once_of_a_finished_recipe(commands: Forks, finished: Path, tmp_path: Path) -> None:
    copied(finished, tmp_path)
    running = [commands.start("apply", "small.yaml", directory=tmp_path) for _ in range(12)]
    for each in running:
        told = assert_told(each.wait(), 0)
        assert "running" not in told
    assert same(tmp_path, finished)
    assert_told(commands.run("verify", "runs/small", directory=tmp_path), 0)


@pytest.mark.parametrize("before", ["", NO_FLOCK.replace("NUMBER", "ENOLCK")], ids=["flock", "no flock"])
@pytest.mark.parametrize("where", ["one directory", "a directory each"])
def test_twelve_at_once_of_an_unfinished_recipe(
    commands: Forks, finished: Path, tmp_path: Path, before: str, where: str
) -> None:
    copied(finished, tmp_path, *from_stage("select"))
    running = [
        commands.start(
            "apply",
            "small.yaml",
            "--until=select",
            *([f"--set=output.directory=run-{number}"] if where == "a directory each" else []),
            directory=tmp_path,
            before=before,
        )
        for number in range(12)
    ]
    told = [assert_told(each.wait(), 0) for each in running]
    assert sum("select: done" in each for each in told) == 1, "one of them did it for all"
    assert same(tmp_path, finished) and len(artifacts(tmp_path)) == 4
    runs = [tmp_path / f"run-{number}" for number in range(12)] if "each" in where else [tmp_path / "runs/small"]
    for run in runs:
        assert json.loads((run / "run.json").read_text())["stages"].keys() == {"calibrate", "observe", "select"}


# ---------------------------------------------------------------------------------------------- permissions


def test_a_store_that_is_read_only_serves_a_finished_run_and_no_other(
    commands: Forks, finished: Path, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", "size=60m") as disk:
        copied(finished, disk)
        remount(disk, "ro")
        where = (disk / "small.yaml", f"--set=runtime.store={disk}/runs/.store", "--set=output.directory=run")
        assert "running" not in assert_told(commands.run("apply", *where, directory=tmp_path), 0)
        assert_told(commands.run("verify", "run", directory=tmp_path), 0)
        told = assert_told(commands.run("apply", *where, "--set=prune.ratio=0.25", directory=tmp_path), 3, 4)
        assert f"{disk}/runs/.store/" in told and "Read-only file system. Choose a place that can be" in told, told
        told = assert_told(commands.run("apply", "small.yaml", directory=disk), 3)
        assert "runs/small: the directory cannot be created (Read-only file system). Choose another" in told, told
        for command, place in ((("lock", "small.yaml"), "small.lock.json"), (("init", "builtin:demo"), "demo.yaml")):
            told = assert_told(commands.run(*command, directory=disk), 3)
            assert f"reapkit: {place}: Read-only file system. Choose a place that can be written to" in told, told
        assert_told(commands.run("gc", "--store", f"{disk}/runs/.store", directory=tmp_path), 3)
        for command in (("plan", "small.yaml"), ("validate", "small.yaml"), ("inspect", "small.yaml")):
            assert_told(commands.run(*command, directory=disk), 0)


def test_a_runs_directory_that_is_read_only(commands: Forks, finished: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=60m") as disk:
        copied(finished, tmp_path)
        where = ("small.yaml", f"--set=output.directory={disk}/run")
        assert_told(commands.run("apply", *where, directory=tmp_path), 0)
        before = {file: file.read_bytes() for file in disk.rglob("*") if file.is_file()}
        remount(disk, "ro")
        told = assert_told(commands.run("apply", *where, "--set=name=other", directory=tmp_path), 3)
        assert f"reapkit: {disk}/run/" in told and "Read-only file system. Choose a place that can be" in told, told
        remount(disk, "rw")
        assert {file: file.read_bytes() for file in disk.rglob("*") if file.is_file()} == before
        assert_told(commands.run("apply", *where, directory=tmp_path), 0)


def test_files_that_are_somebody_elses(commands: Forks, finished: Path, tmp_path: Path) -> None:
    needs_root()
    theirs, mine = copied(finished, tmp_path / "theirs"), tmp_path / "mine"
    mine.mkdir()
    mine.chmod(0o777)
    for directory in (tmp_path, *tmp_path.parents):
        if directory.owner() == "root" and len(directory.parts) > 2:
            directory.chmod(directory.stat().st_mode | 0o055)
    where = (theirs / "small.yaml", f"--set=runtime.store={theirs}/runs/.store", "--set=output.directory=run")
    assert_told(commands.run("apply", *where, directory=mine, before=NOBODY_SPECIAL), 0)
    assert (mine / "run/pruned/model.safetensors").owner() != "root", "their shards are copied, not linked"
    told = assert_told(commands.run("apply", "small.yaml", directory=theirs, before=NOBODY_SPECIAL), 3)
    assert "runs/small: the directory cannot be created (Permission denied). Choose another" in told, told
    told = assert_told(commands.run("init", "builtin:demo", directory=theirs, before=NOBODY_SPECIAL), 3)
    assert "reapkit: demo.yaml: Permission denied. Ask for the permission, or choose another place" in told, told
    manifest = next((theirs / "runs/.store").glob("observe-*/manifest.json"))
    manifest.chmod(0o600)
    told = assert_told(commands.run("apply", *where, directory=mine, before=NOBODY_SPECIAL), 3)
    assert f"{manifest}: Permission denied. Ask for the permission" in told, "what is not to be read is not missing"
    (theirs / "small.yaml").chmod(0o600)
    told = assert_told(commands.run("apply", "small.yaml", directory=theirs, before=NOBODY_SPECIAL), 2, 3)
    assert "small.yaml" in told and "Permission denied" in told, told
    manifest.chmod(0o644)
    assert_told(commands.run("apply", "small.yaml", directory=theirs), 0)


# ---------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(("limits", "told"), [({"NOFILE": 16}, "Raise the limit of open files (ulimit -n)")])
def test_few_open_files(commands: Forks, finished: Path, tmp_path: Path, limits: dict[str, int], told: str) -> None:
    copied(finished, tmp_path, *from_stage("observe"), link=True)
    apply = ("apply", "small.yaml", "--until=select")
    assert told in assert_told(commands.run(*apply, directory=tmp_path, limits=limits), 3, 4)
    assert_told(commands.run(*apply, directory=tmp_path), 0)
    assert same(tmp_path, finished) and len(artifacts(tmp_path)) == 4


def test_no_more_processes(commands: Forks, tmp_path: Path) -> None:
    """A chat template is rendered in a process of its own."""
    needs_root()
    tmp_path.chmod(0o777)
    for directory in tmp_path.parents:
        if len(directory.parts) > 2:
            directory.chmod(directory.stat().st_mode | 0o055)
    turns = [[{"role": role, "content": f"{role} {number}"} for role in ("user", "assistant")] for number in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    (tmp_path / "chat.yaml").write_text(RECIPE.replace("builtin:code", "rows.jsonl").replace(", score: all", ""))
    limited = NOBODY_SPECIAL + "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (1, 1))"
    apply = ("apply", "chat.yaml", "--until=calibrate")
    told = assert_told(commands.run(*apply, directory=tmp_path, before=limited), 3, 4)
    assert "Raise the limit of processes and threads (ulimit -u)" in told, told
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    assert_told(commands.run(*apply, directory=tmp_path), 0)


def test_a_file_that_is_cut_short_while_it_is_mapped(commands: Forks, finished: Path, tmp_path: Path) -> None:
    """The kernel's answer is SIGBUS."""
    copied(finished, tmp_path, *from_stage("select"))
    observation = next(path for path in (tmp_path / "runs/.store").glob("observe-*") if path.is_dir()) / "payload"
    shutil.copytree(observation, tmp_path / "observation")
    apply = ("apply", "small.yaml", "--until=select")
    told = assert_told(commands.run(*apply, directory=tmp_path, before=CUT_SHORT), 4)
    assert f"reapkit: select: {observation}/observation.safetensors: a part of the file cannot be read or" in told, told
    assert_told(commands.run(*apply, directory=tmp_path), 0)
    assert same(tmp_path, finished) and len(artifacts(tmp_path)) == 4
    ended = commands.run("report", "observation", "--json", directory=tmp_path, before=CUT_SHORT)
    told = assert_told(ended, 3)
    assert told.startswith(f"reapkit: {tmp_path}/observation/observation.safetensors: a part of the file"), told
    assert ended.json() == {"error": told.removeprefix("reapkit: ").rstrip("\n"), "exit": 3}


# ---------------------------------------------------------------------------------------------- where it runs


@pytest.mark.parametrize("command", [("init", "builtin:demo"), ("plan", "demo"), ("apply", "demo"), ("lock", "demo")])
def test_a_directory_that_was_deleted(commands: Forks, tmp_path: Path, command: tuple[str, ...]) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    told = assert_told(commands.run(*command, directory=gone, before="import os; os.rmdir(os.getcwd())"), 3)
    assert "the current directory: No such file or directory. It was deleted: go to one that is there" in told, told


@pytest.mark.parametrize(
    ("place", "kind", "told"),
    [
        ("runs", "file", "runs: is a file. Choose another output.directory."),
        ("runs/small", "file", "runs/small: is a file. Choose another output.directory."),
        ("runs/small/pruned", "file", "a run would write runs/small/pruned, and reapkit did not make what is there."),
        ("runs/small/run.json", "folder", "a run would write runs/small/run.json, and reapkit did not make"),
        ("runs/.store", "file", "runs/.store"),
        ("runs/.store/samples", "file", "runs/.store/samples"),
        ("runs/.store/runs", "file", "runs/.store/runs"),
        ("runs/.store/runs-registry.lock", "folder", "runs/.store/runs-registry.lock: Is a directory."),
        ("runs/small/.reapkit-run.lock", "folder", "runs/small/.reapkit-run.lock: Is a directory."),
        ("runs", "dangling link", "runs: "),
        ("small.yaml", "folder", "small.yaml: is a folder. Give the recipe's file"),
    ],
)
def test_a_file_where_a_folder_is_needed_and_the_reverse(
    commands: Forks, finished: Path, tmp_path: Path, place: str, kind: str, told: str
) -> None:
    if place != "small.yaml":
        shutil.copy(finished / "small.yaml", tmp_path)
    there = tmp_path / place
    there.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        there.mkdir()
        (there / "mine").write_text("mine")
    elif kind == "file":
        there.write_text("mine")
    else:
        there.symlink_to("nowhere/at/all")
    apply = ("apply", "small.yaml", "--until=calibrate")
    assert told in assert_told(commands.run(*apply, directory=tmp_path), 2, 3, 4)
    assert there.is_symlink() or (there / "mine" if kind == "folder" else there).read_text() == "mine"
    if place == "small.yaml":
        return
    there.unlink() if kind != "folder" else shutil.rmtree(there)
    assert_told(commands.run(*apply, directory=tmp_path), 0)
    assert same(tmp_path, finished) and len(artifacts(tmp_path)) == 1


def test_a_store_behind_a_link(commands: Forks, finished: Path, tmp_path: Path) -> None:
    copied(finished, tmp_path)
    (tmp_path / "runs/.store").rename(tmp_path / "elsewhere")
    (tmp_path / "runs/.store").symlink_to(tmp_path / "elsewhere")
    assert "running" not in assert_told(commands.run("apply", "small.yaml", directory=tmp_path), 0)


# ---------------------------------------------------------------------------------------------- terminals and signals


def observes(directory: Path) -> bool:
    """Whether the run in `directory` is in the middle of its observation: a first group of rows is being summed."""
    return any(True for observed in (directory / "runs/.store").glob("observe-*") for _ in observed.glob("*/*/group-*"))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_what_a_signal_ends_is_resumed(commands: Forks, finished: Path, tmp_path: Path, number: signal.Signals) -> None:
    copied(finished, tmp_path, *from_stage("observe"), link=True)
    running = commands.start("apply", "small.yaml", "--until=select", directory=tmp_path)
    wait_for(lambda: observes(tmp_path))
    os.kill(running.pid, number)
    told = assert_told(running.wait(), 130)
    assert "Interrupted. Finished stages are kept; run the same command again to resume." in told
    assert_told(commands.run("apply", "small.yaml", "--until=select", directory=tmp_path), 0)
    assert same(tmp_path, finished) and len(artifacts(tmp_path)) == 4


def test_a_terminal_that_is_closed(finished: Path, tmp_path: Path) -> None:
    """A command of its own, whose terminal goes away while it works: what the kernel sends is SIGHUP."""
    copied(finished, tmp_path, *from_stage("observe"), link=True)
    command = [sys.executable, "-m", "reapkit", "apply", "small.yaml", "--until=select"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, command, os.environ | {"PYTHONPATH": str(ROOT)})
    wait_for(lambda: observes(tmp_path))
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    ended = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0 and same(tmp_path, finished) and len(artifacts(tmp_path)) == 4


@pytest.mark.parametrize("streams", [{"stdin": CLOSED}, {"stdout": NOBODY, "stderr": NOBODY}, {"stderr": CLOSED}])
def test_nobody_who_reads_or_writes(commands: Forks, finished: Path, tmp_path: Path, streams: dict[str, str]) -> None:
    copied(finished, tmp_path, "select", link=True)
    ended = commands.run("apply", "small.yaml", "--until=select", directory=tmp_path, **streams)
    assert ended.code == 0 and same(tmp_path, finished) and len(artifacts(tmp_path)) >= 4


def wait_for(there: object) -> None:
    end = time.monotonic() + 60
    while not there():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not begin"
        time.sleep(0.005)
