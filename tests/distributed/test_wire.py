"""Bytes on the wire against counts by hand, and against the compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxopt_lab.distributed import wire_bytes
from jaxopt_lab.distributed.wire import Collective, compiled_collectives
from tests.distributed.modes import AXIS, mapped

EIGHT = {AXIS: 8}
VECTOR = jax.ShapeDtypeStruct((1024,), jnp.float32)
RING = [(i, (i + 1) % 8) for i in range(8)]


def every_kind(x):
    codes = lax.all_to_all(jnp.packbits(x > 0), AXIS, 0, 0, tiled=True)
    part = lax.psum_scatter(x, AXIS, tiled=True)
    return lax.pmean(x, AXIS), lax.all_gather(codes[:2], AXIS), part, lax.ppermute(x, AXIS, RING)


# 1024 float32 are 4096 bytes; 1024 signs are 128; the gathered codes are 2.
SENT = {
    "all-reduce": 2 * 7 / 8 * 4096,
    "all-gather": 7 * 2,
    "reduce-scatter": 7 / 8 * 4096,
    "all-to-all": 7 / 8 * 128,
    "permute": 4096,
}


def test_each_kind_by_hand():
    assert wire_bytes(every_kind, VECTOR, axis_sizes=EIGHT).by_kind() == SENT


@pytest.mark.parametrize("mode", ["shard_map", "unchecked", "pmap"])
def test_the_mesh_in_the_program_says_how_many_replicas(mode):
    stacked = jnp.zeros((8, 1024))
    assert wire_bytes(mapped(mode, every_kind, 8), stacked).by_kind() == SENT


def test_the_compiled_program_agrees():
    compiled = mapped("unchecked", every_kind, 8).lower(jnp.zeros((8, 1024))).compile()
    found = {c.kind: c.sent_bytes for c in compiled_collectives(compiled)}
    assert found == SENT


def test_several_leaves_in_one_compiled_operation():
    both = mapped("unchecked", lambda x: (lax.psum(x, AXIS), lax.psum(x[:8], AXIS)), 8)
    found = compiled_collectives(both.lower(jnp.zeros((8, 1024))).compile())
    assert sum(c.payload_bytes for c in found) == 4096 + 32


def test_narrow_types_and_bools():
    def send(x):
        return (
            lax.psum(x.astype(jnp.bfloat16), AXIS),
            lax.all_gather(x.astype(jnp.int4), AXIS),
            lax.ppermute(x > 0, AXIS, RING),
        )

    found = wire_bytes(send, VECTOR, axis_sizes=EIGHT).by_kind()
    assert found == {"all-reduce": 2 * 7 / 8 * 2048, "all-gather": 7 * 512, "permute": 1024}


def test_a_loop_counts_each_turn_and_its_branches():
    def send(x):
        def turn(x, step):
            x = lax.cond(step % 2 == 0, lambda x: lax.ppermute(x, AXIS, RING), lambda x: x, x)
            return lax.ppermute(x, AXIS, RING), None

        return lax.scan(turn, x, jnp.arange(5))[0]

    found = wire_bytes(send, VECTOR, axis_sizes=EIGHT)
    assert (found.least, found.peak, found.average(5)) == (5 * 4096, 10 * 4096, 6 * 4096)
    assert found.by_kind(min) == {"permute": 5 * 4096}


def test_an_unknown_number_of_turns_is_refused():
    def send(x):
        return lax.while_loop(lambda x: x[0] < 1, lambda x: lax.psum(x, AXIS), x)

    with pytest.raises(ValueError, match="while loop"):
        wire_bytes(send, VECTOR, axis_sizes=EIGHT)


def test_derivatives_and_nested_functions_are_counted():
    @jax.custom_vjp
    def send(x):
        return lax.psum(x, AXIS)

    send.defvjp(lambda x: (send(x), None), lambda _, g: (g,))
    found = wire_bytes(jax.jit(jax.checkpoint(send)), VECTOR, axis_sizes=EIGHT)
    assert found.peak == SENT["all-reduce"]


def test_one_replica_sends_nothing():
    def send(x):
        whole = lax.psum(x, AXIS), lax.all_gather(x, AXIS), lax.all_to_all(x[None], AXIS, 0, 0)
        return *whole, lax.ppermute(x, AXIS, [(0, 0)])

    assert wire_bytes(send, VECTOR, axis_sizes={AXIS: 1}).peak == 0


def test_two_axes():
    sizes = {"host": 2, "device": 4}
    found = wire_bytes(lambda x: lax.psum(x, ("host", "device")), VECTOR, axis_sizes=sizes)
    assert found.always == (Collective("all-reduce", ("host", "device"), 8, 4096),)


def test_under_vmap_nothing_is_sent():
    assert wire_bytes(mapped("vmap", every_kind, 8), jnp.zeros((8, 1024))).peak == 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "%a = f32[8,4]{1,0} all-gather(%p), replica_groups={{0,1},{2,3}}, dimensions={0}",
            Collective("all-gather", (), 2, 64),
        ),
        (
            "%a = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8]",
            Collective("all-gather", (), 4, 16),
        ),
        (
            "%a = ((u8[4,2]{1,0}), u8[4,2]{1,0}) all-to-all-start(%p), replica_groups={{0,1,2,3}}",
            Collective("all-to-all", (), 4, 8),
        ),
        (
            "%a = (bf16[4]{0}, bf16[4]{0}, u32[], u32[]) collective-permute-start(%p), "
            "source_target_pairs={{0,1},{1,0}}",
            Collective("permute", (), 16, 8),
        ),
        (
            "ROOT %a = (f8e4m3fn[8]{0}, s32[]) all-reduce(%p, %q), replica_groups={}",
            Collective("all-reduce", (), 16, 12),
        ),
        ("%a = f32[2]{0} reduce-scatter(%p)", Collective("reduce-scatter", (), 16, 128)),
    ],
)  # fmt: skip
def test_compiled_forms(line, expected):
    text = f"HloModule m, num_partitions=16\n{line}\n"
    assert compiled_collectives(text) == [expected]
