"""Charts as files for papers: every chart of the page, with its sentence; and what is said where no browser can draw
them."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from reapkit.core.errors import UnusableError
from reapkit.report import pictures
from reapkit.report.run_report import write_run_report
from tests.support import synthetic_report as synthetic
from tests.support.browser import can_browse
from tests.support.command import command
from tests.support.paths import ROOT

__all__ = ["can_browse"]


def size_of(png: Path) -> tuple[int, int]:
    """Width and height in pixels, out of the file's own header."""
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR"
    return struct.unpack(">II", head[16:24])


def test_every_chart_of_a_run_becomes_a_picture(can_browse, tmp_path):
    write_run_report(synthetic.facts(), tmp_path / "run.html")
    files = pictures.write_pictures(tmp_path / "run.html", tmp_path / "figures")
    page, captions = (tmp_path / "run.html").read_text(), (tmp_path / "figures" / "captions.md").read_text()
    assert [file.name for file in files] == [
        *(f"{chart}.png" for chart in re.findall(r'<div class="chart" id="([^"]+)"', page)),
        "captions.md",
    ]
    for picture in files[:-1]:
        width, height = size_of(picture)
        assert width >= 3 * 250 and height >= 3 * 80 and picture.stat().st_size > 3000, picture.name
        assert f"]({picture.name})" in captions
    assert "**Size on disk.** 5.4 MB of 7.3 MB were saved" in captions


@pytest.mark.long
def test_export_draws_an_observation_without_its_tables(can_browse, tmp_path):
    synthetic.observation().save(tmp_path / "observation")
    done = command("export", tmp_path / "observation", "--png", tmp_path / "figures")
    assert done.code == 0
    assert str(tmp_path / "figures" / "cut-curve.png") in done.stdout.split()
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".png", ".md"}


def test_without_a_chromium_it_says_what_to_install(tmp_path, monkeypatch):
    pytest.importorskip("playwright", reason="the message is about playwright's own browser")
    monkeypatch.setattr(pictures, "COMMANDS", ("no-such-browser",))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path / "none"))
    with pytest.raises(
        UnusableError,
        match=(
            r"No Chromium could be started .*Looked for no-such-browser\. Install one, for"
            r" example with"
        ),
    ):
        pictures.write_pictures(tmp_path / "page.html", tmp_path)
    synthetic.observation().save(tmp_path / "observation")
    done = command("export", tmp_path / "observation", "--png", tmp_path / "figures")
    assert done.code == 3
    assert "apt-get install chromium" in done.stderr and not (tmp_path / "figures").exists()


def test_export_without_a_place_is_a_usage_error(tmp_path):
    done = command("export", tmp_path)
    assert done.code == 2
    assert "Give DIR for the tables, --png DIR for the charts, or both." in done.stderr


def test_the_readme_shows_pictures_that_are_there_and_small():
    root = ROOT
    shown = re.findall(r"!\[[^\]]+\]\((docs/[^)]+)\)", (root / "README.md").read_text())
    assert len(shown) >= 2 and all(
        (root / name).stat().st_size < 300_000 and size_of(root / name)[0] >= 1000 for name in shown
    )
