"""`ring_attention` on four pretend devices against float64 attention over the whole sequence."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import chunked, layouts, mosaic_tpu, reference, triton
from pallas_kernels.attention.context import METHODS, shard_sequence_order
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.problem import Operands
from tests.pallas_kernels.attention import oracle
from tests.pallas_kernels.attention.cases import build, quick_jit
from tests.pallas_kernels.attention.context_cases import (
    PLAIN,
    SPREAD,
    N,
    base,
    causal,
    check_spread,
    features,
    full,
    local,
    mapped,
    mesh,
    spread,
    uneven,
    window,
)


@pytest.mark.slow
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_every_layout_and_method(method, layout):
    check_spread(features, layout, method)


@pytest.mark.parametrize(
    ("method", "layout"), [*(("ring", x) for x in layouts.LAYOUTS), ("all_to_all", "zigzag")]
)
def test_causal(method, layout):
    check_spread(causal, layout, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_without_a_mask_no_layout_differs(method):
    check_spread(full, "zigzag", method)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "layout"),
    [(window, "zigzag"), (window, "striped"), (uneven, "zigzag"), (uneven, "contiguous")],
    ids=str,
)
def test_ring_where_few_see_much_or_offsets_are_odd(case, layout):
    check_spread(case, layout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("ring", "unchecked"),
        ("ring", "vmap"),
        ("ring", "pmap"),
        ("gather", "vmap"),
        ("all_to_all", "unchecked"),
    ],
)
def test_every_way_to_map(method, how):
    case = base.replace(right=0, sinks=True)
    check_spread(case, "zigzag", method, how)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "sinks"),
    [("ring", False), ("ring", True), ("gather", False), ("all_to_all", True)],
)
def test_rows_that_see_nothing_on_any_device(method, sinks):
    # Position 24 sees the keys 20 ... 24 of 16.
    case = base.replace(queries=32, keys=16, left=4, right=0, sinks=sinks)
    got = check_spread(case, "zigzag", method)
    assert (got.output[:, 20:] == 0).all()
    assert (got.query[:, 20:] == 0).all()
    if sinks:
        want = np.asarray(build(case).operands.sinks)[:, None]
        np.testing.assert_allclose(got.lse[0, :, 20:], np.broadcast_to(want, (4, 12)), rtol=1e-6)
    else:
        assert (got.lse[:, :, 20:] == -np.inf).all()


@pytest.mark.parametrize(("case", "layout"), [(causal, "zigzag"), (features, "striped")], ids=str)
def test_ring_of_the_chunked_route(case, layout):
    check_spread(case, layout, implementation=chunked.ROUTE)


KERNELS = {
    "triton": triton.Config(*[triton.Blocks(16, 16, 4, 1)] * 4),
    "mosaic_tpu": mosaic_tpu.Config(*[mosaic_tpu.Blocks(128, 128, 128, 128)] * 2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "how", "case", "layout"),
    [
        ("triton", "ring", "checked", causal, "zigzag"),
        ("mosaic_tpu", "gather", "checked", causal, "zigzag"),
        ("triton", "ring", "unchecked", features, "striped"),
        ("triton", "gather", "checked", features, "striped"),
        ("triton", "all_to_all", "checked", features, "striped"),
        ("mosaic_tpu", "ring", "checked", features, "striped"),
        ("mosaic_tpu", "ring", "unchecked", causal, "zigzag"),
    ],
    ids=str,
)
def test_kernels_of_chips_as_the_local_route(name, method, how, case, layout):
    check_spread(case, layout, method, how, name, interpret=True, config=KERNELS[name])


@pytest.mark.slow
def test_chunked_is_the_default():
    fn = mapped(local(causal, "zigzag", "ring", None), "checked")
    problem = build(causal)
    output, lse = spread(fn, "zigzag", problem.operands)
    want = oracle.attention(problem)
    np.testing.assert_allclose(output, want.output, atol=1e-5)
    np.testing.assert_allclose(lse, want.lse, atol=1e-5)


@pytest.mark.slow
def test_ring_in_bfloat16():
    # Each step's output is rounded once more than that of a single device; weights add up to one.
    check_spread(causal.replace(dtype="bfloat16"))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (8, 2)])
def test_all_to_all_repeats_few_heads(heads, kv_heads):
    check_spread(base.replace(right=0, heads=heads, kv_heads=kv_heads), "zigzag", "all_to_all")


@pytest.mark.slow
def test_ring_beside_data_parallelism():
    """Sinks and keys that are equal on several devices get the sum of their gradients."""
    case = base.replace(batch=2, right=0, sinks=True)
    problem = build(case)
    one_key = problem.operands.key[:1], problem.operands.value[:1]
    two_by_two = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "x"))
    fn = jax.shard_map(
        local(case, "zigzag", "ring"),
        mesh=two_by_two,
        in_specs=(P("data", "x"), P(None, "x"), P(None, "x"), P(), None, None),
        out_specs=P("data", "x"),
    )
    order, inverse = shard_sequence_order(case.queries, 2)

    def ours(query, key, value, sinks):
        output, lse = fn(query[:, order], key[:, order], value[:, order], sinks, None, None)
        return output[:, inverse], lse[:, inverse].transpose(0, 2, 1)

    def plain(query, key, value, sinks):
        key, value = (jnp.broadcast_to(x, (2, *x.shape[1:])) for x in (key, value))
        operands = Operands(query, key, value, sinks=sinks, mask=Mask(right=0))
        return reference.attend(problem.settings, operands)

    primals = problem.operands.query, *one_key, problem.operands.sinks
    got, want = (
        jax.jit(lambda f=f: jax.vjp(f, *primals)[1](problem.cotangents))() for f in (ours, plain)
    )
    for g, w in zip(got, want):
        np.testing.assert_allclose(g, w, atol=3e-5)  # sums of 64 products in another order


@pytest.mark.parametrize("method", METHODS)
def test_gradient_inside_of_shard_map(method):
    problem = build(causal)
    x = problem.operands.query, problem.operands.key, problem.operands.value
    target = problem.cotangents[0]
    attend = local(causal, "contiguous", method)

    def loss(x, target):
        return (attend(*x, None, None, None)[0] * target).sum()

    specs = ((SPREAD,) * 3, SPREAD)
    inside = jax.shard_map(jax.grad(loss), mesh=mesh(), in_specs=specs, out_specs=SPREAD)

    def plain(x):
        return (
            reference.attend(problem.settings, Operands(*x, mask=Mask(right=0)))[0] * target
        ).sum()

    for got, want in zip(jax.jit(inside)(x, target), quick_jit(jax.grad(plain))(x)):
        np.testing.assert_allclose(got, want, atol=3e-5)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_calls_that_run(layout):
    """Counts on the devices: what a branch leaves out is not computed."""
    calls = Counter()

    def record(device, rows, keys):
        calls[int(device)] += int(rows) * int(keys)

    def forward(settings, operands):
        device = jax.lax.axis_index("x")
        size = operands.sizes
        jax.debug.callback(record, device, size.queries, size.keys)
        return reference.attend(settings, operands)

    route = PLAIN._replace(name="counted", forward=forward)
    fn = mapped(local(causal, layout, "ring", route), "unchecked")
    jax.block_until_ready(spread(jax.jit(fn), layout, build(causal).operands))
    jax.effects_barrier()
    each = (causal.queries // N) ** 2
    if layout == "zigzag":
        assert calls == dict.fromkeys(range(N), each + (N - 1) * each // 2)
    else:
        assert calls == {i: (i + 1) * each for i in range(N)}
