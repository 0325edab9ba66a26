"""`report` finds or draws the page of what lies at a path, and opens it."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path

import pytest

from tests.support import synthetic_report as synthetic
from tests.support.command import command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that its page is found by."""
    directory = tmp_path_factory.mktemp("run")
    synthetic.observation().save(directory / "observation")
    (directory / "run.json").write_text(
        json.dumps({"recipe": "nowhere.yaml", "model": "some-lab/Small-MoE", "stages": {}})
    )
    (directory / "report.html").write_text("the run's own page")
    return directory


def test_a_run_has_its_own_page(run, tmp_path):
    done = command("report", run)
    assert done.code == 0 and done.stdout.strip() == str(run / "report.html")
    done = command("report", run, "-o", tmp_path / "new" / "page.html", "--json")
    assert done.code == 0 and done.json() == {"file": str(tmp_path / "new" / "page.html")}
    assert (tmp_path / "new" / "page.html").read_text() == "the run's own page"


def test_an_observation_is_drawn_under_its_models_name(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command("report", run / "observation")
    assert done.code == 0 and done.stdout.strip() == "observation.html"
    assert "What some-lab/Small-MoE showed" in (tmp_path / "observation.html").read_text()


def test_a_selection_is_marked_on_the_page(run, tmp_path):
    synthetic.selection(synthetic.observation(), 4).save(tmp_path / "selection")
    assert command("report", run, "--selection", tmp_path / "selection", "-o", tmp_path / "page.html").code == 0
    assert "4 of 16 (25 %), as decided" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("there", [True, False])
def test_the_page_opens_in_a_browser(run, there, monkeypatch):
    asked = []
    monkeypatch.setattr(webbrowser, "open", lambda url: asked.append(url) or there)
    done = command("report", run, "--open")
    assert done.code == 0
    assert asked == [(run / "report.html").resolve().as_uri()]
    assert ("No browser could be started" in done.stderr) == (not there)


def test_without_run_or_observation_there_is_no_page(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = command("report", tmp_path)
    assert done.code == 3 and "found no observation" in done.stderr
