"""What a calibration's key is made of: whatever can change its rows changes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from reapkit.calibration import identity
from reapkit.calibration.builtin import generators

BESIDE = Path(generators.__file__).parent


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
