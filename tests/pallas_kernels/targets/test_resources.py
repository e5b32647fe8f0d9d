from __future__ import annotations

import json

import pytest

from pallas_kernels.targets.resources import compile_with_resources, read_resources
from tests.pallas_kernels.targets import needs

CASES = "tests.pallas_kernels.targets.gpu_cases"
SPILLED = """\
ptxas warning : Registers are spilled to local memory in function 'f', 460 bytes spill stores
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'f' for 'sm_90a'
ptxas info    : Function properties for f
    456 bytes stack frame, 460 bytes spill stores, 444 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 456 bytes cumulative stack size, 1 bytes smem
"""
CLEAN = """\
ptxas info    : Function properties for g
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers
"""


def test_reports_are_read_in_order(tmp_path):
    (tmp_path / "my_kernel_10.ptxas").write_text(CLEAN)
    (tmp_path / "my_kernel_9.ptxas").write_text(SPILLED)
    (tmp_path / "my_kernel_9.mlir-passes.log").write_text(
        "module {\n %c1_i32 = arith.constant 1 : i32\n %map_5 = arith.constant 2048 : i32\n"
        " gpu.launch dynamic_shared_memory_size %map_5 {\n"
        "// -----// IR Dump After x\n %map_5 = arith.constant 4096 : i32\n"
        " gpu.launch dynamic_shared_memory_size %map_5 {\n"
    )
    spilled, clean = read_resources(tmp_path)
    assert spilled.name == clean.name == "my_kernel"
    assert (spilled.registers, spilled.barriers, spilled.stack) == (168, 16, 456)
    assert (spilled.spill_stores, spilled.spill_loads) == (460, 444)
    assert spilled.shared_memory == 2049
    assert len(spilled.warnings) == 1
    assert "serialized" in spilled.warnings[0]
    assert clean == ("my_kernel", 32, 0, 0, 0, 0, 1, ())


def test_report_of_another_form_is_refused(tmp_path):
    (tmp_path / "f_0.ptxas").write_text("ptxas info: nothing")
    with pytest.raises(ValueError, match=r"f_0\.ptxas does not say 'Used"):
        read_resources(tmp_path)


def test_shared_memory_of_unknown_size_is_refused(tmp_path):
    (tmp_path / "f_0.ptxas").write_text(CLEAN)
    launch = "gpu.launch dynamic_shared_memory_size %size {"
    (tmp_path / "f_0.mlir-passes.log").write_text(launch)
    with pytest.raises(ValueError, match=r"f_0\.mlir-passes\.log does not say what %size is"):
        read_resources(tmp_path)


def test_report_without_a_number_is_refused(tmp_path):
    (tmp_path / "kernel.ptxas").write_text(CLEAN)
    with pytest.raises(ValueError, match="does not name its kernel"):
        read_resources(tmp_path)


def test_tpu_is_refused_before_a_child_starts():
    with pytest.raises(ValueError, match="chip='v5e' has no registers to report; expected a GPU"):
        compile_with_resources(f"{CASES}:double", "v5e")


@pytest.mark.parametrize("chip", [needs.on("h200")])
def test_kernel_that_asks_for_shared_memory(chip):
    report = compile_with_resources(f"{CASES}:double", chip)
    assert json.loads(json.dumps(report)) == report
    (kernel,) = report["resources"]
    assert kernel["name"] == "double"
    assert kernel["spill_stores"] == kernel["spill_loads"] == 0
    assert 64 * 128 * 4 <= kernel["shared_memory"] <= 64 * 128 * 4 + 2048
    assert 16 <= kernel["registers"] <= 255
