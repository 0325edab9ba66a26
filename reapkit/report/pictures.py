"""Saves a page's charts as PNG files: a headless Chromium draws the page itself, so that figure and page are
identical."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from reapkit.core.atomic_files import write_bytes, write_text
from reapkit.core.errors import UnusableError

if TYPE_CHECKING:
    from playwright.sync_api import Browser

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
CAPTIONS = "captions.md"
WIDTH, SCALE = 1200, 3  # of the window in pixels; picture pixels per window pixel
PATIENCE_MS = 120_000  # for a large page on a busy machine
DRAWN = "document.documentElement.dataset.ready === 'yes' || document.documentElement.dataset.errors"
PICTURES = """scale => Promise.all([...document.querySelectorAll('.chart')].map(async chart => ({
  id: chart.id, title: chart.closest('figure').querySelector('h3').textContent,
  sentence: chart.closest('figure').querySelector('figcaption').textContent,
  png: await Plotly.toImage({data: chart.data, layout: {...chart.layout, paper_bgcolor: '#fff', plot_bgcolor: '#fff'}},
    {format: 'png', width: chart.clientWidth, height: Number(chart.dataset.height), scale})})))"""


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium: the system's, else the one that playwright installed. Raises UnusableError where there is
    none."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise UnusableError(
            "export --png draws with a browser through the package playwright, which is missing. Run: pip install"
            " 'reapkit[png]'"
        ) from None
    found = next((path for command in COMMANDS if (path := shutil.which(command))), None)
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=found)
        except Error as error:
            raise UnusableError(
                f"No Chromium could be started ({str(error).strip().splitlines()[0]}). Looked for"
                f" {', '.join(COMMANDS)}. Install one, for example with `apt-get install chromium` or `playwright"
                " install chromium`."
            ) from error
        try:
            yield started
        finally:
            started.close()


def write_pictures(page_html: Path, directory: Path) -> list[Path]:
    """One PNG per chart of the page, in light colours on white, and captions.md with what each shows; returns their
    paths.

    Raises UnusableError without a browser, and where the page holds no chart or does not draw.
    """
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": WIDTH, "height": 900})
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"{Path(page_html).resolve().as_uri()}#theme=light")
        if not page.locator(".chart").count():
            raise UnusableError(f"{page_html}: the page has no charts.")
        page.wait_for_function(DRAWN)
        if errors := page.evaluate("document.documentElement.dataset.errors"):
            raise UnusableError(f"{page_html}: the page cannot be drawn: {errors}")
        pictures = page.evaluate(PICTURES, SCALE)
    for picture in pictures:
        write_bytes(directory / f"{picture['id']}.png", base64.b64decode(picture["png"].split(",", 1)[1]))
    captions = directory / CAPTIONS
    write_text(
        captions, "".join(f"**{each['title']}.** {each['sentence']}\n\n![]({each['id']}.png)\n\n" for each in pictures)
    )
    return [*(directory / f"{picture['id']}.png" for picture in pictures), captions]
