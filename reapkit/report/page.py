"""Renders every report as one HTML file with its style, script, data and chart library inside, so that it opens
offline."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from reapkit.core.atomic_files import write_text
from reapkit.report.blocks import Page

ASSETS = files("reapkit.report") / "assets"


def write_page(page: Page, out_html: Path) -> None:
    """Writes the page, whole or not at all; equal pages give equal bytes."""
    write_text(Path(out_html), render(page))


def render(page: Page) -> str:
    """The page as HTML. Everything that comes from recipes, data or files is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_asset("page.html.j2"))
    return template.render(
        page=page,
        json=as_json,
        css=Markup(_asset("page.css")),
        js=Markup(_asset("page.js")),
        theme_js=Markup(_asset("theme.js")),
        plotly=Markup(_packed_plotly()) if page.has_charts else "",
    )


def as_json(value: Any) -> Markup:
    """`value` as JSON that no text in it can break out of a script element; numbers that are not finite become null."""
    text = json.dumps(_finite(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def _packed_plotly() -> str:
    """plotly's own bundle, gzipped: 2 MB of text instead of 4.8; the page unpacks it."""
    script = (files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(script, 9, mtime=0)).decode()
