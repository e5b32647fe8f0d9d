"""Attention on meshes: arrays without a place, explicit axes, axes beside one another."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.sharding_impls import GSPMDSharding  # what the partitioner hands over
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels.attention.placement import named
from tests.pallas_kernels.attention.cases import quick_jit

KINDS = [AxisType.Auto, AxisType.Explicit]
X, *WEIGHTS = jax.random.normal(jax.random.key(0), (4, 4, 8, 2, 8))
WEIGHTS = 0.3 * jnp.stack([w[0, :, 0] for w in WEIGHTS])


def mesh_of(sizes, names, kind):
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))


def layer(x, attend=pallas_kernels.attention, constrain=lambda x: x):
    return attend(*(jnp.einsum("btnd,de->btne", constrain(x), w) for w in WEIGHTS))


def close(got, want):
    """Float32 sums of a few dozen terms of order one, in two orders."""
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(jax.device_get(g), w, rtol=1e-4, atol=2e-5),
        got, want,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_that_are_not_placed_yet(kind):
    want = layer(X, jax.nn.dot_product_attention)
    alone = jax.nn.dot_product_attention(X, X, X)
    with jax.set_mesh(mesh_of((4,), ("x",), kind)):
        close(layer(X), want)
        close(pallas_kernels.attention(X, X, X), alone)
        ahead = quick_jit(lambda x: pallas_kernels.attention(x, x, x))
        close(ahead.lower(jax.ShapeDtypeStruct(X.shape, X.dtype)).compile()(X), alone)
        step = lambda x, _: (layer(x), None)  # noqa: E731
        close(quick_jit(lambda x: jax.lax.scan(step, x, None, length=2)[0])(X), layer(want))
        close(quick_jit(lambda: layer(jnp.zeros_like(X)))(), 0 * want)


@pytest.mark.slow
def test_gradients_of_arrays_that_are_not_placed_yet():
    loss = lambda x, attend: (layer(x, attend) ** 2).sum()  # noqa: E731
    want = jax.grad(loss)(X, jax.nn.dot_product_attention)
    with jax.set_mesh(mesh_of((4,), ("x",), AxisType.Auto)):
        close(quick_jit(lambda x: jax.grad(loss)(x, pallas_kernels.attention))(X), want)


@pytest.mark.parametrize("spec", [P("a", None, "b"), P(("b", "a")), P(None, None, "b")], ids=str)
def test_what_is_placed_inside_of_the_program_stays_there(spec):
    constrain = lambda x: jax.lax.with_sharding_constraint(x, spec)  # noqa: E731
    with jax.set_mesh(mesh_of((2, 2), ("a", "b"), AxisType.Auto)) as _:
        step = jax.jit(lambda x: layer(x, constrain=constrain))
        got = step(X)
        assert "all-gather" not in step.lower(X).compile().as_text()
        assert got.sharding.shard_shape(X.shape) == NamedSharding(
            got.sharding.mesh, spec
        ).shard_shape(X.shape)
    close(got, layer(X))


def test_places_without_a_mesh_are_found_in_the_one_of_the_trace():
    x = jnp.zeros((4, 2))
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert named(single, jax.sharding.get_abstract_mesh(), x.shape).is_fully_replicated
    mesh = mesh_of((2, 2), ("a", "b"), AxisType.Auto)
    for spec in (P("b", "a"), P(("a", "b"), None), P(None, "b"), P(None, None)):
        place = NamedSharding(mesh, spec)
        unnamed = GSPMDSharding(mesh.devices.ravel(), place._to_xla_hlo_sharding(2))
        assert named(unnamed, mesh.abstract_mesh, x.shape).spec == spec


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "spec"),
    [((4,), P(None, "x")), ((2, 2), P("x", "y")), ((2, 2), P(None, "y", None, "x"))],
    ids=str,
)
def test_two_batch_axes_and_vmap_on_explicit_axes(sizes, spec):
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 2, 8))
    lengths = jnp.arange(8).reshape(2, 4) % 4 + 1
    dropout = {"dropout_rate": 0.3, "dropout_rng": jax.random.key(2)}

    def once(x):
        def loss(x):
            ids = jnp.arange(8).reshape(2, 4, 1) + jnp.arange(4).reshape(1, 1, 4) // 2
            y = pallas_kernels.attention(
                x, x, x, query_segment_ids=ids, key_value_seq_lengths=lengths,
                bias=(jnp.arange(32.0) / 9).reshape(2, 4, 1, 1, 4), **dropout,
            )  # fmt: skip
            return (y**2).sum(), y

        return jax.grad(loss, has_aux=True)(x)

    mapped = jax.vmap(lambda x: pallas_kernels.attention(x, x, x, is_causal=True))
    both = quick_jit(lambda x: (once(x), mapped(x)))
    want = both(x)
    mesh = mesh_of(sizes, ("x", "y")[: len(sizes)], AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        got = both(placed)
        assert all(y.sharding.is_equivalent_to(placed.sharding, 5) for y in jax.tree.leaves(got))
        assert "all-gather" not in both.lower(placed).compile().as_text()
    close(got, want)


@pytest.mark.slow
def test_gradient_inside_of_a_shard_map_over_some_of_the_explicit_axes():
    x = jax.random.normal(jax.random.key(1), (3, 2, 8, 4, 8))
    want = jax.grad(lambda x: (jax.nn.dot_product_attention(*x) ** 2).sum())(x)
    mesh = mesh_of((2, 2), ("data", "heads"), AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, P("data", None, "heads"))) for a in x]
        local = jax.shard_map(
            pallas_kernels.attention, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
        )
        got = quick_jit(jax.grad(lambda *x: (local(*x) ** 2).sum(), (0, 1, 2)))(*placed)
    close(list(got), list(want))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ring", "gather"])
def test_a_ring_beside_explicit_axes(method):
    q, k, v = jax.random.normal(jax.random.key(1), (3, 2, 16, 4, 8))
    sinks = jnp.arange(4.0) / 3
    order, inverse = pallas_kernels.shard_sequence_order(16, 2)

    def loss(attend):
        return lambda *x: (attend(*x) ** 2).sum()

    def whole(q, k, v, sinks):
        return pallas_kernels.attention(q, k, v, is_causal=True, sinks=sinks)

    def slices(q, k, v, sinks):
        return pallas_kernels.ring_attention(
            q, k, v, axis_name="c", is_causal=True, sinks=sinks, method=method
        )

    want = quick_jit(jax.value_and_grad(loss(whole), (0, 1, 2, 3)))(q, k, v, sinks)
    mesh = mesh_of((2, 2, 2), ("data", "c", "heads"), AxisType.Explicit)
    spread = P(None, "c")
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P("data", "c", "heads"))
        placed = [jax.device_put(x[:, order], place) for x in (q, k, v)]
        fn = jax.shard_map(
            slices, in_specs=(*(spread,) * 3, P()), out_specs=spread, axis_names={"c"}
        )
        got = quick_jit(jax.value_and_grad(loss(fn), (0, 1, 2, 3)))(*placed, sinks)
    value, (*rows, d_sinks) = jax.device_get(got)
    close((value, (*(x[:, inverse] for x in rows), d_sinks)), want)


def test_all_to_all_beside_explicit_axes_is_refused():
    mesh = mesh_of((2, 2), ("c", "heads"), AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((1, 8, 4, 8)), NamedSharding(mesh, P(None, "c", "heads")))
        fn = jax.shard_map(
            lambda x: pallas_kernels.ring_attention(x, x, x, axis_name="c", method="all_to_all"),
            in_specs=P(None, "c"), out_specs=P(None, "c"), axis_names={"c"},
        )  # fmt: skip
        with pytest.raises(NotImplementedError, match="beside explicit mesh axes; expected 'ring'"):
            fn(x)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x")], ids=str)
def test_decoding_on_explicit_axes(spec, implementation):
    q, cache = jnp.ones((4, 1, 4, 8)), jax.random.normal(jax.random.key(0), (4, 8, 4, 8))
    table = np.random.default_rng(0).permutation(8).reshape(4, 2)
    pages = jnp.zeros((8, 4, 4, 8)).at[table.ravel()].set(cache.reshape(8, 4, 4, 8))
    sinks = jnp.arange(4.0)

    def both(q, cache, pages, lengths=(5, 3, 8, 0)):
        options = {"sinks": sinks, "local_window_size": 3, "implementation": implementation}
        decode = pallas_kernels.decode_attention
        return (
            decode(q, cache, cache, lengths, **options),
            decode(q, pages, pages, lengths, page_table=table, **options),
        )

    want = quick_jit(both)(q, cache, pages)
    mesh = mesh_of((4,), ("x",), AxisType.Explicit)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, spec)
        placed = jax.device_put(q, place), jax.device_put(cache, place), pages
        step = quick_jit(both)
        got = step(*placed)
        assert all(x.sharding.is_equivalent_to(place, 4) for x in got)
        assert "all-gather" not in step.lower(*placed).compile().as_text()
        with pytest.raises(ValueError, match=r"key_cache has shape \(4, 8, 4, 8\); expected"):
            both(placed[0][..., :7], *placed[1:])
    close(got, want)


@pytest.mark.slow
def test_rules_prefixes_and_their_derivatives_on_explicit_axes():
    q, k, dq = jax.random.normal(jax.random.key(3), (3, 4, 8, 4, 8))
    slopes, sinks = pallas_kernels.alibi_slopes(4), jnp.arange(4.0)
    prefix, start = jnp.array([2, 0, 5, 1]), jnp.array([0, 1, 0, 3])

    def gradient(q, k, slopes, sinks):
        def loss(q, slopes, sinks):
            y = pallas_kernels.attention(
                q, k, k, pallas_kernels.Alibi(slopes), is_causal=True, sinks=sinks,
                prefix_lengths=prefix, key_value_start=start,
            )  # fmt: skip
            return (y**2).sum()

        return jax.grad(loss, (0, 1, 2))(q, slopes, sinks)

    @quick_jit
    def both(q, k, dq, slopes, sinks):
        fn = lambda q, slopes, sinks: gradient(q, k, slopes, sinks)  # noqa: E731
        return jax.jvp(fn, (q, slopes, sinks), (dq, slopes, sinks))

    want = both(q, k, dq, slopes, sinks)
    mesh = mesh_of((2, 2), ("data", "heads"), AxisType.Explicit)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P("data", None, "heads"))
        placed = [jax.device_put(x, place) for x in (q, k, dq)]
        got = both(*placed, slopes, sinks)
        for moved in got:
            assert moved[0].sharding.is_equivalent_to(place, 4)
    close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rules_and_prefixes_of_arrays_that_are_not_placed_yet(kind):
    options = {"is_causal": True, "prefix_lengths": [1, 0, 2, 3], "key_value_start": 1}
    bias = pallas_kernels.Alibi(pallas_kernels.alibi_slopes(2))
    attend = lambda x: pallas_kernels.attention(x, x, x, bias, **options)  # noqa: E731
    want = attend(X)
    with jax.set_mesh(mesh_of((4,), ("x",), kind)):
        close(quick_jit(attend)(X), want)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x")], ids=str)
def test_decoding_with_a_rule_first_keys_a_prefix_and_scales_on_explicit_axes(spec):
    q = jax.random.normal(jax.random.key(0), (4, 2, 8, 8))
    cache = jax.random.randint(jax.random.key(1), (4, 8, 4, 8), -127, 128, jnp.int8)
    scale = 0.01 * (1 + jnp.arange(4.0))
    table = pallas_kernels.RelativePositionBias(
        jax.random.normal(jax.random.key(2), (8, 8)), bidirectional=False
    )

    def decode(q, cache):
        return pallas_kernels.decode_attention(
            q, cache, cache, 2**40, key_scale=scale, value_scale=0.02, bias=table,
            key_value_start=[0, 3, 1, 2], prefix_lengths=np.int64(2**35), num_splits=2,
        )  # fmt: skip

    want = quick_jit(decode)(q, cache)
    mesh = mesh_of((4,), ("x",), AxisType.Explicit)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, spec)
        step = quick_jit(decode)
        placed = jax.device_put(q, place), jax.device_put(cache, place)
        got = step(*placed)
        assert got.sharding.is_equivalent_to(place, 4)
        assert "all-gather" not in step.lower(*placed).compile().as_text()
    close(got, want)
