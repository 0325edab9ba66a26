"""With --json stdout holds one document, however the command ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from reapkit import __version__
from reapkit.cli.main import app
from tests.support.command import command
from tests.support.paths import ROOT

DEMO = str(ROOT / "recipes" / "demo.yaml")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("plan", "no-such-recipe"), 2, "the recipe file does not exist"),
        (("plan", DEMO, "--set", "prune.ratio=7"), 2, "must be below 1"),
        (("plan", DEMO, "--set", "model.source=./nowhere"), 3, "nowhere"),
        (("apply", DEMO, "--until", "never"), 2, "--until: found 'never'"),
        (("apply",), 2, "Missing argument 'RECIPE'"),
        (("plan", DEMO, "--no-such-flag"), 2, "No such option"),
        (("inspect", "nowhere"), 2, "nowhere"),
        (("verify", "nowhere"), 3, "nowhere"),
        (("lock", "-"), 2, "is empty"),
    ],
)
def test_a_refusal_is_a_document(arguments: tuple[str, ...], code: int, said: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", (tmp_path / "empty").open("w+"))
    done = command(*arguments, "--json")
    document = done.json()
    assert document["exit"] == done.code == code, done.stderr
    assert said.rstrip(".") in document["error"] and document["error"].splitlines()[0] in done.stderr


def test_problems_come_with_their_places(tmp_path: Path) -> None:
    document = command("plan", DEMO, "--set", "prune.ratio=7", "--set", "quantize.method=x", "--json").json()
    assert {problem["path"] for problem in document["problems"]} == {"prune.ratio", "quantize.method"}


def test_a_defect_is_a_document_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reapkit.cli.recipes.load_and_plan", lambda *_, **__: 1 / 0)
    document = command("plan", DEMO, "--json").json()
    assert document["exit"] == 1 and "ZeroDivisionError" in document["error"]


@pytest.mark.parametrize("name", [found.name or found.callback.__name__ for found in app.registered_commands])
def test_every_help_names_the_flags_of_all_commands(name: str) -> None:
    said = " ".join(command(name, "--help").stdout.split())
    for flag in ("--quiet", "--verbose", "--debug", "--version"):
        assert flag in said


@pytest.mark.parametrize("arguments", [("--version",), ("plan", "--version"), ("apply", "demo", "--version")])
def test_version(arguments: tuple[str, ...]) -> None:
    done = command(*arguments)
    assert (done.code, done.stdout) == (0, f"reapkit {__version__}\n")


def test_quiet_leaves_results_and_warnings(tmp_path: Path) -> None:
    places = [f"--set=runtime.store={tmp_path / 'store'}", f"--set=output.directory={tmp_path / 'run'}"]
    few = ["--set=calibration.samples=4", "--set=calibration.max_length=512"]
    loud = command("apply", DEMO, "--until", "calibrate", *places, *few)
    quiet = command("apply", DEMO, "--until", "calibrate", *places, *few, "--quiet")
    assert "calibrate: running" in loud.stderr and "calibrate" not in quiet.stderr
    assert quiet.stdout.startswith("Nothing to do")
