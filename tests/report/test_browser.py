"""Chromium opens the pages: every section and chart, both themes, wide and narrow; the slider; the numbers against the
exported table."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from reapkit.report.export import export
from reapkit.report.observation_report import write_observation_report
from reapkit.report.pictures import DRAWN, PATIENCE_MS
from reapkit.report.run_report import write_run_report
from reapkit.report.view import View
from reapkit.selection import statistics
from tests.support import synthetic_report as synthetic
from tests.support.browser import DESK, PHONE, assert_readable, chromium, flaws, held, opened, remove

__all__ = ["chromium"]

LARGEST_PAGE = 15_000_000
USABLE_SECONDS, DRAWN_SECONDS, REACTION_SECONDS = 3, 6, 0.5


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about 60 layers of 512 experts."""
    page = tmp_path_factory.mktemp("big") / "observation.html"
    write_observation_report(synthetic.observation(60, 512, 4, 8, tokens=20_000), None, page)
    return page


@pytest.mark.parametrize("rejected", [False, True])
def test_a_run_is_readable_everywhere(chromium, rejected, tmp_path):
    write_run_report(
        synthetic.facts(rejected=rejected, losses={"ratio-0.5": 0.3, "ratio-0.4": 0.3 if rejected else 0.03}),
        tmp_path / "run.html",
    )
    assert_readable(chromium, tmp_path / "run.html")


@pytest.mark.long
def test_a_large_observation_is_readable_everywhere(chromium, big):
    assert_readable(chromium, big)


def test_every_chart_is_drawn_once_the_page_is_loaded(chromium, tmp_path):
    """A plain screenshot is taken at the load event: nobody has scrolled or waited."""
    write_run_report(synthetic.facts(), tmp_path / "run.html")
    context = chromium.new_context(viewport={"width": DESK, "height": 900})
    page = context.new_page()
    page.add_init_script(
        "addEventListener('load', () => { window.atLoad = [...document.querySelectorAll('.chart')].map("
        "chart => chart.querySelectorAll('.main-svg').length > 0); });"
    )
    page.goto((tmp_path / "run.html").as_uri())
    drawn = page.evaluate("window.atLoad")
    assert len(drawn) > 15 and all(drawn)
    assert page.locator("iframe").count() == 0
    context.close()


def test_the_navigation_names_the_section_that_is_read(chromium, tmp_path):
    write_run_report(synthetic.facts(), tmp_path / "run.html")
    for width in (DESK, PHONE):
        with opened(chromium, tmp_path / "run.html", width) as page:
            page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
            if width == PHONE:
                assert not page.locator(".links").is_visible()
                page.locator("nav summary").click()
            page.locator("nav a[href='#cut']").click()
            page.wait_for_function("document.querySelector('.links a.here')?.hash === '#cut'")
            assert page.locator(".links a.here").count() == 1
            nav, heading, slider = (page.locator(each).bounding_box() for each in ("nav", "#cut h2", ".slider"))
            assert nav["y"] == 0 and heading["y"] >= nav["height"]
            if width == PHONE:
                assert page.locator("nav summary").inner_text() == "Sections: Cut"
            page.locator("#distributions").scroll_into_view_if_needed()
            page.evaluate("scrollBy(0, 300)")
            nav, slider = (page.locator(each).bounding_box() for each in ("nav", ".slider"))
            assert slider["y"] >= nav["y"] + nav["height"]  # it stays in sight below the navigation, however many lines


@pytest.mark.long
def test_a_large_observation_is_small_and_quick(chromium, big):
    """Time is what the page's own thread takes of a processor: that on an idle machine, however busy this one is."""
    assert big.stat().st_size <= LARGEST_PAGE
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(PATIENCE_MS)
    metrics = page.context.new_cdp_session(page)
    metrics.send("Performance.enable", {"timeDomain": "threadTicks"})

    def seconds() -> float:
        page.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )  # what was asked for is on the screen
        return {each["name"]: each["value"] for each in metrics.send("Performance.getMetrics")["metrics"]}["ThreadTime"]

    page.goto(big.as_uri(), wait_until="commit")
    page.wait_for_function("document.documentElement.dataset.usable === 'yes'")
    assert 0.05 < seconds() <= USABLE_SECONDS
    page.wait_for_function(DRAWN)
    assert seconds() <= DRAWN_SECONDS
    page.locator("#heat").scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    before, read = seconds(), page.locator("#readout").inner_text()
    page.locator("#removed").evaluate("slider => { slider.value = 100; slider.dispatchEvent(new Event('input')); }")
    assert seconds() - before <= REACTION_SECONDS and page.locator("#readout").inner_text() != read
    page.wait_for_timeout(1000)
    assert held(page, "heat")["data"][1]["z"][7].count(None) == 412 and seconds() - before <= 2 * REACTION_SECONDS
    page.close()


def test_figures_are_the_exported_table(chromium, tmp_path):
    observed = synthetic.observation()
    write_observation_report(observed, None, tmp_path / "page.html")
    export(observed, tmp_path)
    table = pq.read_table(tmp_path / "saliency.parquet").to_pandas()
    of_all = table[table["source"] == "all"]
    columns = {
        name: of_all.pivot(index="layer", columns="expert", values=name).to_numpy()
        for name in ("count", "gate_norm_sum", "saliency_mean")
    }
    with opened(chromium, tmp_path / "page.html") as page:
        cut, balance, floor = (held(page, name)["data"] for name in ("cut-curve", "balance", "floor"))
        heat, specialists = held(page, "heat")["data"], held(page, "specialists")["data"][0]
        page.select_option("select[data-chart=specialists]", "0")
        lifts = held(page, "specialists")["data"][0]["z"]
    saliency = torch.tensor(columns["saliency_mean"])  # NaN: never routed
    order = saliency.nan_to_num(nan=-torch.inf).argsort(dim=1, stable=True)
    for trace, name in zip(cut, ("count", "gate_norm_sum"), strict=False):
        column = torch.tensor(columns[name], dtype=torch.float64)
        assert trace["y"] == pytest.approx(
            [float(column.gather(1, order[:, :k]).sum() / column.sum()) for k in range(17)]
        )
    half = order[:, :8]
    assert floor[0]["y"] == pytest.approx(
        saliency.gather(1, half).nan_to_num(nan=-torch.inf).amax(1).tolist(), rel=1e-6
    )
    assert balance[0]["y"] == pytest.approx([float(row.std() / row.mean()) for row in columns["count"]])
    assert [[expert for expert, cell in enumerate(row) if cell is not None] for row in heat[1]["z"]] == half.sort(
        1
    ).values.tolist()
    assert (
        f"expert 3: {'dropped' if 3 in half[2] else 'kept'}<br>saliency {float(saliency[2, 3]):.3g},"
        in heat[0]["text"][2][3]
    )
    rates = {
        name: table[table["source"] == name].pivot(index="layer", columns="expert", values="count").to_numpy() / scored
        for name, scored in zip(observed.sources, observed.scored_tokens.tolist(), strict=True)
    }
    busiest = [max(range(3), key=lambda s: list(rates.values())[s][1][e]) for e in range(16)]
    assert specialists["z"][1] == busiest
    assert lifts[1] == pytest.approx(
        [3 * rates["code"][1][e] / sum(rate[1][e] for rate in rates.values()) for e in range(16)], rel=1e-5
    )


def test_the_slider_and_the_sentences_say_what_the_statistics_say(chromium, tmp_path):
    observed = synthetic.observation()
    view = View.of(observed, None)
    write_observation_report(observed, None, tmp_path / "page.html")
    curve = statistics.cut_curve(view.summed, view.saliency)
    with opened(chromium, tmp_path / "page.html") as page:
        captions = page.locator("figcaption")
        drawn = captions.all_inner_texts()
        said = remove(page, 5)
        moved = captions.all_inner_texts()
        page.select_option("select[data-chart=distribution-2]", "0")
        title = page.locator("figure", has=page.locator("#distribution-2")).locator("h3").inner_text()
    written = (tmp_path / "page.html").read_text()
    assert all(
        f"<figcaption>{caption}</figcaption>".replace("'", "&#39;") in written for caption in drawn
    )  # the script's own sentences are the page's
    assert (
        f"Removes {100 * curve.traffic[5]:.1f} % of the routed traffic and {100 * curve.mass[5]:.1f} % of the saliency"
        " mass" in said
    )
    assert moved != drawn and title == "Layer 0"


@pytest.mark.parametrize(("width", "theme", "other"), [(DESK, "light", "dark"), (PHONE, "dark", "light")])
def test_the_theme_can_be_switched(chromium, tmp_path, width, theme, other):
    write_observation_report(synthetic.observation(), None, tmp_path / "page.html")
    with opened(chromium, tmp_path / "page.html", width, theme) as page:
        before = held(page, "floor")["data"][0]["line"]["color"]
        page.locator("#theme").click()
        assert (
            page.locator("html").get_attribute("data-theme") == other
            and held(page, "floor")["data"][0]["line"]["color"] != before
        )
        assert flaws(page) == []
