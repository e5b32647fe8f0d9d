from __future__ import annotations

import json
import os

import pytest

from pallas_kernels.targets import compile_with_schedule, read_schedules
from pallas_kernels.targets.__main__ import format_report
from tests.pallas_kernels.targets import needs

CASES = "tests.pallas_kernels.targets.cases"
UTILIZATION = """\
== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 1 0 0 0 2
4 0 1 0 0 3 2 0 0 0
2 1 4 0 1 0 0 1 1 0
0 0 0 0 0 0 0 1 0 1
"""
BUNDLES = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 0 }
   0x1 LB: > { %2 = vmatmul.bf16.gmra.mxu0 %v1 }
   0x2   : > { %3 = sbr.rel (%p1) target = $region4 }
   0x3   :  { %4 = vst [vmem:[%s1] sm:$0xff] %v2 }
"""


@pytest.fixture
def folder(tmp_path):
    for number, name, suffix, text in (
        (70, "square.1", "final_hlo-static-per-bundle-utilization", UTILIZATION),
        (71, "square.1", "schedule-analysis_final_bundles", "Schedule analysis:\n"),
        (72, "square.1", "final_bundles", BUNDLES),
        (9, "TLP", "final_hlo-static-per-bundle-utilization", UTILIZATION),
        (12, "square.10", "final_bundles", "   0x2 PF: > { nop }\n"),
    ):
        (tmp_path / f"123-{name}-{number}-{suffix}.txt").write_text(text)
    return tmp_path


def test_slots_and_regions_are_read(folder):
    (kernel,) = read_schedules(folder)
    assert kernel.name == "square.1"
    assert (kernel.bundles, kernel.spills, kernel.fills) == (4, 1, 2)
    assert kernel.used["MXU"] == 6
    assert kernel.capacity["VALU"] == 4
    assert kernel.share("MXU") == 6 / 16
    # The loop's body begins a region, its branch ends one.
    assert [(r.start, r.bundles, r.used["MXU"]) for r in kernel.regions] == [
        (0, 1, 0),
        (1, 2, 6),
        (3, 1, 0),
    ]


@pytest.mark.parametrize(
    ("old", "new"), [("== UTIL", "== OTHER"), ("VPOP", "OTHER"), ("4 0 1 0 0 3 2", "4 0 1")]
)
def test_report_in_another_form_is_refused(folder, old, new):
    path = next(folder.glob("*square.1-70*"))
    path.write_text(UTILIZATION.replace(old, new))
    with pytest.raises(ValueError, match=r"square\.1-70-final"):
        read_schedules(folder)


def test_chip_without_bundles_is_refused():
    with pytest.raises(ValueError, match="chip='h200' has no schedule of bundles; expected a TPU"):
        compile_with_schedule(f"{CASES}:sgd", "h200")


@pytest.mark.parametrize("chip", [needs.on("v5e"), needs.on("v6e")])
def test_schedule_of_a_real_kernel(chip):
    flags = os.environ.get("LIBTPU_INIT_ARGS")
    report = compile_with_schedule(f"{CASES}:square", chip)
    assert os.environ.get("LIBTPU_INIT_ARGS") == flags
    assert json.loads(json.dumps(report)) == report
    kernel = next(k for k in report["schedule"] if k["name"].startswith("square"))
    assert kernel["bundles"] == sum(region["bundles"] for region in kernel["regions"])
    for unit, used in kernel["used"].items():
        assert used == sum(region["used"][unit] for region in kernel["regions"])
        assert used <= kernel["bundles"] * kernel["capacity"][unit]
    # Each of 256 rows passes the matrix unit, at most 16 with one instruction.
    assert kernel["used"]["MXU"] >= 256 / 16
    assert kernel["spills"] == 0
    lines = format_report(report).splitlines()
    assert any(x.split()[:2] == [kernel["name"], f"{kernel['bundles']:,}"] for x in lines)
