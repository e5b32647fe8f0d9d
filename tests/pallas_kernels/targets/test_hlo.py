from __future__ import annotations

import pytest

from pallas_kernels.targets import hlo

MODULE = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

FileNames
1 "step.py"

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %c = f32[] constant(-2.5)
  %b = f32[4]{0} broadcast(%c), dimensions={}
  ROOT %m = f32[4]{0} multiply(%p, %b), metadata={op_name="a (b, c) calls=%wrong" stack_frame_id=1}
}

ENTRY %main.1 (x.1: f32[4], y: (s32[], f32[4])) -> (f32[4], f32[4]) {
  %x.1 = f32[4]{0} parameter(0), sharding={replicated}
  %y = (s32[], /*index=1*/f32[4]{0:T(128)S(1)}) parameter(1)
  %gte = f32[4]{0} get-tuple-element(%y), index=1
  %kernel = f32[4]{0} fusion(%x.1, /*index=1*/%gte), kind=kLoop, calls=%fused
  ROOT %out = (f32[4]{0}, f32[4]{0}) tuple(%kernel, %gte), control-predecessors={%kernel}
}
"""


def test_parse_returns_computations_in_order_with_the_entry_named():
    module = hlo.parse(MODULE)
    assert list(module.computations) == ["fused", "main.1"]
    assert module.entry == "main.1"
    assert list(module.computations["main.1"]) == ["x.1", "y", "gte", "kernel", "out"]


def test_parse_reads_every_field_of_an_instruction():
    body = hlo.parse(MODULE).computations["main.1"]
    assert body["kernel"].opcode == "fusion"
    assert body["kernel"].operands == ("x.1", "gte")
    assert body["kernel"].called("calls") == ("fused",)
    assert body["y"].shape == "(s32[], f32[4]{0:T(128)S(1)})"
    assert body["gte"].tuple_index == 1
    assert hlo.root(body).name == "out"


def test_quoted_text_is_not_taken_for_structure():
    product = hlo.parse(MODULE).computations["fused"]["m"]
    assert product.operands == ("p", "b")
    assert product.called("calls") == ()


def test_constants_keep_their_value():
    assert hlo.parse(MODULE).computations["fused"]["c"].operands == ("-2.5",)


def test_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule empty")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[1024,4096]{1,0}", [(16_777_216, 0)]),
        ("bf16[3,5]{1,0}", [(30, 0)]),
        ("f8e4m3fn[7]{0}", [(7, 0)]),
        ("pred[9]{0}", [(9, 0)]),
        ("c64[2]{0}", [(16, 0)]),
        ("f64[]", [(8, 0)]),
        ("s4[5]{0:E(4)}", [(3, 0)]),
        ("s4[5]{0}", [(5, 0)]),
        ("f32[0,4]{1,0}", [(0, 0)]),
        ("f32[<=8]{0}", [(32, 0)]),
        ("token[]", [(0, 0)]),
        ("f32[8,128]{1,0:T(8,128)S(1)}", [(4096, 1)]),
        ("(f32[2]{0}, (s32[], u8[3]{0:T(512)(128)(4,1)S(6)}))", [(8, 0), (4, 0), (3, 6)]),
    ],
)
def test_bytes_and_memory_space_of_a_shape(shape, expected):
    assert [tuple(array) for array in hlo.arrays(shape)] == expected


def test_elements_of_a_nested_tuple():
    assert hlo.elements("((f32[2]{0}, s32[]), f32[4]{0:T(8,128)})") == [
        "(f32[2]{0}, s32[])",
        "f32[4]{0:T(8,128)}",
    ]
    assert hlo.elements("f32[2]{0}") == ["f32[2]{0}"]


def test_scoped_memory_is_that_of_pallas_kernels():
    used = '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4112384"}]'
    call = 'f32[4] custom-call(%x), custom_call_target="tpu_custom_call"'
    lines = [
        f"  %forward.1 = {call}, backend_config={{{used}}}",
        f"  %other = {call.replace('tpu_', '')}, backend_config={{{used}}}",
        f"  %bare = {call}, backend_config={{}}",
    ]
    assert hlo.scoped_memory("\n".join(lines)) == {"forward.1": 4112384}
