"""The folder `runs` that reapkit makes ignores itself in git; a folder of the user's is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command import command

SMALL = ("apply", "demo", "--set=calibration.samples=16", "--until=calibrate")


@pytest.mark.parametrize("there", [None, [], [".gitignore"]])
def test_only_a_folder_of_its_own_ignores_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str] | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if there is not None:
        (tmp_path / "runs").mkdir()
    for name in there or []:
        (tmp_path / "runs" / name).write_text("mine\n")
    assert command(*SMALL).code == 0
    ignored = tmp_path / "runs" / ".gitignore"
    assert ignored.is_file() == (there != [])
    if ignored.is_file():
        assert ignored.read_text() == ("*\n" if there is None else "mine\n")


def test_a_directory_of_another_name_is_not_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*SMALL, "--set=output.directory=results/demo", "--set=runtime.store=results/store").code == 0
    assert not list(tmp_path.rglob(".gitignore"))
