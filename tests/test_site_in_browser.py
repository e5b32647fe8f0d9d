"""The built site (`python -m sphinx docs site`) in Chromium, as wide as a desk and a phone."""

from __future__ import annotations

import functools
import html
import pathlib
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

from tests.browser import SIZES, barriers, chromium, needed

SITE = pathlib.Path(__file__).parents[1] / "site"
ALL = sorted(path for path in SITE.rglob("*.html") if "_static" not in path.parts)
# Of the sources, which look alike, the first.
SOURCES = [path for path in ALL if "_modules" in path.parts]
PAGES = [path for path in ALL if path not in SOURCES[1:]]
# Minutes each, on the long pages of the reference, which are made of the same parts as the short.
SHORT = {path for path in PAGES if path.stat().st_size < 80_000}

pytestmark = [
    needed,
    pytest.mark.skipif(not PAGES, reason="needs the site: python -m sphinx docs site"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.mark.parametrize("size", SIZES)
def test_pages_fit_load_and_are_accessible(browser: Any, size: str) -> None:
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height})
    faults = []
    page.on("pageerror", lambda error: faults.append((page.url, str(error))))
    page.on("requestfailed", lambda request: faults.append((page.url, request.url)))
    page.on(
        "request", lambda request: request.url.startswith("http") and faults.append(request.url)
    )
    for path in PAGES:
        page.goto(path.as_uri())
        if page.evaluate("document.documentElement.scrollWidth") > width:
            faults.append((page.url, "is wider than the screen"))
        broken = page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)")
        faults += [(page.url, source) for source in broken]
        if size == "narrow" and path in SHORT:  # where more has to scroll
            # The arrows that open a branch of the side bar have no name: the theme's matter.
            found = barriers(page, preload=False, rules={"summary-name": {"enabled": False}})
            faults += [(page.url, fault) for fault in found]
    page.close()
    assert faults == []


@functools.cache
def places(path: pathlib.Path) -> set[str]:
    return set(map(html.unescape, re.findall(r'\b(?:id|name)="([^"]*)"', path.read_text())))


def test_links_of_the_site_lead_somewhere() -> None:
    faults = []
    for path in ALL:
        for link in set(re.findall(r'<a\b[^>]*\bhref="([^"]*)"', path.read_text())):
            target, place = map(unquote, urldefrag(html.unescape(link)))
            if re.match(r"[a-z]+:", target):
                continue
            file = (path.parent / target).resolve() if target else path
            if not file.exists() or (
                place and file.suffix == ".html" and place not in places(file)
            ):
                faults.append((str(path.relative_to(SITE)), link))
    assert faults == []
