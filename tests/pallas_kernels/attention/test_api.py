"""`attention` as users call it: beside `jax.nn`, under transformations, and on several devices."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import attention, explain
from pallas_kernels.attention import chunked, core
from pallas_kernels.attention.problem import Operands, Settings
from tests.pallas_kernels.attention import cases

B, T, N, D = 2, 40, 4, 16


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, T, N, D)), jnp.float32) for _ in range(3))


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"is_causal": True, "scale": 0.3},
        {"local_window_size": (5, 2)},
        {"local_window_size": 7, "is_causal": True},
        {"key_value_seq_lengths": jnp.array([40, 9]), "query_seq_lengths": jnp.array([13, 40])},
        {"bias": jnp.linspace(-3, 3, N * T).reshape(1, N, 1, T)},
        {"mask": jnp.tri(T, dtype=bool)[None, None]},
    ],
    ids=str,
)
def test_equals_jax_nn(inputs, arguments, implementation):
    options = arguments | {"return_residual": True}

    @jax.jit
    def both(*x):
        want = jax.nn.dot_product_attention(*x, **options)
        return attention(*x, **options, implementation=implementation), want

    (got, lse), (want, want_lse) = both(*inputs)
    # Rows beyond the query length are 0 in both; jax.nn gives them an lse all the same.
    rows = np.arange(T) < np.asarray(arguments.get("query_seq_lengths", [T, T]))[:, None]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(lse[rows], want_lse[rows], rtol=1e-5, atol=2e-6)
    assert (np.asarray(lse)[~rows] == -np.inf).all()


def test_batch_axes_may_be_none_or_many(inputs):
    want = attention(*inputs, is_causal=True)
    one = attention(*(x[0] for x in inputs), is_causal=True, mask=jnp.ones((T, T), bool))
    np.testing.assert_allclose(one, want[0], rtol=1e-5, atol=1e-6)
    many, lse = attention(
        *(x.reshape(2, 1, 1, T, N, D) for x in inputs),
        is_causal=True,
        return_residual=True,
        bias=jnp.zeros((2, 1, 1, N, 1, T)),
        query_segment_ids=jnp.zeros((2, 1, 1, T), int),
        key_value_seq_lengths=jnp.full((2, 1, 1), T),
    )
    np.testing.assert_allclose(many[:, 0, 0], want, rtol=1e-6, atol=1e-6)
    assert lse.shape == (2, 1, 1, T, N)


@pytest.mark.parametrize("sizes", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty_axes(sizes):
    b, t, s = sizes
    q, k = jnp.zeros((b, t, N, D)), jnp.zeros((b, s, N, D))
    output, lse = jax.jit(lambda q, k: attention(q, k, k, return_residual=True))(q, k)
    assert output.shape == (b, t, N, D)
    np.testing.assert_array_equal(output, 0)
    np.testing.assert_array_equal(lse, -np.inf)
    gradient = jax.jit(jax.grad(lambda k: attention(q, k, k).sum()))(k)
    assert gradient.shape == k.shape


def test_explain_names_every_route_and_the_chosen_one():
    x = jax.ShapeDtypeStruct((1, 64, 2, 32), jnp.bfloat16)
    found = explain(x, x, x, is_causal=True)
    assert found.chosen == "chunked"
    assert set(found.refusals) == {
        "mosaic_gpu", "mosaic_tpu", "triton", "cudnn", "chunked", "reference"
    }  # fmt: skip
    assert found.refusals["chunked"] is None
    for name in ("mosaic_gpu", "mosaic_tpu", "triton", "cudnn"):
        assert "cpu" in found.refusals[name]
    assert "-> chunked    serves" in str(found)
    assert explain(x, x, x, implementation="triton").chosen is None
    assert explain(x, x, x, implementation=("triton", "reference")).chosen == "reference"


# Under transformations. The kernel's own batching and sharding stand between, so every kind of
# operand takes part.
EVERYTHING = next(case for case in cases.CASES if case.name == "everything")


@pytest.fixture(scope="module")
def problem():
    return cases.build(EVERYTHING)


def gradients(problem):
    """Returns the gradient function of a loss of all that is differentiable, and its arguments."""
    operands, (d_output, d_lse) = problem.operands, problem.cotangents

    def loss(query, key, value, bias, sinks, mask, seeds, d_output, d_lse):
        changed = operands._replace(
            query=query, key=key, value=value, bias=bias, sinks=sinks, mask=mask, seeds=seeds
        )
        output, lse = core.attend(chunked.ROUTE, problem.settings, changed)
        return (output * d_output).sum() + (jnp.where(lse == -jnp.inf, 0, lse) * d_lse).sum()

    arguments = (operands.query, operands.key, operands.value, operands.bias, operands.sinks)
    rest = (operands.mask, operands.seeds, d_output, d_lse)
    return jax.grad(loss, (0, 1, 2, 3, 4)), arguments, rest


def assert_close(got, want):
    # Sums over other orders of float32 numbers of order ten.
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mapped", "shared_bias"),
    [("q", False), ("q", True), ("kb", False), ("b", True), ("qs", False), ("qkvbs", True)],
)
def test_vmap_over_any_arguments(problem, mapped, shared_bias):
    gradient, arguments, rest = gradients(problem)
    query, key, value, bias, sinks = arguments
    bias = bias[:1] if shared_bias else bias
    arguments = (query, key, value, bias, sinks)
    axes = tuple(0 if letter in mapped else None for letter in "qkvbs")
    stacked = tuple(jnp.stack([x, 0.5 * x]) if axis == 0 else x for x, axis in zip(arguments, axes))
    got = jax.jit(jax.vmap(lambda *a: gradient(*a, *rest), in_axes=axes))(*stacked)
    one = jax.jit(gradient)
    for i in range(2):
        want = one(*(x[i] if axis == 0 else x for x, axis in zip(stacked, axes)), *rest)
        assert_close([x[i] for x in got], want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("bias_axes", ["bn", "n", ""])
def test_sharding_over_batch_and_heads_gathers_nothing(problem, kind, bias_axes):
    gradient, arguments, rest = gradients(problem)
    query, key, value, bias, sinks = arguments
    bias = bias[: None if "b" in bias_axes else 1, : None if "n" in bias_axes else 1]
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    heads = P("data", None, "model", None)
    bias_spec = P("data" if "b" in bias_axes else None, "model" if "n" in bias_axes else None)

    def put(x, spec=None):
        return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec or P())), x)

    mask, seeds, d_output, d_lse = rest
    sharded = (
        put(query, heads), put(key, heads), put(value, heads), put(bias, bias_spec),
        put(sinks, P("model")), put(mask), put(seeds), put(d_output, heads),
        put(d_lse, P("data", "model")),
    )  # fmt: skip
    step = jax.jit(gradient)
    got = step(*sharded)
    assert_close(got, step(query, key, value, bias, sinks, *rest))
    for x in got[:3]:
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, heads), 4)
    program = step.lower(*sharded).compile().as_text()
    assert "all-gather" not in program
    assert "all-to-all" not in program
    assert "collective-permute" not in program


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_heads_that_share_one_key_head_may_be_sharded(inputs, kind):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(kind,))
    q, k, v = inputs[0], inputs[1][:, :, :1], inputs[2][:, :, :1]
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    step = jax.jit(jax.grad(lambda q, k, v: jnp.square(attention(q, k, v)).sum(), (0, 1, 2)))
    sharded = put(q, None, None, "model"), put(k), put(v)
    assert_close(step(*sharded), step(q, k, v))
    assert "all-gather" not in step.lower(*sharded).compile().as_text()


def test_vmap_over_queries_of_one_batch_entry(inputs):
    q, k, v = inputs
    got = jax.vmap(lambda q: attention(q, k[:1], v[:1]))(q[:, None])
    for i in range(B):
        want = attention(q[i : i + 1], k[:1], v[:1])
        np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_the_batch(inputs, check_vma):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def loss(q, k, v):
        return attention(q, k, v, is_causal=True, key_value_seq_lengths=[30] * len(q)).sum()

    def local(q, k, v):
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    step = jax.shard_map(
        local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
    )
    assert_close(jax.jit(step)(*inputs), jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs))


def test_explicitly_sharded_sequences_and_uneven_heads_are_refused(inputs):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    q, k, v = inputs
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    along_length = put(q, None, "x")
    with pytest.raises(ValueError, match=r"query .* is sharded as .*ring_attention"):
        jax.jit(attention)(along_length, put(k), put(v))
    with pytest.raises(ValueError, match="4 devices, which do not divide the 2 heads of key"):
        jax.jit(attention)(put(q, None, None, "x"), put(k[:, :, :2]), put(v[:, :, :2]))


@pytest.mark.slow
def test_checkpoint_policy_saves_the_forward_pass(inputs):
    policy = jax.checkpoint_policies.save_only_these_names("attention_output", "attention_lse")
    call = functools.partial(
        attention, is_causal=True, implementation="chunked", config=chunked.ChunkedConfig(8, 8)
    )
    loss = lambda q, k, v: jnp.square(call(q, k, v)).sum()  # noqa: E731
    plain = jax.grad(loss)(*inputs)
    for saved in (policy, jax.checkpoint_policies.nothing_saveable, None):
        assert_close(jax.grad(jax.checkpoint(loss, policy=saved))(*inputs), plain)

    def loops(policy):
        step = jax.jit(jax.value_and_grad(jax.checkpoint(loss, policy=policy)))
        return step.lower(*inputs).compile().as_text().count(" while(")

    assert loops(policy) < loops(jax.checkpoint_policies.nothing_saveable)


def test_scan_and_donation(inputs):
    q, k, v = inputs

    def body(carry, _):
        return attention(carry, k, v), carry.sum()

    final, sums = jax.jit(lambda q: jax.lax.scan(body, q, length=3), donate_argnums=0)(q + 0)
    step = jax.jit(lambda q: attention(q, k, v))
    np.testing.assert_allclose(final, step(step(step(q))), rtol=1e-5, atol=1e-6)
    assert sums.shape == (3,)


def test_gradient_of_lse_alone_is_the_mean_key(inputs):
    q, k, v = inputs
    gradient = jax.grad(lambda q: attention(q, k, v, scale=1.0, return_residual=True)[1].sum())(q)
    weights = jax.nn.softmax(jnp.einsum("btnd,bsnd->bnts", q, k), -1)
    np.testing.assert_allclose(
        gradient, jnp.einsum("bnts,bsnd->btnd", weights, k), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_a_constant_bias_costs_no_gradient(inputs):
    asked = []

    def backward(*arguments):
        asked.append(arguments[-1])
        return chunked.backward(*arguments)

    route = chunked.ROUTE._replace(backward=backward)
    settings = Settings(scale=1.0)

    def loss(query, bias):
        operands = Operands(query, *inputs[1:], bias=bias)
        return core.attend(route, settings, operands)[0].sum()

    bias = jnp.ones((B, N, T, T))
    jax.grad(loss)(inputs[0], bias)
    jax.grad(loss, (0, 1))(inputs[0], bias)
    assert asked == [False, True]


def test_float64_and_strict_promotion(inputs):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        q, k, v = (jnp.asarray(np.asarray(x), jnp.float64) for x in inputs)
        output, lse = attention(q, k, v, is_causal=True, return_residual=True)
        assert output.dtype == lse.dtype == jnp.float64
        want = cases.at_once(attention, q, k, v, is_causal=True, implementation="reference")
        np.testing.assert_allclose(output, want, rtol=1e-12, atol=1e-14)
        half = attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), local_window_size=3)
        assert half.dtype == jnp.bfloat16


def test_dropout_is_the_same_on_every_route_and_blocksize(inputs):
    key = jax.random.key(3)
    call = functools.partial(cases.at_once, attention, *inputs, dropout_rate=0.4, dropout_rng=key)
    want = call(implementation="reference")
    np.testing.assert_allclose(call(), want, rtol=1e-5, atol=1e-6)
    config = chunked.ChunkedConfig(16, 8)
    got = call(implementation="chunked", config=config)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    old_style = attention(*inputs, dropout_rate=0.4, dropout_rng=jax.random.PRNGKey(3))
    np.testing.assert_array_equal(old_style, call())
