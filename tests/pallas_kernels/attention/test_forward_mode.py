"""Derivatives of attention beyond the gradient: forward mode, and derivatives of derivatives."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalCall=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import attention, ring_attention, shard_sequence_order
from pallas_kernels.attention import chunked, core, derivatives
from pallas_kernels.attention.chunks import ChunkedConfig
from pallas_kernels.attention.problem import Operands, Settings
from pallas_kernels.attention.tangent import PLAIN
from tests.pallas_kernels.attention import cases, tangent_cases

# Blocks that divide no length, and a step for every head: tiles of all kinds, padding at both ends.
SMALL = ChunkedConfig(block_q=48, block_kv=40, tile=1)
EVERYTHING = next(case for case in cases.CASES if case.name == "everything")
SECOND = {"soft cap"}


def built(case, route=chunked.ROUTE, **settings):
    """Returns the problem, the function of what moves, where it is and where it moves."""
    problem = cases.build(case)
    changed = problem.settings._replace(**({"config": SMALL} | settings))
    fn = tangent_cases.function(functools.partial(core.attend, route, changed), problem)
    return problem, fn, tangent_cases.primals(problem), tangent_cases.directions(problem)


@pytest.mark.parametrize("case", cases.some_slow(cases.CASES), ids=str)
def test_tangents_are_those_of_float64(case):
    _, fn, x, direction = built(case)
    got = cases.quick_jit(functools.partial(tangent_cases.tangents, fn))(x, direction)
    tangent_cases.check(case, got, tangent_cases.expected(case))


@pytest.mark.parametrize("case", cases.some_slow(cases.CASES, SECOND), ids=str)
def test_second_derivatives_are_those_of_float64_in_every_mode(case):
    problem, fn, x, direction = built(case)
    loss = tangent_cases.loss_of(fn, problem)

    def every_mode(x, direction):
        modes = (
            tangent_cases.forward_over_reverse,
            tangent_cases.reverse_over_forward,
            tangent_cases.reverse_over_reverse,
        )
        return [mode(loss, x, direction) for mode in modes]

    want = tangent_cases.expected(case, second=True)
    for got in cases.quick_jit(every_mode)(x, direction):
        tangent_cases.check(case, got, want)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tangents_of_16_bits(dtype):
    case = EVERYTHING.replace(dtype=dtype)
    _, fn, x, direction = built(case)
    got = cases.quick_jit(functools.partial(tangent_cases.tangents, fn))(x, direction)
    assert got[0].dtype == dtype
    assert got[1].dtype == jnp.float32
    # Three roundings of half a unit in the last place: of the weighted sum, the output, the result.
    tolerance = 1.5 * float(jnp.finfo(dtype).eps)
    tangent_cases.check(case, got, tangent_cases.expected(case), tolerance)


B, T, N, D = 2, 24, 4, 8
TINY = ChunkedConfig(block_q=16, block_kv=8, tile=1)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, T, N, D)), jnp.float32) for _ in range(6))


def ours(q, k, v, **kwargs):
    kwargs = {"is_causal": True, "implementation": "chunked", "config": TINY} | kwargs
    return attention(q, k, v, **kwargs)


def plain(q, k, v, **kwargs):
    return attention(q, k, v, is_causal=True, implementation="reference", **kwargs)


def assert_close(got, want, tolerance=2e-5):
    # Sums over other orders of float32 numbers of order one to ten.
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


def test_linearized_function_keeps_output_and_lse_and_runs_no_forward_pass(inputs):
    q, k, v, *direction = inputs
    runs = []

    def forward(*arguments):
        runs.append(1)
        return chunked.forward(*arguments)

    route = chunked.ROUTE._replace(forward=forward)

    def fn(*x):
        return core.attend(route, Settings(D**-0.5, config=TINY), Operands(*x))

    values, push = jax.linearize(fn, q, k, v)
    count = len(runs)
    assert_close(push(*direction), jax.jvp(fn, (q, k, v), tuple(direction))[1], 1e-6)
    assert_close(values, fn(q, k, v), 1e-6)
    moved = jax.make_jaxpr(push)(*direction)
    assert len(runs) == count
    kept = sorted({x.shape for x in jax.tree.leaves(moved.consts)})
    assert kept == sorted({q.shape, values[1].shape}), "the inputs, the output and the lse"


@pytest.mark.slow
def test_gradient_costs_what_a_custom_vjp_of_the_same_passes_costs(inputs):
    q, k, v, *_ = inputs
    settings = Settings(D**-0.5, config=TINY)

    @jax.custom_vjp
    def bare(q, k, v):
        return chunked.forward(settings, Operands(q, k, v))[0]

    def forward(q, k, v):
        output, lse = chunked.forward(settings, Operands(q, k, v))
        return output, (q, k, v, output, derivatives.finite(lse))

    def backward(kept, cotangent):
        *x, output, lse = kept
        lse = derivatives.with_empty(lse)
        delta = jnp.einsum("btne,btne->bnt", cotangent, output)
        return chunked.backward(settings, Operands(*x), lse, cotangent, delta, False)[:3]

    bare.defvjp(forward, backward)

    def cost(fn):
        step = jax.jit(jax.value_and_grad(lambda *x: jnp.square(fn(*x)).sum(), (0, 1, 2)))
        program = step.lower(q, k, v).compile()
        text = program.as_text()
        return (
            program.memory_analysis().temp_size_in_bytes,
            program.cost_analysis()["flops"],
            text.count(" while("),
            text.count(" exponential("),
        )

    assert cost(lambda *x: core.attend(chunked.ROUTE, settings, Operands(*x))[0]) == cost(bare)


def test_reverse_mode_keeps_inputs_output_and_lse(inputs):
    q, k, v, *_ = inputs
    _, pull = jax.vjp(lambda *x: ours(*x), q, k, v)
    shapes = sorted(x.shape for x in jax.tree.leaves(pull) if x.size > 1)
    assert shapes == sorted([q.shape] * 4 + [(B, N, T)])


def temporaries(program, arguments, length):
    x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
    lowered = cases.quick_jit(program).lower(*[x] * arguments)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_grows_with_the_length_and_is_at_most_three_times_the_forward_pass():
    fn = functools.partial(attention, is_causal=True)
    found = []
    for length in (2048, 4096):
        forward = temporaries(fn, 3, length)
        found.append(temporaries(lambda *x: jax.jvp(fn, x[:3], x[3:]), 6, length))
        assert found[-1] <= 3 * forward
    assert found[1] < 2.2 * found[0]


@pytest.mark.slow
def test_memory_of_a_hessian_vector_product_grows_with_the_length():
    def gradient(*x):
        loss = lambda *x: jnp.square(attention(*x, is_causal=True)).sum()  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(*x)

    modes = (
        lambda *x: jax.jvp(gradient, x[:3], x[3:])[1],
        lambda *x: jax.vjp(gradient, *x[:3])[1](x[3:]),
    )
    for program in modes:
        small, large = (temporaries(program, 6, length) for length in (2048, 4096))
        assert large < 2.2 * small
        # Less than one array of scores, of which code without blocks keeps several.
        assert large < 2 * 4096 * 4096 * 4


@pytest.mark.slow
def test_only_what_moves_is_computed(inputs):
    q, k, v, dq, *_ = inputs
    moved = []

    def tangent(settings, operands, lse, moves):
        moved.append(sorted(moves))
        return PLAIN.tangent(settings, operands, lse, moves)

    route = core.batched(chunked.ROUTE)
    route = route._replace(plain=route.plain._replace(tangent=tangent))
    settings = Settings(1.0)
    bias = jnp.ones((1, 1, 1, T))

    def fn(q, bias):
        return core.compiled(route, settings, Operands(q, k, v, bias=bias))[0]

    jax.jvp(lambda q: fn(q, bias), (q,), (dq,))
    jax.jvp(lambda bias: fn(q, bias), (bias,), (bias,))
    jax.jvp(fn, (q, bias), (dq, bias))
    assert moved == [["query"], ["bias"], ["bias", "query"]]


def test_bias_behind_the_mask_moves_nothing(inputs):
    q, k, v, *direction = inputs
    hidden = ~np.tril(np.ones((T, T), bool))

    def find(fill):
        bias = jnp.where(hidden, fill, 0.5)
        fn = functools.partial(ours, bias=bias, logits_soft_cap=2.0)
        return jax.jvp(fn, (q, k, v), tuple(direction))[1]

    assert_close(find(np.nan), find(0.0), 1e-6)
    assert_close(find(-np.inf), find(0.0), 1e-6)


@pytest.mark.slow
def test_third_derivatives_in_any_order_of_modes(inputs):
    q, k, v, *direction = (x[:1, :9, :1] for x in inputs)

    def slope(fn):
        return lambda *x: jax.jvp(lambda *x: jnp.sin(fn(*x)).sum(), x, tuple(direction))[1]

    def results(fn):
        twice = slope(lambda *x: jax.jvp(fn, x, tuple(direction))[1])
        in_the_direction = jax.grad(lambda t: jax.jvp(slope(fn), (q, k, v), (t, *direction[1:]))[1])
        return (
            jax.jvp(twice, (q, k, v), tuple(direction))[1],
            jax.grad(twice)(q, k, v),
            in_the_direction(direction[0]),
        )

    got, want = (cases.quick_jit(functools.partial(results, fn))() for fn in (ours, plain))
    assert_close(got, want, 1e-4)


@pytest.mark.slow
def test_training_on_a_derivative_as_mean_flow_models_do(inputs):
    q, k, v, *direction = inputs

    def loss(weight, fn):
        def model(q):
            return fn(q @ weight, k, v)

        output, moved = jax.jvp(model, (q,), (direction[0],))
        return jnp.square(output - jax.lax.stop_gradient(moved)).sum() + jnp.square(moved).sum()

    weight = jnp.eye(D) + 0.1
    got, want = (
        cases.quick_jit(jax.grad(functools.partial(loss, fn=f)))(weight) for f in (ours, plain)
    )
    assert_close(got, want, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mapped", ["direction", "qs", "kb", "qkvbs"])
def test_vmap(inputs, mapped):
    q, k, v, *directions = inputs
    rng = np.random.default_rng(1)
    sinks, bias = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((N,), (1, N, 1, T))
    )
    x = {"q": q, "k": k, "v": v, "b": bias, "s": sinks}
    t = dict(zip("qkv", directions)) | {"b": bias, "s": sinks}
    stack = lambda a: jnp.stack([a, -0.5 * a])  # noqa: E731
    x = {name: stack(a) if name in mapped else a for name, a in x.items()}
    t = {name: stack(a) if mapped == "direction" or name in mapped else a for name, a in t.items()}
    axes = lambda tree, like: {  # noqa: E731
        name: 0 if a.ndim > like[name].ndim else None for name, a in tree.items()
    }
    one = {"q": q, "k": k, "v": v, "b": bias, "s": sinks}

    def results(attend):
        def fn(x):
            return attend(x["q"], x["k"], x["v"], bias=x["b"], sinks=x["s"])

        def loss(x):
            return jnp.sin(fn(x)).sum()

        def find(x, t):
            return jax.jvp(fn, (x,), (t,))[1], jax.jvp(jax.grad(loss), (x,), (t,))[1]

        def total(x):
            losses = jax.vmap(
                lambda x, t: jax.jvp(loss, (x,), (t,))[1], in_axes=(axes(x, one), axes(t, one))
            )
            return losses(x, t).sum()

        inside = jax.vmap(find, in_axes=(axes(x, one), axes(t, one)))(x, t)
        return inside, jax.grad(total)(x)

    got, want = (cases.quick_jit(functools.partial(results, fn))() for fn in (ours, plain))
    assert_close(got, want, 1e-4)


@pytest.mark.slow
def test_jacobians(inputs):
    q, k, v, *_ = (x[:1, :5, :2] for x in inputs)
    want = cases.quick_jit(jax.jacrev(plain))(q, k, v)
    for jacobian in (jax.jacfwd, jax.jacrev):
        assert_close(cases.quick_jit(jacobian(ours))(q, k, v), want)
    loss = lambda fn: lambda q: jnp.sin(fn(q, k, v)).sum()  # noqa: E731
    got, want = (cases.quick_jit(jax.hessian(loss(fn)))(q) for fn in (ours, plain))
    assert_close(got, want)


def both_orders(fn):
    """Returns tangents and a Hessian-vector product of `fn`."""

    def find(x, t):
        def loss(x):
            return jnp.sin(fn(*x)).sum()

        return jax.jvp(lambda x: fn(*x), (x,), (t,))[1], jax.jvp(jax.grad(loss), (x,), (t,))[1]

    return find


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharding_over_batch_and_heads_gathers_nothing(inputs, kind):
    x, t = inputs[:3], inputs[3:]
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    sharding = NamedSharding(mesh, P("data", None, "model", None))
    sharded = jax.device_put((x, t), sharding)
    step = jax.jit(both_orders(ours))
    got = step(*sharded)
    assert_close(got, cases.quick_jit(both_orders(plain))(x, t), 1e-4)
    assert all(y.sharding.is_equivalent_to(sharding, 4) for y in jax.tree.leaves(got))
    program = step.lower(*sharded).compile().as_text()
    assert "all-gather" not in program
    assert "all-to-all" not in program
    assert "collective-permute" not in program


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_the_batch_with_keys_of_all_devices(inputs, check_vma):
    q, k, v, *t = inputs
    x, t = (q, k[:1], v[:1]), (t[0], t[1][:1], t[2][:1])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    local = jax.shard_map(
        ours, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"), check_vma=check_vma
    )
    whole = lambda q, k, v: plain(q, *(jnp.broadcast_to(a, q.shape) for a in (k, v)))  # noqa: E731
    want = cases.quick_jit(both_orders(whole))(x, t)
    assert_close(cases.quick_jit(both_orders(local))(x, t), want, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False])
def test_checkpoints(inputs, saved):
    x, t = inputs[:3], inputs[3:]
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names("attention_output", "attention_lse")
    fn = jax.checkpoint(ours, policy=policy if saved else policies.nothing_saveable)
    got = cases.quick_jit(both_orders(fn))(x, t)
    assert_close(got, cases.quick_jit(both_orders(plain))(x, t), 1e-4)


@pytest.mark.slow
def test_loops_and_branches(inputs):
    x, t = tuple(a[:1, :9] for a in inputs[:3]), tuple(a[:1, :9] for a in inputs[3:])

    def deep(attend):
        def fn(q, k, v):
            def layer(q, turn):
                return jax.lax.cond(turn, lambda q: attend(q, k, v), lambda q: q + 1, q), None

            return jax.lax.scan(layer, q, jnp.array([True, False, True]))[0]

        return cases.quick_jit(both_orders(fn))(x, t)

    assert_close(deep(ours), deep(plain), 1e-4)


def test_exported_tangents(inputs):
    x, t = inputs[:3], inputs[3:]
    program = jax.jit(lambda x, t: jax.jvp(ours, x, t))
    assert_close(jax.export.export(program)(x, t).call(x, t), program(x, t), 1e-6)


@pytest.mark.slow
def test_float64_and_strict_promotion(inputs):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        wide = [jnp.asarray(np.asarray(a), jnp.float64) for a in inputs]
        x, t = tuple(wide[:3]), tuple(wide[3:])
        got = cases.quick_jit(both_orders(ours))(x, t)
        assert all(y.dtype == jnp.float64 for y in jax.tree.leaves(got))
        assert_close(got, cases.quick_jit(both_orders(plain))(x, t), 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triton", "mosaic_tpu"])
def test_tangents_of_kernels_in_an_interpreter(name):
    # The kernel runs forward; what JAX does to it is the same for all of them.
    case = cases.Case(name, queries=64, keys=64, right=0)
    route = pytest.importorskip(f"pallas_kernels.attention.{name}").ROUTE
    _, fn, x, direction = built(case, route, interpret=True, config=None)
    got = cases.quick_jit(functools.partial(tangent_cases.tangents, fn))(x, direction)
    tangent_cases.check(case, got, tangent_cases.expected(case))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triton", "mosaic_tpu"])
def test_second_derivatives_of_kernels_in_an_interpreter(name):
    case = cases.Case(name, queries=64, keys=64, right=0)
    route = pytest.importorskip(f"pallas_kernels.attention.{name}").ROUTE
    problem, fn, x, direction = built(case, route, interpret=True, config=None)
    product = functools.partial(
        tangent_cases.forward_over_reverse, tangent_cases.loss_of(fn, problem)
    )
    got = cases.quick_jit(product)(x, direction)
    tangent_cases.check(case, got, tangent_cases.expected(case, second=True))


def ring_results(n, layout, method, x, t, mapped=None, check_vma=True):
    """Returns tangents and a Hessian-vector product of attention over a ring, and without one."""
    order, inverse = shard_sequence_order(T, n, layout)
    local = functools.partial(
        ring_attention, axis_name="context", layout=layout, method=method, is_causal=True,
        return_residual=True,
    )  # fmt: skip

    def spread(*x):
        parts = [jnp.moveaxis(a.reshape(B, n, T // n, *a.shape[2:]), 1, 0) for a in x[:3]]
        call = lambda *parts: local(*parts, sinks=x[3])  # noqa: E731
        results = jax.vmap(call, axis_name="context")(*parts)
        return tuple(jnp.moveaxis(a, 0, 1).reshape(B, T, *a.shape[3:]) for a in results)

    if mapped == "shard_map":
        mesh = jax.make_mesh((n,), ("context",), axis_types=(AxisType.Auto,))
        spec = P(None, "context")
        spread = jax.shard_map(
            lambda q, k, v, sinks: local(q, k, v, sinks=sinks),
            mesh=mesh, in_specs=(spec, spec, spec, P()), out_specs=spec, check_vma=check_vma,
        )  # fmt: skip

    def ring(q, k, v, sinks):
        results = spread(*(a[:, order] for a in (q, k, v)), sinks)
        return jnp.concatenate([results[0][:, inverse].ravel(), results[1][:, inverse].ravel()])

    def whole(q, k, v, sinks):
        results = plain(q, k, v, sinks=sinks, return_residual=True)
        return jnp.concatenate([a.ravel() for a in results])

    return (cases.quick_jit(both_orders(fn))(x, t) for fn in (ring, whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "method", "mapped", "check_vma"),
    [
        ("zigzag", "ring", "shard_map", True),
        ("contiguous", "ring", "shard_map", False),
        ("striped", "gather", "shard_map", True),
        ("zigzag", "all_to_all", "shard_map", True),
        ("zigzag", "ring", "vmap", True),
        ("zigzag", "gather", "vmap", True),
    ],
)
def test_rings(inputs, layout, method, mapped, check_vma):
    sinks = jnp.linspace(-1.0, 1.0, N)
    x, t = (*inputs[:3], sinks), (*inputs[3:], 1 - sinks)
    got, want = ring_results(2, layout, method, x, t, mapped, check_vma)
    assert_close(got, want, 1e-4)


def test_forms_are_told_apart_by_what_they_compute(inputs):
    q, k, v, *direction = inputs

    def primitives(fn, *arguments):
        text = str(jax.make_jaxpr(fn)(*arguments))
        return text.count(f"= {derivatives.form_p.name}")

    def loss(q):
        return ours(q, k, v).sum()

    assert primitives(loss, q) == 0
    assert primitives(lambda q, t: jax.jvp(loss, (q,), (t,)), q, direction[0]) == 1
    assert primitives(jax.grad(loss), q) == 1
