"""The page of a report in Chromium: what a pointer, a finger, the keys and the switches do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from experiments.harness.report import html
from tests.browser import SIZES, barriers, chromium, needed
from tests.experiments.made_up import COURSE, PAGE

pytestmark = needed

BOTH_SIZES = pytest.mark.parametrize("size", SIZES)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html(PAGE), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Any]:
    """Opens the page at a size and in a colour scheme; no request leaves it, and no error."""
    pages, faults = [], []

    def open_page(size: str = "wide", scheme: str = "light") -> Any:
        width, height = SIZES[size]
        page = browser.new_page(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            has_touch=size == "narrow",
        )
        pages.append(page)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.on("request", lambda request: request.url == address or faults.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert faults == []


def place(page: Any, curve: int, number: int) -> tuple[float, float]:
    """Where a marker of a curve's mean is on the screen, in the first chart."""
    page.locator("#c0 .plot").scroll_into_view_if_needed()
    marks = page.locator(f"#c0 .view:visible .series-{curve}").last.locator("use")
    box = marks.nth(number).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def told(page: Any) -> list[str]:
    return page.locator("#c0 output").inner_text().split("\n")


def mark(page: Any) -> tuple[float, float]:
    box = page.locator("#c0 .mark").bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@BOTH_SIZES
@pytest.mark.parametrize("over", [0, 1], ids=["steps", "seconds"])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_the_value_under_the_pointer_is_told(opened: Any, size: str, over: int, scale: str) -> None:
    page = opened(size)
    page.locator(f"#c0 [value=x{over}]").check()
    page.locator(f"#c0 [value={scale}]").check()
    at = place(page, 1, 2)
    page.mouse.move(*at)
    assert told(page) == [
        "fast, rate 0.3, seed 0",
        "validation loss 1.5 nats",
        "steps 20, training time 5 s",
    ]
    assert mark(page) == pytest.approx(at, abs=2)
    page.mouse.move(1, 1)
    assert page.locator("#c0 output").is_hidden()


def test_a_mean_is_told_with_its_range_and_a_run_with_its_seed(opened: Any) -> None:
    page = opened()
    page.locator("#c0 .plot").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert told(page) == [
        f"{COURSE.curves[0].name}, mean of 2 seeds",
        "validation loss 2.5 nats (2.4 to 2.6)",
        "steps 30, training time 15 s",
    ]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert "mean of 2 seeds" in told(page)[0]
    page.keyboard.press("Escape")
    assert page.locator("#c0 output").is_hidden()
    page.keyboard.press("ArrowRight")
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    assert told(page)[0].endswith(", rate 0.1, seed 1")


def test_a_finger_reads_a_value_and_the_text_stays_on_the_screen(opened: Any) -> None:
    page = opened("narrow")
    page.touchscreen.tap(*place(page, 1, 3))
    assert told(page)[1] == "validation loss 1.25 nats"
    box = page.locator("#c0 output").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= SIZES["narrow"][0]


@BOTH_SIZES
def test_the_legend_hides_a_curve_and_its_values(opened: Any, size: str) -> None:
    page = opened(size)
    lines, name = page.locator("#c0 .view:visible .series-1"), page.locator("#c0 .key span").nth(1)
    struck = "getComputedStyle(document.querySelectorAll('#c0 .key span')[1]).textDecorationLine"
    at = place(page, 1, 2)
    plot = page.locator("#c0 .plot").bounding_box()
    assert page.evaluate(struck) == "none"
    assert lines.first.is_visible()
    name.click()
    assert not lines.first.is_visible()
    assert page.evaluate(struck) == "line-through"
    scrolled = page.locator("#c0 .plot").bounding_box()
    page.mouse.move(at[0] + scrolled["x"] - plot["x"], at[1] + scrolled["y"] - plot["y"])
    assert told(page)[0].startswith(COURSE.curves[0].name)
    assert page.locator("#c1 .view:visible .series-1").last.is_visible()
    name.click()
    assert lines.first.is_visible()


@BOTH_SIZES
def test_switches_show_one_drawing_each(opened: Any, size: str) -> None:
    page = opened(size)
    shown = page.locator("#c0 .view:visible")
    for over in (1, 0):
        for scale in ("log", "linear"):
            page.locator(f"#c0 [value=x{over}]").check()
            page.locator(f"#c0 [value={scale}]").check()
            assert shown.count() == 1
            assert shown.get_attribute("class") == f"view x{over} {scale} {size}"
    assert page.locator("#c1 .view:visible").count() == 1


@BOTH_SIZES
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_and_is_accessible(opened: Any, size: str, scheme: str) -> None:
    page = opened(size, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    page.mouse.move(*place(page, 0, 1))
    page.locator("summary").first.click()
    light = sum(
        map(int, page.evaluate("getComputedStyle(document.body).backgroundColor")[4:-1].split(","))
    )
    assert (light > 3 * 128) == (scheme == "light")
    assert barriers(page) == []


def test_page_can_be_read_without_its_script(browser: Any, address: str) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(address)
    page.locator("#c0 [value=log]").check()
    assert page.locator("#c0 .view:visible").get_attribute("class") == "view x0 log wide"
    page.close()
