"""`ring_attention` on four pretend devices against float64 attention over the whole sequence."""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import chunked, layouts, reference
from pallas_kernels.attention.context import METHODS, ring_attention, shard_sequence_order
from pallas_kernels.attention.mask import SKIP, Mask, tile_kinds, visible
from pallas_kernels.attention.problem import Gradients, Operands, Route, Settings
from pallas_kernels.targets import ENVIRONMENT
from tests.pallas_kernels.attention import oracle
from tests.pallas_kernels.attention.cases import Case, Problem, build, check
from tests.pallas_kernels.attention.oracle import Result
from tests.pallas_kernels.targets import needs
from tests.pallas_kernels.targets.test_compile import run_python

N = 4  # devices
SPREAD = P(None, "x")


def _plain_backward(
    settings: Settings, operands: Operands, lse: Any, cotangent: Any, delta: Any, _: bool
) -> Gradients:
    """With lse and delta as constants, d/dz of this sum is p (dp - delta)."""
    size = operands.sizes
    split = (size.batch, size.queries, size.kv_heads, size.group, -1)
    seen = visible(operands.mask, size.batch, size.queries, size.keys)
    seen &= (lse > -jnp.inf)[..., None]

    def total(query: Any, key: Any, value: Any) -> Any:
        z = jnp.einsum("btkgd,bskd->bkgts", settings.scale * query.reshape(split), key)
        z = z.reshape(size.batch, size.heads, size.queries, size.keys)
        if settings.soft_cap is not None:
            z = settings.soft_cap * jnp.tanh(z / settings.soft_cap)
        p = jnp.where(seen, jnp.exp(jnp.where(seen, z - lse[..., None], 0)), 0)
        grouped = p.reshape(size.batch, size.kv_heads, size.group, size.queries, size.keys)
        output = jnp.einsum("bkgts,bskd->btkgd", grouped, value)
        return (output * cotangent.reshape(output.shape)).sum() - (delta * p.sum(axis=3)).sum()

    x = operands.query, operands.key, operands.value
    gradients = jax.grad(total, (0, 1, 2))(*(a.astype(lse.dtype) for a in x))
    return Gradients(*(g.astype(a.dtype) for g, a in zip(gradients, x)))


PLAIN = Route("plain", reference.attend, _plain_backward, reference.refusal)
"""A route that is quick to compile, so that many combinations can be."""


def mesh(size: int = N) -> Mesh:
    return Mesh(jax.devices()[:size], ("x",))


def local(case: Case, layout: str, method: str, implementation: Any = PLAIN) -> Any:
    """Returns the function of slices that a device runs."""
    causal = case.right == 0
    window = None
    if case.left is not None:
        window = (case.left, case.left if case.right is None else case.right)

    def fn(query: Any, key: Any, value: Any, sinks: Any, q_ids: Any, k_ids: Any) -> Any:
        return ring_attention(
            query,
            key,
            value,
            axis_name="x",
            layout=layout,
            method=method,
            scale=case.scale,
            is_causal=causal,
            local_window_size=window,
            logits_soft_cap=case.soft_cap,
            sinks=sinks,
            query_segment_ids=q_ids,
            key_value_segment_ids=k_ids,
            return_residual=True,
            implementation=implementation,
        )

    return fn


def mapped(fn: Any, how: str) -> Any:
    """Maps `fn` over slices: all arguments are whole sequences, but the sinks."""
    if how in ("checked", "unchecked"):
        specs = (SPREAD, SPREAD, SPREAD, P(), SPREAD, SPREAD)
        return jax.shard_map(
            fn, mesh=mesh(), in_specs=specs, out_specs=SPREAD, check_vma=how == "checked"
        )
    transform = {"vmap": jax.vmap, "pmap": jax.pmap}[how]

    def split(x: Any) -> Any:
        return None if x is None else x.reshape(x.shape[0], N, -1, *x.shape[2:])

    def over_slices(query: Any, key: Any, value: Any, sinks: Any, *ids: Any) -> Any:
        args = split(query), split(key), split(value), sinks, *map(split, ids)
        axes = tuple(None if x is None or i == 3 else 1 for i, x in enumerate(args))
        results = transform(fn, in_axes=axes, out_axes=1, axis_name="x")(*args)
        return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), results)

    return over_slices


def spread(fn: Any, layout: str, operands: Operands) -> Any:
    """Lays the sequence out, runs `fn`, and brings the results back into order."""
    mask = operands.mask
    order, inverse = zip(
        *(shard_sequence_order(x.shape[1], N, layout) for x in (operands.query, operands.key))
    )

    def laid_out(x: Any, side: int) -> Any:
        return None if x is None else x[:, order[side]]

    output, lse = fn(
        laid_out(operands.query, 0),
        laid_out(operands.key, 1),
        laid_out(operands.value, 1),
        operands.sinks,
        laid_out(mask.query_segment_ids, 0),
        laid_out(mask.key_value_segment_ids, 1),
    )
    return output[:, inverse[0]], lse[:, inverse[0]].transpose(0, 2, 1)


def results(attend: Any, problem: Problem, *, jit: bool = True) -> Result:
    """As `cases.run`, with a compiler that takes half of the time."""
    operands, (d_output, d_lse) = problem.operands, problem.cotangents

    def fn(primals: Any) -> Any:
        query, key, value, sinks = primals
        return attend(operands._replace(query=query, key=key, value=value, sinks=sinks))

    def everything(primals: Any) -> Any:
        (output, lse), vjp = jax.vjp(fn, primals)
        return output, lse, *vjp((d_output, jnp.where(lse == -jnp.inf, 0, d_lse)))[0]

    if jit:
        quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        everything = jax.jit(everything, compiler_options=quick)
    primals = operands.query, operands.key, operands.value, operands.sinks
    found = jax.tree.map(lambda x: np.asarray(x, np.float64), everything(primals))
    output, lse, query, key, value, sinks = found
    return Result(output, lse, query, key, value, None, sinks)


def check_spread(
    case: Case,
    layout: str = "zigzag",
    method: str = "ring",
    how: str = "checked",
    implementation: Any = PLAIN,
) -> Result:
    fn = mapped(local(case, layout, method, implementation), how)
    attend = functools.partial(spread, fn, layout)
    got = results(attend, build(case), jit=how != "pmap")
    check(case, got)
    return got


base = Case("base", queries=32, keys=32, heads=4, kv_heads=4, head_dim=8, seed=1)
causal = base.replace(name="causal, grouped heads", right=0, heads=8, seed=2)
full = base.replace(name="full, more queries than keys", queries=48, value_dim=12, soft_cap=2.0)
features = base.replace(
    name="window, shuffled segments, sinks, soft cap, grouped heads", queries=64, keys=64,
    batch=2, left=5, right=3, segments="shuffled", sinks=True, soft_cap=2.0, heads=8,
)  # fmt: skip
window = base.replace(name="causal window", left=5, right=0, queries=48, keys=48, sinks=True)
uneven = base.replace(name="more keys than queries, causal", right=0, keys=64)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", [causal, full, features], ids=str)
def test_every_layout_and_method(case, method, layout):
    check_spread(case, layout, method)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("case", [window, uneven], ids=str)
def test_ring_where_few_see_much_or_offsets_are_odd(case, layout):
    check_spread(case, layout)


@pytest.mark.parametrize("how", ["unchecked", "vmap", "pmap"])
@pytest.mark.parametrize("method", METHODS)
def test_every_way_to_map(method, how):
    case = base.replace(right=0, sinks=True)
    check_spread(case, "zigzag", method, how)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sinks", [False, True])
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


def test_chunked_is_the_default():
    fn = mapped(local(causal, "zigzag", "ring", None), "checked")
    problem = build(causal)
    output, lse = spread(fn, "zigzag", problem.operands)
    want = oracle.attention(problem)
    np.testing.assert_allclose(output, want.output, atol=1e-5)
    np.testing.assert_allclose(lse, want.lse, atol=1e-5)


def test_ring_in_bfloat16():
    # Each step's output is rounded once more than that of a single device; weights add up to one.
    check_spread(causal.replace(dtype="bfloat16"))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (8, 2)])
def test_all_to_all_repeats_few_heads(heads, kv_heads):
    check_spread(base.replace(right=0, heads=heads, kv_heads=kv_heads), "zigzag", "all_to_all")


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

    for got, want in zip(jax.jit(inside)(x, target), jax.grad(plain)(x)):
        np.testing.assert_allclose(got, want, atol=3e-5)


# What is computed, without computing it.


def seen_by(layout, n, rows, keys, left, right):
    """The mask of all devices' slices, bool (n, n, rows, keys), from their positions."""
    p = layouts.positions(layout, n, rows)[:, None, :, None]
    s = layouts.positions(layout, n, keys)[None, :, None, :]
    seen = np.ones((n, n, rows, keys), bool)
    if left is not None:
        seen &= p - left <= s
    if right is not None:
        seen &= s <= p + right
    return seen


def entries(call, offset):
    """The entries that a call computes, from the rule of `Mask`."""
    r = np.arange(call.rows.stop - call.rows.start)[:, None] + offset
    c = np.arange(call.keys.stop - call.keys.start)[None, :]
    seen = np.ones((r.shape[0], c.shape[1]), bool)
    if call.left is not None:
        assert call.left >= 0
        seen &= r - call.left <= c
    if call.right is not None:
        assert call.right >= 0
        seen &= c <= r + call.right
    return seen


bounds = st.one_of(st.none(), st.integers(0, 40))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(layouts.LAYOUTS),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    bounds,
    bounds,
)
def test_plans_compute_what_is_seen_and_nothing_twice(layout, n, rows, keys, left, right):
    rows, keys = 2 * rows, 2 * keys
    want = seen_by(layout, n, rows, keys, left, right)
    work = layouts.schedule(layout, n, rows, keys, left, right)
    for i, j in itertools.product(range(n), range(n)):
        step = (i - j) % n
        got = np.zeros((rows, keys), int)
        if step <= work.last:
            plan = work.remote if step else work.local
            for call in plan.branches[plan.choice[i, j]]:
                offset = call.offset if call.is_static else plan.offsets[i, j, call.pair]
                found = entries(call, offset)
                assert found.any(), "a call in which nothing is seen"
                if call.left is call.right is None:
                    assert call.offset == 0
                got[call.rows, call.keys] += found
        np.testing.assert_array_equal(got, want[i, j])


TILE = 32


def tiles(layout, n, length):
    """Tiles that each device computes in each step of a causal ring, (steps, n)."""
    work = layouts.schedule(layout, n, length, length, None, 0)
    found = np.zeros((n, n), int)
    for step, i in itertools.product(range(n), range(n)):
        plan = work.remote if step else work.local
        j = (i - step) % n
        for call in plan.branches[plan.choice[i, j]] if step <= work.last else ():
            offset = call.offset if call.is_static else plan.offsets[i, j, call.pair]
            mask = Mask(left=call.left, right=call.right, offset=int(offset))
            rows, keys = (side.stop - side.start for side in (call.rows, call.keys))
            kinds = tile_kinds(mask, 1, rows, keys, TILE, TILE)
            found[step, i] += (np.asarray(kinds) != SKIP).sum()
    return found


def efficiency(layout, n, length):
    """Entries that must be computed, over those that the slowest device computes in each step."""
    whole = n * length
    return whole * (whole + 1) / 2 / n / (tiles(layout, n, length).max(axis=1).sum() * TILE**2)


@pytest.mark.parametrize(("n", "chunk"), [(2, 16), (4, 8), (8, 4), (8, 16), (16, 2)])
def test_zigzag_is_balanced(n, chunk):
    length = 2 * chunk * TILE
    assert efficiency("zigzag", n, length) >= 0.98
    assert (np.ptp(tiles("zigzag", n, length), axis=1) == 0).all()


def test_contiguous_is_not_balanced():
    assert efficiency("contiguous", 8, 256) < 0.6


def test_zigzag_steps_are_one_call_without_a_mask():
    work = layouts.schedule("zigzag", 8, 64, 64, None, 0)
    assert [len(calls) for calls in work.local.branches] == [1]
    assert work.local.branches[0][0].offset == 0
    assert len(work.remote.branches) == 2
    for (call,) in work.remote.branches:
        assert call.left is call.right is None


def test_a_window_ends_the_journey():
    assert layouts.schedule("contiguous", 8, 64, 64, 63, 0).last == 1
    assert layouts.schedule("contiguous", 8, 64, 64, 65, 0).last == 2
    assert layouts.schedule("striped", 8, 64, 64, 3, 0).last == 3


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


# What is compiled.

COLLECTIVES = ("collective-permute", "all-gather", "all-reduce", "reduce-scatter", "all-to-all")


def compiled(method, n=N, length=64, gradient=False):
    """Compiles causal attention over `n` slices of `length`."""
    x = jax.ShapeDtypeStruct((1, n * length, 4, 8), jnp.float32)
    fn = jax.shard_map(
        lambda *x: ring_attention(
            *x, axis_name="x", is_causal=True, method=method, implementation=PLAIN
        ),
        mesh=mesh(n),
        in_specs=SPREAD,
        out_specs=SPREAD,
    )

    def backward(*x):
        output, vjp = jax.vjp(fn, *x)
        return vjp(output)

    return jax.jit(backward if gradient else fn).lower(x, x, x).compile()


def collectives(text):
    found = Counter(re.findall(r" = .*? ([\w-]+)\(", text))
    return {name for name in COLLECTIVES if found[name] or found[f"{name}-start"]}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("method", "forward", "backward"),
    [
        ("ring", {"collective-permute"}, {"collective-permute"}),
        ("gather", {"all-gather"}, {"all-gather", "reduce-scatter"}),
        ("all_to_all", {"all-to-all"}, {"all-to-all"}),
    ],
)
def test_collectives(method, forward, backward, gradient):
    text = compiled(method, gradient=gradient).as_text()
    assert collectives(text) == (backward if gradient else forward)


@pytest.mark.parametrize("gradient", [False, True])
def test_temporaries_of_a_ring_do_not_grow_with_the_sequence(gradient):
    def temporaries(method, n):
        memory: Any = compiled(method, n, gradient=gradient).memory_analysis()
        return memory.temp_size_in_bytes

    assert temporaries("ring", 4) <= 1.05 * temporaries("ring", 3)
    assert temporaries("gather", 4) > 1.2 * temporaries("gather", 3)


OVERLAP = """\
import re
import jax, jax.numpy as jnp
from pallas_kernels.attention.context import ring_attention
from pallas_kernels.targets import abstract_devices, compile_for
mesh = jax.sharding.Mesh(abstract_devices({chip!r}, {topology!r}), ("x",))
assert mesh.size == 4
spec = jax.P(None, "x")
x = jax.ShapeDtypeStruct((1, 4096, 4, 128), jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
fn = jax.shard_map(
    lambda *x: ring_attention(*x, axis_name="x", is_causal=True, implementation="chunked"),
    mesh=mesh, in_specs=spec, out_specs=spec)
def backward(*x):
    output, vjp = jax.vjp(fn, *x)
    return vjp(output)
for program in (fn, backward):
    text = compile_for(program, x, x, x, chip={chip!r}, topology={topology!r}).as_text()
    assert "is_scheduled=true" in text
    assert "all-gather" not in text
    under_way, work = set(), 0
    for line in text.splitlines():
        if found := re.match(r" *%?([\\w.-]+) = .* collective-permute-start\\(", line):
            under_way.add(found[1])
        elif found := re.search(r" collective-permute-done\\(.*?%?([\\w.-]+)\\)", line):
            under_way.discard(found[1])
        elif re.search(r" = .* (conditional|while)\\(", line):
            work += bool(under_way)
        elif line.startswith("}}"):
            under_way = set()
    print(text.count(" collective-permute-start("), text.count(" collective-permute-done("), work)
"""


@pytest.mark.parametrize(
    ("chip", "topology"), [needs.on("h100", "1x1x4"), needs.on("v5e", "v5e:2x2")]
)
@pytest.mark.slow
def test_transfers_overlap_with_work(chip, topology):
    child = run_python(OVERLAP.format(chip=chip, topology=topology), **ENVIRONMENT)
    assert child.returncode == 0, child.stderr
    for line in child.stdout.splitlines():
        starts, dones, overlapped = map(int, line.split())
        assert starts == dones > 0
        assert overlapped > 0


# The order of the sequence.


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_order_is_what_devices_hold(layout):
    order, inverse = shard_sequence_order(24, 3, layout)
    assert order.dtype == inverse.dtype == np.int32
    np.testing.assert_array_equal(order.reshape(3, 8), layouts.positions(layout, 3, 8))
    np.testing.assert_array_equal(order[inverse], np.arange(24))
    x = jnp.arange(48).reshape(2, 24, 1)
    np.testing.assert_array_equal(layouts.to_positions(x[:, order], 3, layout), x)
    np.testing.assert_array_equal(layouts.from_positions(x, 3, layout), x[:, order])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((10, 4), "length=10 does not divide into 8 equal parts; expected a multiple of 8"),
        ((10, 4, "striped"), "length=10 does not divide into 4 equal parts"),
        ((8, 0), "axis_size=0; expected at least 1"),
        ((8, 2, "spiral"), "layout='spiral' is not known; expected one of zigzag, contiguous"),
    ],
)
def test_order_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        shard_sequence_order(*args)


# Bad input.


def call(shape=(1, 8, 4, 8), axis_name="x", dtype=jnp.float32, **changes):
    x = {name: jnp.zeros(shape, dtype) for name in ("query", "key", "value")} | {
        k: changes.pop(k) for k in ("query", "key", "value") if k in changes
    }

    def fn(i):
        del i
        return ring_attention(**x, axis_name=axis_name, **changes)

    return jax.vmap(fn, axis_name="x")(jnp.arange(N))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis_name": "y"}, "axis 'y' is not bound; call inside shard_map or pmap"),
        ({"layout": "spiral"}, "layout='spiral' is not known; expected one of zigzag"),
        ({"method": "mesh"}, "method='mesh' is not known; expected one of ring, gather"),
        ({"implementation": "fast"}, "implementation='fast' names no route; expected one of"),
        ({"shape": (1, 7, 4, 8)}, r"query has shape \(1, 7, 4, 8\), a slice of 7 positions"),
        ({"shape": (4, 8)}, r"query must be \[batch, length, heads, size\]"),
        ({"sinks": jnp.zeros(3)}, r"sinks has shape \(3,\)"),
        ({"local_window_size": -1}, "local_window_size=-1; expected integers of at least 0"),
        (
            {"method": "all_to_all", "shape": (1, 8, 6, 8)},
            "query has 6 heads and the axis 4 devices; expected a multiple of 4",
        ),
        (
            {
                "method": "all_to_all",
                "query": jnp.zeros((1, 8, 12, 8)),
                "key": jnp.zeros((1, 8, 3, 8)),
                "value": jnp.zeros((1, 8, 3, 8)),
            },
            "key has 3 heads and the axis 4 devices; expected that one divides",
        ),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("name", ["reference", "cudnn"])
def test_routes_without_a_backward_pass_are_refused(name):
    with pytest.raises(NotImplementedError, match=f"'{name}'"):
        call(implementation=[name])


def test_no_batch_axis():
    assert np.shape(call(shape=(8, 4, 8), implementation=PLAIN)) == (N, 8, 4, 8)


def test_axis_outside_of_any_map():
    x = jnp.zeros((1, 8, 4, 8))
    with pytest.raises(ValueError, match="axis 'context' is not bound; call inside shard_map"):
        ring_attention(x, x, x, axis_name="context")
