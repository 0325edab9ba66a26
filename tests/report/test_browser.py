"""Chromium draws every chart of the pages, in both themes and at a phone's width, without an error."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

import synthetic
from reapkit import statistics
from reapkit.report import write_observation_report, write_run_report
from reapkit.report.view import View

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--virtual-time-budget=12000")
pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to draw pages")]


def dom(url: str, tmp_path, width: int = 1200) -> str:
    """The page's document after its script has run."""
    done = subprocess.run([CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom", url],
                          capture_output=True, text=True, timeout=120)
    return done.stdout


def inside(page: str, script: str, tmp_path) -> str:
    """The title that a script sets after it has seen the page in a frame as wide as a phone."""
    frame = tmp_path / "frame.html"
    frame.write_text(f'<body><iframe src="{page}" style="width:390px;height:3000px;border:0"></iframe>'
                     f"<script>onload = () => setTimeout(() => {{ {script} }}, 6000)</script>")
    done = subprocess.run([CHROMIUM, *FLAGS, "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{frame}"],
                          capture_output=True, text=True, timeout=120)
    return re.search(r"<title>(.*?)</title>", done.stdout).group(1)


@pytest.mark.parametrize(("kind", "theme"), [("observation", "dark"), ("run", "light"), ("rejected", "dark")])
def test_every_chart_is_drawn(kind, theme, tmp_path):
    page = tmp_path / "page.html"
    if kind == "observation":
        write_observation_report(synthetic.observation(), None, page)
    else:
        write_run_report(synthetic.facts(rejected=kind == "rejected"), page)
    html = dom(f"file://{page}#draw=all&theme={theme}", tmp_path)
    root = re.search(r"<html[^>]*>", html).group()
    assert 'data-ready="yes"' in root and "data-errors" not in root and f'data-theme="{theme}"' in root
    charts = re.findall(r'<div class="chart[^"]*" id="([^"]+)"', html)
    assert len(charts) > 10 and html.count('class="main-svg"') >= len(charts)
    assert re.search(r'id="readout"[^>]*>Deletes [\d.]+ %', html)


def test_the_slider_says_what_the_statistics_say(tmp_path):
    observed = synthetic.observation()
    view = View.of(observed, None)
    write_observation_report(observed, None, tmp_path / "page.html")
    curve = statistics.cut_curve(view.summed, view.saliency)
    script = ("const page = document.querySelector('iframe').contentDocument; const slider = page.getElementById('removed'); slider.value = 5;"
              "slider.dispatchEvent(new Event('input')); setTimeout(() => { document.title = page.getElementById('readout').textContent; }, 1000)")
    said = inside("page.html#draw=all", script, tmp_path)
    assert f"Deletes {100 * curve.traffic[5]:.1f} % of the routed traffic and {100 * curve.mass[5]:.1f} % of the saliency mass" in said


def test_the_page_is_no_wider_than_a_phone(tmp_path):
    write_run_report(synthetic.facts(), tmp_path / "page.html")
    assert inside("page.html#draw=all", "const page = document.querySelector('iframe').contentDocument.documentElement;"
                  "document.title = `beyond the edge: ${page.scrollWidth - page.clientWidth}`", tmp_path) == "beyond the edge: 0"
