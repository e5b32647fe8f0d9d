"""What `--cases` chooses: spread cases, other ones for other tests, and every rule in all."""

from __future__ import annotations

import argparse
import pathlib

import pytest

from tests import selection
from tests.transforms.rules import OPTIMIZERS


@pytest.mark.parametrize("count", [1, 2, 5, 16, 101])
@pytest.mark.parametrize("most", [1, 2, 4, 16])
def test_cases_are_spread(count, most):
    first, *_ = unsorted = selection.spread(7, count, most)
    assert [first] == selection.spread(7, count, 1)
    chosen = sorted(unsorted)
    assert len(set(chosen)) == len(chosen) == min(count, most)
    assert all(0 <= index < count for index in chosen)
    gaps = [(b - a) % count or count for a, b in zip(chosen, chosen[1:] + chosen[:1])]
    assert max(gaps) - min(gaps) <= 1


def test_tests_over_the_same_cases_take_one_after_another():
    tests = {f"test_{i}": ["a", "b", "c", "d"] for i in range(4)} | {"test_other": ["a", "b"]}
    found = selection.places(tests, 1)
    assert sorted(i for test, (i,) in found.items() if test != "test_other") == [0, 1, 2, 3]
    assert found == selection.places(tests, 1)
    assert selection.places({"test": [""]}, 3) == {"test": [0]}


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
    for rule in map(str, OPTIMIZERS):
        assert any(f"[{rule}" in name or f"-{rule}" in name for name in names), rule
