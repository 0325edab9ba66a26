"""One llm-compressor recipe with REAPModifier and one reapkit recipe give the same directory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.paths import ROOT

FOLDER = ROOT / "examples" / "llm_compressor"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import compare

    yield compare
    sys.modules.pop("compare", None)


@pytest.mark.long
def test_both_recipes_give_identical_tensors(
    script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", "--directory", str(tmp_path), "--set", "calibration.samples=16"])
    assert script.main() == 0
    assert "tensors, all identical" in capsys.readouterr().out
    file = tmp_path / "llm-compressor" / "model.safetensors"
    changed = load_file(file)
    name = next(name for name in changed if name.endswith("experts.3.up_proj.weight_scale"))
    changed[name] = changed[name] + 1
    save_file(changed, file, metadata={"format": "pt"})
    assert [
        line.split(":")[0]
        for line in script.differences(tmp_path / "reapkit" / "quantized", tmp_path / "llm-compressor")
    ] == [name]
