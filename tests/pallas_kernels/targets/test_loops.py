from __future__ import annotations

import pytest

from pallas_kernels.targets import hlo
from pallas_kernels.targets.loops import trip_count

LOOP = """\
%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %t = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{{0}} get-tuple-element(%t), index=1
  %i.copy = s32[] copy(%i)
  %step = s32[] constant({step})
  %next = s32[] {update}(%i.copy, %step)
  %y = f32[8]{{0}} negate(%x)
  ROOT %r = (s32[], f32[8]{{0}}) tuple(%next, %y)
}}
%condition (t.1: (s32[], f32[8])) -> pred[] {{
  %t.1 = (s32[], f32[8]{{0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %end = s32[] constant({end})
  ROOT %less = pred[] compare(%i.1, %end), direction={direction}
}}
ENTRY %main (n: s32[], x.1: f32[8]) -> (s32[], f32[8]) {{
  %n = s32[] parameter(0)
  %x.1 = f32[8]{{0}} parameter(1)
  %zero = s32[] constant({start})
  %start = s32[] copy(%zero)
  %init = (s32[], f32[8]{{0}}) tuple(%{first}, %x.1)
  ROOT %loop = (s32[], f32[8]{{0}}) while(%init), condition=%condition, body=%body{note}
}}
"""
COUNTED = {
    "start": 0,
    "step": 1,
    "end": 10,
    "update": "add",
    "direction": "LT",
    "first": "start",
    "note": "",
}


def count(**changes):
    module = hlo.parse(LOOP.format(**(COUNTED | changes)))
    body = module.computations[module.entry]
    return trip_count(module, body, body["loop"])


@pytest.mark.parametrize(
    ("start", "end", "step", "expected"),
    [(0, 10, 1, 10), (3, 8, 1, 5), (0, 10, 4, 3), (-2, 1, 1, 3), (5, 5, 1, 0), (9, 2, 1, 0)],
)
def test_loop_over_a_constant_range(start, end, step, expected):
    assert count(start=start, end=end, step=step) == expected


@pytest.mark.parametrize(
    "change",
    [{"first": "n"}, {"direction": "GT"}, {"update": "multiply"}, {"step": 0}, {"step": -1}],
    ids=str,
)
def test_loop_that_depends_on_data_has_no_count(change):
    assert count(**change) is None


def test_count_noted_by_the_compiler_wins():
    note = ', backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0"}}'
    assert count(note=note, first="n") == 7
