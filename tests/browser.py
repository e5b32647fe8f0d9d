"""Chromium for the tests of pages; without it, or its driver, the module that asks is skipped."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}

if CHROMIUM is None:
    pytest.skip("needs Chromium (Debian: chromium)", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra test-browser")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs test-browser")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window."""
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


def barriers(page: Any, **options: Any) -> list[Any]:
    """What axe finds serious or critical, with the elements; `options` are axe's own."""
    found = axe.Axe().run(page, options=options).response
    assert found["passes"]
    return [
        (fault["id"], [node["html"][:200] for node in fault["nodes"]])
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
    ]
