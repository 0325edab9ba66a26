"""The command line: signals, exit codes, output on narrow terminals, files it must not overwrite."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reapkit.checkpoint.locate import MODEL_DIRECTORY
from tests.support.command import command
from tests.support.paths import ROOT

DEMO = str(ROOT / "recipes" / "demo.yaml")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.long)])
def test_a_signal_saves_and_says_how_to_go_on(number: int, tmp_path: Path) -> None:
    where = [f"--set=runtime.store={tmp_path / 'store'}", f"--set=output.directory={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "reapkit", "apply", DEMO, *where],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "store").glob("observe-*/*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert "Interrupted. Finished stages are kept; run the same command again to resume." in said
    assert "Traceback" not in said


SWALLOWING = """
import os, signal, sys, threading, time
from reapkit.cli.main import app, main
from reapkit.cli.progress_bars import make_progress

@app.command()
def work() -> None:
    with make_progress().task("work") as task:
        try:
            os.kill(os.getpid(), int(sys.argv[1]))
            time.sleep(60)
        except:  # what some libraries do around their own imports
            print("swallowed")
        other = threading.Thread(target=lambda: (task.advance(), print("threads go on")))
        other.start()
        other.join()
        task.advance()
        print("never here")

main(["work"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_swallows_still_stops_the_run(number: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWING, str(int(number))],
        capture_output=True,
        text=True,
        timeout=50,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 130, done.stderr
    assert done.stdout.splitlines() == ["swallowed", "threads go on"]
    assert "Interrupted." in done.stderr


@pytest.mark.parametrize(
    "arguments", [["plan", DEMO], ["validate", DEMO], ["compare", DEMO, DEMO], ["--help"], ["apply", "--help"]]
)
def test_nothing_is_wider_than_the_terminal(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "reapkit", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "80", "TERM": "dumb"},
    )
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 80 or arguments[0] == "validate"


def test_every_command_has_help_with_an_example() -> None:
    listed = command("--help")
    assert listed.code == 0
    listing = listed.stdout
    commands = [
        line.split()[0]
        for line in listing.split("Commands:")[1].splitlines()
        if line.startswith("  ") and not line.startswith("   ")
    ]
    assert {
        "apply",
        "plan",
        "validate",
        "lock",
        "init",
        "compare",
        "inspect",
        "export",
        "merge",
        "report",
        "schema",
        "observe",
        "select",
        "evaluate",
        "prune",
        "quantize",
    } <= set(commands)
    for name in commands:
        done = command(name, "--help")
        assert done.code == 0 and "Example: reapkit " in done.stdout, name


def test_init_writes_a_recipe_that_is_valid_and_never_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("init", "builtin:demo", "-o", "mine.yaml").code == 0
    assert command("validate", "mine.yaml").code == 0
    before = Path("mine.yaml").read_text()
    done = command("init", "builtin:demo", "-o", "mine.yaml")
    assert done.code == 2 and "the file exists already" in done.stderr
    assert Path("mine.yaml").read_text() == before
    assert "gates_quantized: size-first" in before


def test_inits_next_step_works_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe lies in a folder of its own; its paths follow it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    shutil.copytree(MODEL_DIRECTORY, tmp_path / "models" / "my: moe")
    for model in ("models/my: moe", "./models/my: moe/", str(tmp_path / "models" / "my: moe")):
        done = command("init", model, "-o", "recipes of mine/deep/a.yaml")
        assert done.code == 0, done.stderr
        [_, advised] = done.stdout.strip().split("Next: ")
        assert advised == "reapkit plan 'recipes of mine/deep/a.yaml'"
        assert command(*shlex.split(advised)[1:]).code == 0
        Path("recipes of mine/deep/a.yaml").unlink()


def test_a_lock_is_kept_or_says_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(json.dumps({"text": "one two three"}) + "\n")
    recipe = Path("mine.yaml")
    recipe.write_text(
        "version: 1\nname: mine\nmodel: {source: 'builtin:demo'}\ncalibration: {samples: 4, mix: [{name: d, source:"
        " data.jsonl}]}\nprune: {ratio: 0.5}\nquantize: {group_size: 64}\n"
    )
    locked = ("apply", "mine.yaml", "--locked", "--dry-run")
    assert command("lock", "mine.yaml").code == 0
    assert command(*locked).code == 0
    assert command(*locked, "--set", "runtime.batch_tokens=64").code == 0
    Path("data.jsonl").write_text(json.dumps({"text": "one two four"}) + "\n")
    done = command(*locked)
    assert done.code == 3 and "sources.calibration.mix.d.files.data.jsonl: locked" in done.stderr
    done = command(*locked, "--set", "prune.ratio=0.25")
    assert done.code == 3 and "  recipe: locked" in done.stderr


def test_compare_names_fields_and_stages(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(
        Path(DEMO).read_text().replace("ratio: 0.5", "ratio: 0.25").replace("weight: 0.3}", "weight: 0.3}", 1)
    )
    done = command("compare", DEMO, other, "--json")
    assert done.code == 0
    found = done.json()
    assert found["fields"] == [{"path": "prune.ratio", "left": "0.5", "right": "0.25"}]
    assert found["stages"] == ["select", "evaluate", "prune", "quantize", "verify", "report"]
