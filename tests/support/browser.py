"""Reads a page as a person does: in a real Chromium, every section, both themes, wide and narrow, and says all that is
wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from reapkit.core.errors import UnusableError
from reapkit.report.pictures import PATIENCE_MS, browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

DESK, PHONE = 1200, 390

FLAWS = """() => {
  const flaws = [], far = (chart) => chart.getBoundingClientRect();
  for (const link of document.querySelectorAll('nav a')) {
    const section = document.querySelector(link.hash);
    if (!section) flaws.push(`no section ${link.hash}`);
    else if (!section.querySelector('h2').textContent.trim() || section.innerText.trim().split('\\n').length < 2)
      flaws.push(`section ${link.hash} is empty`);
  }
  for (const chart of document.querySelectorAll('.chart')) {
    const box = far(chart), say = (what) => flaws.push(`${chart.id}: ${what}`);
    const sentence = chart.closest('figure').querySelector('figcaption').textContent;
    if (!/\\d.*\\.$/s.test(sentence)) say('its sentence holds no number');
    if (!chart.data || !chart.querySelector('.main-svg')) { say('not drawn'); continue; }
    const lengths = (trace) => (typeof trace.y[0] === 'string' ? trace.x : trace.y);
    const values = (trace) => (trace.type === 'heatmap' ? trace.z.flat() : [...lengths(trace)]);
    const isNumber = (value) => value !== null && Number.isFinite(Number(value));
    if (!chart.data.some((trace) => values(trace).some(isNumber))) say('holds no number');
    const marks = [...chart.querySelectorAll('.mlayer path, .mlayer image')].map(far);
    if (!marks.some((mark) => mark.width + mark.height > 2)) say('shows no mark');
    for (const text of chart.querySelectorAll('svg text')) {
      const at = far(text);
      const beside = at.left < box.left - 1 || at.right > box.right + 1;
      const aboveOrBelow = at.top < box.top - 1 || at.bottom > box.bottom + 1;
      if (at.width && (beside || aboveOrBelow)) say(`clips '${text.textContent}'`);
    }
    for (const axis of ['xtick', 'ytick']) {
      const ticks = [...chart.querySelectorAll(`.${axis} text`)].map((text) => [text.textContent, far(text)]);
      const names = ticks.map(([name]) => name);
      if (new Set(names).size < names.length) say(`${axis} labels repeat: ${names.join(', ')}`);
      ticks.forEach(([one, a], i) => ticks.slice(i + 1).forEach(([other, b]) => {
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (across > 1 && down > 3) say(`'${one}' lies on '${other}'`);
      }));
    }
  }
  for (const text of document.querySelectorAll('h1, h2, h3, p, td, th, dd, figcaption, summary, button')) {
    const isUnsaid = /\\b(NaN|undefined|null|None)\\b/.test(text.textContent);
    if (isUnsaid && !text.closest('pre')) flaws.push(`says '${text.textContent}'`);
    const at = far(text);
    if (at.right > innerWidth + 1 && !text.closest('.table'))
      flaws.push(`'${text.textContent.slice(0, 40)}' leaves the page`);
  }
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const place = document.createRange();
  for (let node; (node = words.nextNode()); ) {
    if (node.parentElement.closest('code, pre, svg, script, style, noscript, select')) continue;
    for (const word of node.data.matchAll(/\\S+/g)) {
      if (word[0].length > 20 || /[-\u2010-\u2014\\/]/.test(word[0])) continue;  // may break
      place.setStart(node, word.index);
      place.setEnd(node, word.index + word[0].length);
      if (new Set([...place.getClientRects()].map((box) => Math.round(box.top))).size > 1)
        flaws.push(`breaks '${word[0]}'`);
    }
  }
  const nav = document.querySelector('nav'), menu = nav.querySelector('details'), isFolded = !menu.open;
  menu.open = true;
  for (const link of nav.querySelectorAll('a')) {
    const at = far(link), all = far(nav);
    const isCut = at.left < all.left || at.right > all.right || !at.width;
    const isFaded = getComputedStyle(link.parentElement).maskImage !== 'none';
    if (isCut || isFaded) flaws.push(`the navigation cuts '${link.textContent}'`);
  }
  if (nav.querySelector('.links').scrollWidth > nav.querySelector('.links').clientWidth)
    flaws.push('the navigation scrolls sideways');
  menu.open = !isFolded;
  for (const table of document.querySelectorAll('.table')) {
    const beyond = table.scrollWidth - table.clientWidth;
    const title = table.closest('section').querySelector('h2').textContent;
    if (beyond > 0) flaws.push(`the table under '${title}' scrolls sideways by ${beyond} px`);
  }
  const beyond = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  if (beyond > 0) flaws.push(`scrolls sideways by ${beyond} px`);
  return flaws;
}"""
"""All that is wrong with the page as it is drawn: empty sections and charts, clipped or overlapping labels, text that
leaves the page."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser for a file's tests."""
    with browser_or_skip() as started:
        yield started


@pytest.fixture(scope="module")
def can_browse() -> None:
    """For tests of what starts a browser of its own."""
    with browser_or_skip():
        pass


@contextmanager
def browser_or_skip() -> Iterator[Browser]:
    """One browser for the block. Where none can be started, the test is skipped with the reason; under continuous
    integration (`CI` is set) it fails."""
    started = browser()
    try:
        found = started.__enter__()
    except UnusableError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    try:
        yield found
    finally:
        started.__exit__(None, None, None)


@contextmanager
def opened(chromium: Browser, file: Path, width: int = DESK, theme: str = "light") -> Iterator[Page]:
    """The page once it is loaded; at its end nothing may have been written to the console."""
    context = chromium.new_context(
        viewport={"width": width, "height": 900}, color_scheme=theme, has_touch=width == PHONE, is_mobile=width == PHONE
    )
    context.set_default_timeout(PATIENCE_MS)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on(
        "request",
        lambda request: (
            said.append(f"asks for {request.url[:80]}")
            if not request.url.startswith(("file:", "data:", "blob:"))
            else None
        ),
    )
    page.goto(file.resolve().as_uri())
    yield page
    context.close()
    assert not said, "; ".join(said)


def flaws(page: Page) -> list[str]:
    """What is wrong with the page, in words."""
    return page.evaluate(FLAWS)


def remove(page: Page, experts: int) -> str:
    """Moves the page's slider and returns what it then reads."""
    page.locator("#removed").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", experts
    )
    page.wait_for_timeout(400)  # the heat map follows after a pause
    return page.locator("#readout").inner_text()


def held(page: Page, chart: str) -> dict[str, Any]:
    """A chart's data and layout as plotly holds them."""
    return page.evaluate(
        "id => { const {data, layout} = document.getElementById(id); return JSON.parse(JSON.stringify({data,"
        " layout})); }",
        chart,
    )


def assert_readable(chromium: Browser, file: Path) -> None:
    """In both themes, one wide and one narrow: no flaw, no word on the console; where there is a slider the page
    follows it."""
    for width, theme in ((DESK, "light"), (PHONE, "dark")):
        with opened(chromium, file, width, theme) as page:
            assert page.locator("html").get_attribute("data-theme") == theme
            assert not (found := flaws(page)), f"{file.name} at {width} px, {theme}: {'; '.join(found)}"
            if page.locator("#removed").count():
                _assert_follows(page)


def _assert_follows(page: Page) -> None:
    before = {name: held(page, name) for name in ("cut-curve", "heat", "floor")}
    read = page.locator("#readout").inner_text()
    assert read.startswith("Removes ")
    assert remove(page, 1) != read
    after = {name: held(page, name) for name in before}
    assert before["cut-curve"]["layout"]["shapes"] != after["cut-curve"]["layout"]["shapes"]
    dropped = [
        sum(cell is not None for row in each["heat"]["data"][1]["z"] for cell in row) for each in (before, after)
    ]
    assert dropped[1] == len(after["heat"]["data"][1]["z"]) < dropped[0]
    assert before["floor"]["data"][0]["y"] != after["floor"]["data"][0]["y"]
    assert not (found := flaws(page)), "; ".join(found)
