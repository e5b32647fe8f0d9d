"""Chromium for the tests of pages, which are skipped without it or its driver."""

from __future__ import annotations

import contextlib
import importlib.util
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


def missing() -> str | None:
    """Returns what the tests need that is not here."""
    if CHROMIUM is None:
        return "Chromium (Debian: chromium)"
    drivers = ("playwright", "axe_playwright_python")
    return None if all(map(importlib.util.find_spec, drivers)) else "the extra test-browser"


needed = pytest.mark.skipif(missing() is not None, reason=f"needs {missing()}")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window."""
    from playwright import sync_api  # pyright: ignore[reportMissingImports]

    with sync_api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


def barriers(page: Any, **options: Any) -> list[Any]:
    """What axe finds serious or critical, with the elements; `options` are axe's own."""
    from axe_playwright_python import sync_playwright  # pyright: ignore[reportMissingImports]

    found = sync_playwright.Axe().run(page, options=options).response
    assert found["passes"]
    return [
        (fault["id"], [node["html"][:200] for node in fault["nodes"]])
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
    ]
