"""Every broken recipe is answered with exactly the expected lines, exit code 2, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.support.command import command

CASES = yaml.safe_load((Path(__file__).parent / "broken.yaml").read_text())


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_broken_recipe(case: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"recipe.yaml": case["recipe"], **case.get("files", {})}
    for name, text in files.items():
        Path(name).write_text(text)
    overrides = [argument for text in case.get("set", ()) for argument in ("--set", text)]
    done = command("apply", "recipe.yaml", *overrides)
    assert done.code == 2
    assert done.stderr.rstrip("\n") == "\n".join(case["expected"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(files)


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 80


def test_files_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.yaml").write_bytes("version: 1\nname: caf\xe9\n".encode("latin-1"))
    Path("huge.yaml").write_text("# " + "x" * 1_000_001)
    Path("folder.yaml").mkdir()
    for name, said in (
        ("latin.yaml", "latin.yaml:2 is not UTF-8 (byte 0xe9). Save it as UTF-8."),
        ("huge.yaml", "huge.yaml is larger than 1,000,000 bytes. A recipe is a short YAML file."),
    ):
        done = command("validate", name)
        assert done.code == 2 and done.stderr.strip() == said
    done = command("validate", "folder.yaml")
    assert done.code == 2 and "folder.yaml: is a folder" in done.stderr


def test_an_unknown_recipe_names_the_shipped_ones() -> None:
    done = command("plan", "dmeo")
    assert done.code == 2 and "dmeo: the recipe file does not exist. Did you mean 'demo'?" in done.stderr
