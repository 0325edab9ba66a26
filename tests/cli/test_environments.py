"""Commands where the machine refuses: each ends with a documented code, says where, what and what to do, and loses
nothing. Streams, encodings and the places of single outputs; disks are in test_full_disks, the rest in
test_broken_machines.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import synthetic_report as synthetic
from tests.support.broken_machines import NO_DEFECT, RECIPE, assert_told
from tests.support.command import Finished
from tests.support.forked import CLOSED, NOBODY, Forks
from tests.support.paths import ROOT

COMMANDS = {
    "init": ["init", "builtin:demo", "-o", "{out}"],
    "export": ["export", "observation", "{out}"],
    "report": ["report", "observation", "-o", "{out}"],
    "compare": ["compare", "observation", "observation", "--html", "{out}"],
    "merge": ["merge", "observation", "observation", "-o", "{out}"],
    "apply": [
        "apply",
        "small.yaml",
        "--until=calibrate",
        "--set=output.directory={out}",
        "--set=runtime.store={out}/store",
    ],
    "schema": ["schema"],
    "inspect": ["inspect", "observation"],
}
PRINTING = {
    **COMMANDS,
    "plan": ["plan", "small.yaml"],
    "plan as JSON": ["plan", "small.yaml", "--json"],
    "validate": ["validate", "small.yaml"],
    "lock": ["lock", "small.yaml"],
    "schema as Markdown": ["schema", "--markdown"],
    "help": ["--help"],
    "verify": ["verify", "runs/small"],
    "inspect a run": ["inspect", "runs/small"],
    "compare runs": ["compare", "runs/small", "runs/small"],
    "gc": ["gc", "--dry-run"],
}
WRITING = [name for name in COMMANDS if name not in ("schema", "inspect")]
ASCII_ONLY = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, commands: Forks) -> Path:
    """A folder with a small observation, whose source has a name that ASCII cannot say, a recipe and a run with a
    model."""
    root = tmp_path_factory.mktemp("artifacts")
    synthetic.observation().save(root / "observation")
    facts = root / "observation" / "observation.json"
    told = json.loads(facts.read_text(encoding="utf-8"))
    told["sources"][0] = "Gespräche"
    facts.write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    (root / "small.yaml").write_text(RECIPE)
    ended = commands.run("apply", "small.yaml", "--set=quantize.scheme=null", "--until=prune", directory=root)
    assert ended.code == 0, ended.stderr
    return root


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device on which no byte finds room."""
    if Path("/dev/full").is_char_device():
        return Path("/dev/full")
    place = tmp_path_factory.mktemp("devices") / "full"
    try:
        os.mknod(place, 0o600 | stat.S_IFCHR, os.makedev(1, 7))
    except OSError as error:
        pytest.skip(f"there is no /dev/full, and none can be made: {error}")
    return place


def filled_in(name: str, out: Path | str) -> list[str]:
    return [argument.format(out=out) for argument in PRINTING[name]]


def started_anew(root: Path, arguments: list[str], behind: str = "", **environment: str) -> Finished:
    """How a command ends that a shell starts in `root`, `behind` it."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"$@" {behind}', "bash", sys.executable, "-m", "reapkit", *arguments],
        cwd=root,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        env={
            **{key: value for key, value in os.environ.items() if key != "HOME"},
            **environment,
            "PYTHONPATH": str(ROOT),
        },
        timeout=300,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


# ---------------------------------------------------------------------------------------------- locale and home


@pytest.mark.parametrize("name", ["schema", "inspect", "report"])
def test_ascii_and_no_home_lose_no_output(artifacts: Path, tmp_path: Path, name: str) -> None:
    ended = started_anew(artifacts, filled_in(name, tmp_path / "out"), **ASCII_ONLY)
    assert_told(ended, 0)
    assert ended.stdout.isascii() and ended.stdout.strip()
    if name == "inspect":
        assert r"Gespr\xe4che" in ended.stdout


def test_names_that_the_locale_cannot_spell(tmp_path: Path) -> None:
    rows = [{"text": f"Grüße Nummer {number} an alle"} for number in range(64)]
    (tmp_path / "Gespräche.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = RECIPE.replace("builtin:code", "Gespräche.jsonl").replace("name: small", "name: small\ndescription: Größe")
    (tmp_path / "größe.yaml").write_text(text, encoding="utf-8")
    apply = ["apply", "größe.yaml", "--until=calibrate", "--set=output.directory=Läufe/ü", "--json"]
    ended = started_anew(tmp_path, apply, **ASCII_ONLY)
    assert_told(ended, 0)
    assert json.loads(ended.stdout)["directory"] == "Läufe/ü" and (tmp_path / "Läufe/ü/calibration").is_dir()
    for locale in (ASCII_ONLY, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        shown = started_anew(tmp_path, ["inspect", "größe.yaml"], **locale)
        assert_told(shown, 0)
        assert r"Gespr\xe4che.jsonl" in shown.stdout


def test_names_that_are_no_text(commands: Forks, tmp_path: Path) -> None:
    """File systems take any bytes; the bytes come out as they were."""
    (tmp_path / os.fsdecode(b"\xff.yaml")).write_text(RECIPE)
    name = "import os, sys\nsys.argv[2] = os.fsdecode(b'\\xff.yaml')"
    ended = commands.run("validate", "NAME", directory=tmp_path, before=name)
    assert_told(ended, 0)
    assert ended.stdout == os.fsdecode(b"\xff.yaml: valid\n")
    for command in ("plan", "apply", "lock"):
        until = ["--until=calibrate"] if command == "apply" else []
        assert_told(commands.run(command, "NAME", *until, directory=tmp_path, before=name), 0)


@pytest.mark.parametrize(("home", "name"), [("/nonexistent", "plan"), ("", "report"), ("/proc", "apply")])
def test_a_home_that_cannot_be_written_to(artifacts: Path, tmp_path: Path, home: str, name: str) -> None:
    ended = started_anew(artifacts, filled_in(name, tmp_path / "out"), HOME=home, XDG_CACHE_HOME=home)
    assert_told(ended, 0)
    assert (tmp_path / "out").exists() == (name in WRITING)


# ---------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("name", PRINTING)
def test_a_full_standard_output_is_told_and_the_work_is_done(
    commands: Forks, artifacts: Path, full: Path, tmp_path: Path, name: str
) -> None:
    ended = commands.run(*filled_in(name, tmp_path / "out"), directory=artifacts, stdout=full)
    assert "reapkit: standard output: No space left on device. Free some space" in assert_told(ended, 3)
    assert (tmp_path / "out").exists() == (name in WRITING)


@pytest.mark.parametrize("name", PRINTING)
@pytest.mark.parametrize("streams", ["stdout gone", "both gone", "closed"])
def test_nobody_who_reads_ends_no_work(
    commands: Forks, artifacts: Path, tmp_path: Path, name: str, streams: str
) -> None:
    gone: dict[str, Any] = {
        "stdout gone": {"stdout": NOBODY},
        "both gone": {"stdout": NOBODY, "stderr": NOBODY},
        "closed": {"stdout": CLOSED, "stderr": CLOSED, "stdin": CLOSED},
    }[streams]
    ended = commands.run(*filled_in(name, tmp_path / "out"), directory=artifacts, **gone)
    assert ended.code == 0, ended.stderr
    assert_told(ended, 0)
    assert (tmp_path / "out").exists() == (name in WRITING)


@pytest.mark.parametrize(
    ("name", "behind"),
    [("schema", "| head -1"), ("compare", "| true"), ("report", "2>&1 | true"), ("inspect", ">&-"), ("plan", "2>&-")],
)
def test_what_a_shell_does_with_the_streams(artifacts: Path, tmp_path: Path, name: str, behind: str) -> None:
    ended = started_anew(artifacts, filled_in(name, tmp_path / "out"), behind)
    assert_told(ended, 0, *([3] if behind == ">&-" else []))
    assert ended.code == 0 or "standard output: Bad file descriptor" in ended.stderr
    assert (tmp_path / "out").exists() == (name in WRITING)


def test_errors_that_nobody_reads_keep_their_code(commands: Forks, tmp_path: Path) -> None:
    for streams in ({"stderr": NOBODY}, {"stderr": CLOSED}, {"stdout": NOBODY, "stderr": NOBODY}):
        ended = commands.run("validate", "nothing.yaml", directory=tmp_path, **streams)
        assert ended.code == 2 and not any(words in ended.stderr for words in NO_DEFECT)


# ---------------------------------------------------------------------------------------------- places of outputs


@pytest.mark.parametrize("name", WRITING)
def test_a_file_where_a_folder_is_needed_stays(commands: Forks, artifacts: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    told = assert_told(commands.run(*filled_in(name, tmp_path / "file" / "out"), directory=artifacts), 2, 3, 4)
    assert str(tmp_path / "file") in told
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["init", "report", "compare"])
def test_a_folder_where_a_file_is_needed_stays(commands: Forks, artifacts: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    told = assert_told(commands.run(*filled_in(name, tmp_path / "folder"), directory=artifacts), 2, 3)
    assert str(tmp_path / "folder") in told
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "mine"]


@pytest.mark.parametrize("name", WRITING)
def test_a_place_that_takes_no_files_is_named(commands: Forks, artifacts: Path, name: str) -> None:
    assert "/proc" in assert_told(commands.run(*filled_in(name, "/proc/reapkit/out"), directory=artifacts), 3, 4)


@pytest.mark.parametrize("name", WRITING)
def test_a_missing_folder_is_made(commands: Forks, artifacts: Path, tmp_path: Path, name: str) -> None:
    assert_told(commands.run(*filled_in(name, tmp_path / "not" / "there" / "out"), directory=artifacts), 0)
    assert (tmp_path / "not" / "there" / "out").exists()


@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_device_is_written_to_and_never_replaced(
    commands: Forks, artifacts: Path, full: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "full").symlink_to(full)  # a link: were it replaced, the device itself would stay
    told = assert_told(commands.run(*filled_in(name, tmp_path / "full"), directory=artifacts), 3)
    assert f"reapkit: {full}: No space left on device." in told
    assert (tmp_path / "full").is_char_device() and os.listdir(tmp_path) == ["full"]


@pytest.mark.parametrize("name", ["report", "compare"])
def test_what_a_link_points_at_is_written(commands: Forks, artifacts: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "link").symlink_to("pages/page.html")
    for _ in range(2):
        assert_told(commands.run(*filled_in(name, tmp_path / "link"), directory=artifacts), 0)
        assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "pages") == ["page.html"]
    (tmp_path / "loop").symlink_to("loop")
    told = assert_told(commands.run(*filled_in(name, tmp_path / "loop"), directory=artifacts), 3)
    assert f"{tmp_path / 'loop'}: Too many levels of symbolic links. Links lead back to themselves" in told
    assert (tmp_path / "loop").is_symlink()
