from __future__ import annotations

import concurrent.futures
import json

import pytest

from pallas_kernels.targets import compile_in_child
from tests.pallas_kernels.targets import needs

CASES = "tests.pallas_kernels.targets.cases"


def test_unknown_chip_is_refused_before_a_child_starts():
    with pytest.raises(ValueError, match="chip='h300' is not known"):
        compile_in_child(f"{CASES}:sgd", "h300")


@pytest.mark.parametrize("chip", [needs.on("h200"), needs.on("v5e")])
def test_report_is_json(chip):
    report = compile_in_child(f"{CASES}:sgd", chip)
    assert json.loads(json.dumps(report)) == report
    assert set(report) == {
        "function",
        "chip",
        "jax_version",
        "routes",
        "memory",
        "traffic",
        "scoped_memory",
    }


@pytest.mark.parametrize(
    ("chip", "function", "error", "message"),
    [
        needs.on("h200", "sgd", ValueError, "expected the function as 'package.module:function'"),
        needs.on("h200", f"{CASES}:absent", ValueError, "has no attribute 'absent'"),
        needs.on("h200", "absent.module:case", ValueError, "No module named 'absent'"),
        needs.on("h200", f"{CASES}:not_a_case", ValueError, r"returned int; expected a tuple \(fn"),
        needs.on("h200", f"{CASES}:refused", RuntimeError, "contracting dimensions"),
        needs.on("h200", f"{CASES}:abort", RuntimeError, "ended with exit code -6"),
    ],
)
def test_failure_is_an_error_of_the_caller(chip, function, error, message):
    with pytest.raises(error, match=message):
        compile_in_child(function, chip)


@pytest.mark.parametrize("chip", [needs.on("h200")])
def test_child_that_does_not_end_is_ended(chip):
    with pytest.raises(TimeoutError, match=r"within 0\.5 seconds"):
        compile_in_child(f"{CASES}:sleep", chip, timeout=0.5)


@pytest.mark.parametrize("chip", [needs.on("h200"), needs.on("v5e")])
def test_children_run_side_by_side(chip):
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(compile_in_child, [f"{CASES}:sgd"] * 3, [chip] * 3))
    assert len({report["traffic"]["total_bytes"] for report in reports}) == 1
