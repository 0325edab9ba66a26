"""Commands where the machine refuses: each ends with a documented code, says where, what and what to do, and loses
nothing."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from reapkit.core.atomic_files import write_text
from tests.support import synthetic_report as synthetic
from tests.support.paths import ROOT

DOCUMENTED = {0, 2, 3, 4, 130}
SMALL = ["--set=calibration.samples=16", "--until=calibrate"]
COMMANDS = {
    "init": ["init", "builtin:demo", "-o", "{out}"],
    "export": ["export", "observation", "{out}"],
    "report": ["report", "observation", "-o", "{out}"],
    "compare": ["compare", "observation", "observation", "--html", "{out}"],
    "merge": ["merge", "observation", "observation", "-o", "{out}"],
    "apply": ["apply", "demo", *SMALL, "--set=output.directory={out}", "--set=runtime.store={out}/store"],
    "schema": ["schema"],
    "inspect": ["inspect", "observation"],
}
WRITING = [name for name in COMMANDS if name not in ("schema", "inspect")]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small observation, whose source has a name that ASCII cannot say."""
    root = tmp_path_factory.mktemp("artifacts")
    synthetic.observation().save(root / "observation")
    facts = root / "observation" / "observation.json"
    told = json.loads(facts.read_text(encoding="utf-8"))
    told["sources"][0] = "Gespräche"
    write_text(facts, json.dumps(told, ensure_ascii=False))
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


def ended(root: Path, name: str, out: Path | str = "", redirect: str = "", **environment: str) -> tuple[int, str, str]:
    """Code, standard output and error of a command that a shell runs in `root`, `redirect` behind it."""
    arguments = [argument.format(out=out) for argument in COMMANDS[name]]
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"$@" {redirect}', "bash", sys.executable, "-m", "reapkit", *arguments],
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
    return done.returncode, done.stdout, done.stderr


def assert_no_defect(said: str) -> None:
    for word in ("Traceback", "internal error", "Exception ignored", "lost sys.stderr"):
        assert word not in said, said


@pytest.mark.parametrize("name", COMMANDS)
def test_ascii_and_no_home_lose_no_output(artifacts: Path, tmp_path: Path, name: str) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, shown, said = ended(artifacts, name, tmp_path / "out", **ascii_only)
    assert code == 0, said
    assert_no_defect(said)
    assert shown.isascii() and shown.strip()
    if name == "inspect":
        assert r"Gespr\xe4che" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_standard_output_is_told_and_the_work_is_done(
    artifacts: Path, full: Path, tmp_path: Path, name: str
) -> None:
    code, _, said = ended(artifacts, name, tmp_path / "out", f"> {full}")
    assert code == 3
    assert_no_defect(said)
    assert "reapkit: standard output: No space left on device. Free some space" in said
    assert (tmp_path / "out").exists() == (name in WRITING)


@pytest.mark.parametrize("name", ["inspect", "compare", "merge", "apply"])
@pytest.mark.parametrize("redirect", ["| true", "2>&1 | true", ">&-", "2>&-", ">&- 2>&- <&-"])
def test_nobody_who_reads_ends_no_work(artifacts: Path, tmp_path: Path, name: str, redirect: str) -> None:
    code, _, said = ended(artifacts, name, tmp_path / "out", redirect)
    assert code == 0 or (code == 3 and "standard output: Bad file descriptor" in said), said
    assert_no_defect(said)
    assert (tmp_path / "out").exists() == (name in WRITING)


@pytest.mark.parametrize("name", WRITING)
def test_a_file_where_a_folder_is_needed_stays(artifacts: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, said = ended(artifacts, name, tmp_path / "file" / "out")
    assert code in DOCUMENTED - {0}, said
    assert_no_defect(said)
    assert str(tmp_path / "file") in said and said.rstrip().endswith(".")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["init", "report", "compare"])
def test_a_folder_where_a_file_is_needed_stays(artifacts: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    code, _, said = ended(artifacts, name, tmp_path / "folder")
    assert code in (2, 3), said
    assert_no_defect(said)
    assert str(tmp_path / "folder") in said
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "mine"]


@pytest.mark.parametrize("name", WRITING)
def test_a_place_that_takes_no_files_is_named(artifacts: Path, name: str) -> None:
    code, _, said = ended(artifacts, name, "/proc/reapkit/out")
    assert code in (3, 4), said
    assert_no_defect(said)
    assert "/proc/reapkit" in said and said.rstrip().endswith("."), said


@pytest.mark.parametrize("name", WRITING)
def test_a_missing_folder_is_made(artifacts: Path, tmp_path: Path, name: str) -> None:
    code, _, said = ended(artifacts, name, tmp_path / "not" / "there" / "out")
    assert code == 0, said
    assert (tmp_path / "not" / "there" / "out").exists()


@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_device_is_written_to_and_never_replaced(artifacts: Path, full: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "full").symlink_to(full)  # a link: were it replaced, the device itself would stay
    code, _, said = ended(artifacts, name, tmp_path / "full")
    assert code == 3, said
    assert_no_defect(said)
    assert f"reapkit: {full}: No space left on device." in said
    assert (tmp_path / "full").is_char_device() and os.listdir(tmp_path) == ["full"]
