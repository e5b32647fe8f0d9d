"""What `--cases` chooses: spread cases, other ones for other tests, and every rule in all."""

from __future__ import annotations

import argparse
import pathlib

import pytest

from tests import selection
from tests.transforms.rules import RULES


@pytest.mark.parametrize("count", [1, 2, 5, 16, 101])
@pytest.mark.parametrize("most", [1, 2, 4, 16])
def test_cases_are_spread(count, most):
    chosen = sorted(selection.spread("test", count, most))
    assert len(set(chosen)) == len(chosen) == min(count, most)
    assert all(0 <= index < count for index in chosen)
    gaps = [(b - a) % count or count for a, b in zip(chosen, chosen[1:] + chosen[:1])]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("count", [1, 7])
def test_more_cases_begin_with_the_same(count):
    assert len({selection.spread("test", count, most)[0] for most in range(1, 9)}) == 1


def test_other_tests_take_other_cases():
    together = set[int]().union(*(selection.spread(f"test_{i}", 16, 2) for i in range(30)))
    assert together == set(range(16))
    assert selection.spread("test_0", 16, 2) == selection.spread("test_0", 16, 2)


@pytest.mark.parametrize("text", ["0", "-1"])
def test_no_cases_are_refused(text):
    with pytest.raises(
        argparse.ArgumentTypeError, match=f"expected a positive integer, got {text}"
    ):
        selection.positive(text)


def test_a_run_of_everything_holds_every_rule(request):
    folders = {path.parent for path in pathlib.Path(__file__).parent.rglob("test_*.py")}
    if not folders <= {item.path.parent for item in request.session.items}:
        pytest.skip("a part of the tests")
    names = [item.name for item in request.session.items]
    for rule in map(str, RULES):
        assert sum(f"[{rule}" in name or f"-{rule}" in name for name in names) >= 3, rule
