"""The page of a report: its HTML, and the charts that runs give."""

from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optax
import pytest

import jaxopt_lab
from experiments.harness import charts
from experiments.harness.calls import call_text
from experiments.harness.report import html
from experiments.harness.report.content import Axis, Chart, Curve, Page, Section, Table, Trace
from experiments.harness.runs import Run
from tests.experiments.made_up import CHARTS, COURSE, PAGE, TABLE

RESULTS = Path(charts.__file__).parents[1] / "results"
EMPTY = {"meta", "input", "br", "img", "hr", "link"}


class Elements(HTMLParser):
    """Reads a page whose elements are closed in their order, as lists of names and texts."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.found.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.found if name == tag]

    def said(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


@pytest.fixture(scope="module")
def made_up() -> str:
    return html(PAGE)


@pytest.fixture(scope="module")
def elements(made_up: str) -> Elements:
    return Elements(made_up)


def test_identifiers_are_unique_and_references_lead_somewhere(
    made_up: str, elements: Elements
) -> None:
    names = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(names) == len(set(names))
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', made_up))
    assert references
    assert references <= set(names)


def test_page_refers_to_nothing_outside(made_up: str, elements: Elements) -> None:
    assert not re.search(r"https?:|//\w|@import|\bsrc=|url\((?!#)", made_up)
    assert not elements.all("link")
    assert [link["href"] for link in elements.all("a")] == ["results.json"]


def test_every_curve_is_in_every_drawing_and_in_the_legend(made_up: str) -> None:
    for name, chart in CHARTS.items():
        (figure,) = re.findall(rf'<figure class="chart" id="{name}">.*?</figure>', made_up, re.S)
        drawings = re.findall(r'<svg id="[^"]*" class="view ([^"]*)".*?</svg>', figure, re.S)
        positive = all(y > 0 for curve in chart.curves for y in curve.mean.y)
        assert len(drawings) == len(chart.x) * (2 if positive else 1) * 2
        assert len(set(drawings)) == len(drawings)
        for index, curve in enumerate(chart.curves):
            # Each line, the band or bar, and the mean.
            lines = len(curve.runs) + (curve.low is not None) + 1
            assert figure.count(f'class="series-{index}"') >= lines * len(drawings)
        assert figure.count('<input type="checkbox"') == len(chart.curves)


def test_every_table_has_caption_units_and_rows(elements: Elements) -> None:
    assert any(TABLE.caption in text for text in elements.said("span"))
    assert "nats" in elements.said("span")
    cells = elements.said("td")
    assert all(cell in cells for row in TABLE.rows for cell in row[1:])
    heads = elements.said("th")
    start = heads.index("call") + 1
    assert heads[start : start + 2] == [row[0] for row in TABLE.rows]


def test_every_drawing_says_what_it_shows_and_its_result(elements: Elements) -> None:
    drawings = [one for one in elements.all("svg") if "view" in one.get("class", "")]
    assert {one["aria-label"] for one in drawings} == {
        f"{chart.caption}. {chart.result}" for chart in CHARTS.values()
    }
    assert all(one["role"] == "img" for one in drawings)


def test_values_of_a_course_are_a_table_too(elements: Elements) -> None:
    cells = elements.said("td")
    assert all(f"{y:.5g}" in cells for curve in COURSE.curves for y in curve.mean.y)


def test_points_are_placed_where_they_are_drawn(made_up: str) -> None:
    (first, _) = re.findall(r'<script type="application/json">(.*?)</script>', made_up, re.S)
    data = json.loads(first)
    assert data["names"] == [curve.name for curve in COURSE.curves]
    mean = data["traces"][1]
    for name, view in data["views"].items():
        (drawing,) = re.findall(rf'<svg id="{name}".*?</svg>', made_up, re.S)
        uses = re.findall(r'<g class="series-1">.*?</g></g>', drawing, re.S)[-1]
        drawn = [tuple(map(float, at)) for at in re.findall(r'<use [^>]*x="(\S+)" y="(\S+)"', uses)]
        places = data["places"][mean["x"][view["axis"]]]
        computed = [
            (_along(view["x"], False, x), _along(view["y"], view["logarithmic"], y))
            for x, y in zip(places, mean["y"], strict=True)
        ]
        assert len(drawn) == len(computed)
        for at, expected in zip(drawn, computed, strict=True):
            assert at == pytest.approx(expected, abs=0.6)  # markers are drawn at half pixels


def _along(ends: list[float], logarithmic: bool, value: float) -> float:
    f = math.log if logarithmic else float
    low, high, start, stop = ends
    return start + (f(value) - f(low)) / (f(high) - f(low)) * (stop - start)


@pytest.fixture(scope="module")
def stored() -> str:
    """A page of two charts of the comparison's results, with five optimizers."""
    content = json.loads((RESULTS / "compare.json").read_text())
    runs: dict[str, list[Run]] = {row["optimizer"]: [] for row in content["table"]}
    for run in content["runs"]:
        runs[run["optimizer"]].append(run)
    drawn = charts.loss_charts(runs, content["table"], "nats", content["target"])
    drawn += charts.rate_charts(runs, content["table"], "nats")
    return html(Page("Stored", content["verdict"], (Section("Results", charts=drawn),)))


def test_page_of_stored_results_is_small(stored: str) -> None:
    Elements(stored)
    assert len(stored.encode()) < 1_000_000 / 3  # others have three times as many curves


def run(rate: float, seed: int, *losses: float | None) -> dict[str, Any]:
    return {
        "learning_rate": rate,
        "seed": seed,
        "status": "diverged" if None in losses else "finished",
        "steps": [10 * i for i in range(len(losses))],
        "validation_loss": list(losses),
    }


def row(name: str, rate: float | None, loss: float | None) -> dict[str, Any]:
    return {
        "optimizer": name,
        "learning_rate": rate,
        "final_loss": loss,
        "final_loss_spread": None,
        "seconds_per_step": 0.5,
    }


def test_runs_are_drawn_up_to_where_they_diverge() -> None:
    runs = {
        "a": [run(0.1, 0, 5, 3, 2), run(0.3, 0, 5, 4, None), run(0.1, 1, 5, 3, 4)],
        "b": [run(0.1, 0, 5, None)],
    }
    rows = [row("a", 0.1, 3), row("b", None, None)]
    (chart,) = charts.loss_charts(runs, rows, "nats", target=3)
    (curve,) = chart.curves
    assert curve.mean.x == ([0, 10, 20], [0, 5, 10])
    assert curve.mean.y == [5, 3, 3]
    assert (curve.low, curve.high) == ([5, 3, 2], [5, 3, 4])
    assert {one.label: list(one.y) for one in curve.runs} == {
        "rate 0.1, seed 0": [5, 3, 2],
        "rate 0.3, seed 0": [5, 4],
        "rate 0.1, seed 1": [5, 3, 4],
    }
    assert chart.result == "a ends lowest at 3.0000. Diverged: b."
    (search,) = charts.rate_charts(runs, rows, "nats")
    assert [(c.name, c.mean.x, c.result) for c in search.curves] == [
        ("a", ([0.1],), "diverged at 0.3")
    ]


def test_nothing_is_drawn_where_all_diverged() -> None:
    runs, rows = {"b": [run(0.1, 0, 5, None)]}, [row("b", None, None)]
    assert charts.loss_charts(runs, rows, "nats") == []
    assert charts.rate_charts(runs, rows, "nats") == []


def test_calls_are_written_with_every_default_and_nested() -> None:
    def chained(rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.chain(optax.clip(1.0), optax.sgd(rate, momentum=0.1 + 0.2))

    assert call_text(chained) == (
        "optax.chain(optax.clip(max_delta=1), optax.sgd(learning_rate, momentum=0.3, "
        "nesterov=False, accumulator_dtype=None))"
    )
    bits = jaxopt_lab.quantization.bfloat16
    text = call_text(lambda rate: jaxopt_lab.quantize_state(optax.adam(rate), bits()))
    assert text.startswith("jaxopt_lab.quantize_state(inner=optax.adam(learning_rate, b1=0.9, ")
    assert text.endswith("min_size=4096, seed=0)")


def test_what_no_library_makes_has_its_own_name() -> None:
    def own(rate: optax.Schedule) -> object:
        optax.sgd(rate)
        return object()

    profiler = sys.getprofile()
    assert call_text(own) == "own"
    assert sys.getprofile() is profiler


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Trace("a", ([0, 1],), [1]), "a: 1 values at"),
        (lambda: Trace("a", ([],), []), "a: 0 values"),
        (lambda: Trace("a", ([0],), [math.nan]), "a: expected finite numbers"),
        (lambda: Chart("a", "", (), Axis("y"), ()), "a: expected at least one curve"),
        (
            lambda: Chart("a", "", (), Axis("y"), [Curve("b", Trace("c", ([0],), [1]))]),
            "a: b, c: expected places on 0 axes, got 1",
        ),
        (lambda: Table("a", (Axis("x"),), [("1", "2")]), "a: expected 1 cells"),
    ],
)
def test_what_cannot_be_shown_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
