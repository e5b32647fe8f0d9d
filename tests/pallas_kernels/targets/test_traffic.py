"""The rules of `memory_traffic`, one snippet of HLO each; arrays of 256 floats are 1024 bytes."""

from __future__ import annotations

import pytest

from pallas_kernels.targets import memory_traffic

HEADER = """\
ENTRY %main (x: f32[256], y: f32[256]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  %y = f32[256]{0} parameter(1)
"""


def moved(text, **trip_counts):
    return [
        (kernel.name, kernel.operand_bytes, kernel.result_bytes, kernel.times)
        for kernel in memory_traffic(text, trip_counts).kernels
    ]


def entry(*lines):
    return HEADER + "\n".join(lines) + "\n}"


def test_parameters_tuples_and_bitcasts_move_nothing():
    assert not moved(
        entry(
            "  %c = f32[] constant(2)",
            "  %b = f32[16,16]{1,0} bitcast(%x)",
            "  %t = (f32[256]{0}, f32[256]{0}) tuple(%x, %y)",
            "  %o = (f32[256]{0}, f32[256]{0}) opt-barrier(%t)",
            "  ROOT %g = f32[256]{0} get-tuple-element(%o), index=0",
        )
    )


def test_kernel_reads_distinct_operands_once_and_writes_all_results():
    program = "%f (p: f32[256], q: f32[256]) -> (f32[256], f32[]) {\n"
    program += "  %p = f32[256]{0} parameter(0)\n  %q = f32[256]{0} parameter(1)\n"
    program += "  %s = f32[256]{0} add(%p, %q)\n  %z = f32[] constant(0)\n"
    program += "  ROOT %r = (f32[256]{0}, f32[]) tuple(%s, %z)\n}\n"
    program += entry("  ROOT %k = (f32[256]{0}, f32[]) fusion(%x, %x), kind=kLoop, calls=%f")
    assert moved(program) == [("k", 1024, 1028, 1)]


def test_copy_counts_read_and_write():
    traffic = memory_traffic(entry("  ROOT %c = f32[256]{0} copy(%x)"))
    assert traffic.total_bytes == 2048


@pytest.mark.parametrize(
    ("use", "result", "read"),
    [
        ("dynamic-slice(%p, %i), dynamic_slice_sizes={8}", "f32[8]{0}", 32),
        ("slice(%p), slice={[0:8]}", "f32[8]{0}", 32),
        ("gather(%p, %i), slice_sizes={1}", "f32[8]{0}", 32),
        ("reverse(%p), dimensions={0}", "f32[256]{0}", 1024),
        ("gather(%p, %i), slice_sizes={1}", "f32[512]{0}", 1024),
    ],
)
def test_fusion_that_takes_a_part_reads_the_part(use, result, read):
    shape = result.partition("{")[0]
    program = f"""\
%f (p: f32[256], i: s32[]) -> {shape} {{
  %p = f32[256]{{0}} parameter(0)
  %i = s32[] parameter(1)
  ROOT %s = {result} {use}
}}
ENTRY %main (x: f32[256], j: s32[]) -> {shape} {{
  %x = f32[256]{{0}} parameter(0)
  %j = s32[] parameter(1)
  ROOT %k = {result} fusion(%x, %j), kind=kLoop, calls=%f
}}"""
    index = 4 if "%i" in use else 0
    (kernel,) = memory_traffic(program).kernels
    assert kernel.operand_bytes == read + index


def test_operand_that_is_also_used_whole_counts_whole():
    program = """\
%f (p: f32[256]) -> (f32[8], f32[256]) {
  %p = f32[256]{0} parameter(0)
  %b = f32[16,16]{1,0} bitcast(%p)
  %s = f32[8]{0} slice(%p), slice={[0:8]}
  %n = f32[16,16]{1,0} negate(%b)
  ROOT %r = (f32[8]{0}, f32[16,16]{1,0}) tuple(%s, %n)
}
""" + entry("  ROOT %k = (f32[8]{0}, f32[16,16]{1,0}) fusion(%x), kind=kLoop, calls=%f")
    assert moved(program) == [("k", 1024, 1056, 1)]


UPDATE = """\
%f (p: f32[256], u: f32[8], i: s32[]) -> f32[256] {{
  %p = f32[256]{{0}} parameter(0)
  %u = f32[8]{{0}} parameter(1)
  %i = s32[] parameter(2)
  %d = f32[256]{{0}} {update}
  ROOT %r = f32[16,16]{{1,0}} {root}(%d)
}}
ENTRY %main (x: f32[256], v: f32[8], j: s32[]) -> f32[16,16] {{
  %x = f32[256]{{0}} parameter(0)
  %v = f32[8]{{0}} parameter(1)
  %j = s32[] parameter(2)
  ROOT %k = f32[16,16]{{1,0}} fusion(%x, %v, %j), kind=kLoop, calls=%f
}}"""


@pytest.mark.parametrize(
    ("update", "root", "read", "written"),
    [
        # In place: 32 bytes of updates and the 4 of the index.
        ("dynamic-update-slice(%p, %u, %i)", "bitcast", 36, 32),
        ("scatter(%p, %i, %u), to_apply=%add", "bitcast", 68, 32),
        # The result of the update is used further, so all of it is made.
        ("dynamic-update-slice(%p, %u, %i)", "negate", 1060, 1024),
    ],
)
def test_update_of_a_slice_counts_the_slice_where_it_is_in_place(update, root, read, written):
    assert moved(UPDATE.format(update=update, root=root)) == [("k", read, written, 1)]


def test_updates_of_several_results_each_count_their_slice():
    program = """\
%f (p: f32[256], q: f32[256], u: f32[8], i: s32[]) -> (f32[256], f32[256], f32[256]) {
  %p = f32[256]{0} parameter(0)
  %q = f32[256]{0} parameter(1)
  %u = f32[8]{0} parameter(2)
  %i = s32[] parameter(3)
  %d = f32[256]{0} dynamic-update-slice(%p, %u, %i)
  %e = f32[256]{0} dynamic-update-slice(%q, %u, %i)
  %z = f32[] constant(0)
  %b = f32[256]{0} broadcast(%z), dimensions={}
  %g = f32[256]{0} dynamic-update-slice(%b, %u, %i)
  ROOT %r = (f32[256]{0}, f32[256]{0}, f32[256]{0}) tuple(%d, %e, %g)
}
ENTRY %main (x: f32[256], y: f32[256], v: f32[8], j: s32[]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  %y = f32[256]{0} parameter(1)
  %v = f32[8]{0} parameter(2)
  %j = s32[] parameter(3)
  ROOT %k = (f32[256]{0}, f32[256]{0}, f32[256]{0}) fusion(%x, %y, %v, %j), kind=kLoop, calls=%f
}"""
    # The third result has nothing to be written into, so all of it is written.
    assert moved(program) == [("k", 36, 32 + 32 + 1024, 1)]


def test_part_of_a_bitcast_operand_counts_the_part():
    program = """\
%f (p: f32[256]) -> f32[1,16] {
  %p = f32[256]{0} parameter(0)
  %b = f32[16,16]{1,0} bitcast(%p)
  ROOT %s = f32[1,16]{1,0} slice(%b), slice={[0:1], [0:16]}
}
""" + entry("  ROOT %k = f32[1,16]{1,0} fusion(%x), kind=kLoop, calls=%f")
    assert moved(program) == [("k", 64, 64, 1)]


def test_slices_and_updates_outside_fusions_follow_the_same_rules():
    program = """\
ENTRY %main (x: f32[256], u: f32[8], i: s32[]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  %u = f32[8]{0} parameter(1)
  %i = s32[] parameter(2)
  %s = f32[8]{0} dynamic-slice(%x, %i), dynamic_slice_sizes={8}
  %d = f32[256]{0} dynamic-update-slice(%x, %u, %i)
  ROOT %a = f32[256]{0} scatter(%d, %i, %s), to_apply=%add
}"""
    assert moved(program) == [("s", 36, 32, 1), ("d", 36, 32, 1), ("a", 68, 32, 1)]


LOOP = """\
%body (t: f32[256]) -> f32[256] {{
  %t = f32[256]{{0}} parameter(0)
  ROOT %n = f32[256]{{0}} negate(%t)
}}
%condition (t.1: f32[256]) -> pred[] {{
  %t.1 = f32[256]{{0}} parameter(0)
  ROOT %p = pred[] custom-call(%t.1), custom_call_target="test"
}}
ENTRY %main (x: f32[256]) -> f32[256] {{
  %x = f32[256]{{0}} parameter(0)
  ROOT %while.3 = f32[256]{{0}} while(%x), condition=%condition, body=%body{note}
}}"""


def test_loop_counts_body_and_condition_by_its_trips():
    note = ', backend_config={"known_trip_count":{"n":"5"}}'
    assert moved(LOOP.format(note=note)) == [("p", 1024, 1, 6), ("n", 1024, 1024, 5)]
    assert memory_traffic(LOOP.format(note=note)).total_bytes == 6 * 1025 + 5 * 2048


def test_loop_that_depends_on_data_is_named_and_can_be_given():
    text = LOOP.format(note="")
    with pytest.raises(ValueError, match=r"loop 'while\.3' depends on data"):
        memory_traffic(text)
    assert moved(text, **{"while.3": 2}) == [("p", 1024, 1, 3), ("n", 1024, 1024, 2)]


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%small, %large}", "true_computation=%large, false_computation=%small"],
)
def test_conditional_counts_its_most_expensive_branch(branches):
    program = f"""\
%small (p: f32[256]) -> f32[256] {{
  ROOT %p = f32[256]{{0}} parameter(0)
}}
%large (q: f32[256]) -> f32[256] {{
  %q = f32[256]{{0}} parameter(0)
  ROOT %n = f32[256]{{0}} negate(%q)
}}
ENTRY %main (x: f32[256], i: s32[]) -> f32[256] {{
  %x = f32[256]{{0}} parameter(0)
  %i = s32[] parameter(1)
  ROOT %c = f32[256]{{0}} conditional(%i, %x, %x), {branches}
}}"""
    assert moved(program) == [("n", 1024, 1024, 1)]


@pytest.mark.parametrize(
    "call",
    [
        "  ROOT %c = f32[256]{0} call(%x), to_apply=%command_buffer",
        "  %s = ((f32[256]{0}), f32[256]{0}, s32[]) async-start(%x), calls=%command_buffer\n"
        "  ROOT %d = f32[256]{0} async-done(%s)",
        "  %s = ((f32[256]{0}), f32[256]{0}) call-start(%x), to_apply=%command_buffer\n"
        "  ROOT %d = f32[256]{0} call-done(%s)",
    ],
)
def test_calls_count_what_they_call_once(call):
    program = """\
%command_buffer (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  %m = f32[256]{0} negate(%p)
  ROOT %n = f32[256]{0} negate(%m)
}
""" + entry(call)
    assert moved(program) == [("m", 1024, 1024, 1), ("n", 1024, 1024, 1)]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            [
                "  %s = (f32[256]{0}, f32[256]{0}, u32[]) copy-start(%x)",
                "  ROOT %d = f32[256]{0} copy-done(%s)",
            ],
            ("s", 1024, 1024, 1),
        ),
        (
            [
                "  %s = (f32[256]{0}, f32[1024]{0}) all-gather-start(%x), dimensions={0}",
                "  ROOT %d = f32[1024]{0} all-gather-done(%s)",
            ],
            ("s", 1024, 4096, 1),
        ),
        (
            [
                "  %s = ((f32[256]{0}), f32[8]{0}, s32[]) slice-start(%x), slice={[0:8]}",
                "  %u = ((f32[256]{0}), f32[8]{0}, s32[]) slice-update(%s)",
                "  ROOT %d = f32[8]{0} slice-done(%u)",
            ],
            ("s", 32, 32, 1),
        ),
    ],
)
def test_asynchronous_operation_is_one_kernel(lines, expected):
    assert moved(entry(*lines)) == [expected]


def test_only_main_memory_counts_on_a_tpu():
    program = """\
ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0:T(1024)} parameter(0)
  %v = f32[1024]{0:T(1024)S(1)} copy(%x)
  %n = f32[1024]{0:T(1024)S(1)} negate(%v)
  ROOT %y = f32[1024]{0:T(1024)} copy(%n)
}"""
    assert moved(program) == [("v", 4096, 0, 1), ("y", 0, 4096, 1)]


def test_only_host_memory_is_left_out_on_a_gpu():
    lines = ["  %h = f32[256]{0:S(5)} copy(%x)", "  ROOT %c = f32[256]{0:S(1)} copy(%h)"]
    assert moved(entry(*lines)) == [("h", 1024, 0, 1), ("c", 0, 1024, 1)]


@pytest.mark.parametrize(
    ("target", "written"), [("__cublas$gemm", 1024), ("__gpu$xla.gpu.triton", 5120)]
)
def test_scratch_of_library_calls_does_not_count(target, written):
    program = entry(
        f'  %k = (f32[256]{{0}}, s8[4096]{{0}}) custom-call(%x, %y), custom_call_target="{target}"',
        "  ROOT %r = f32[256]{0} get-tuple-element(%k), index=0",
    )
    assert moved(program) == [("k", 2048, written, 1)]


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        memory_traffic("")
