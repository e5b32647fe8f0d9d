"""The gradient of all data is the single-device gradient, whoever sums it."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.distributed import (
    error_feedback,
    hierarchical_mean,
    sync_gradients,
    top_k,
    vary,
)
from tests.distributed.modes import AXIS, MODES, REPLICAS, mapped, mesh

DATA = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 5), "b": jnp.float32(0.3)}
REDUCE = {"mean": jnp.mean, "sum": jnp.sum}


def loss(params, batch, op):
    return REDUCE[op](jnp.tanh(batch @ params["w"] + params["b"]) ** 2)


def synced(params, batch, op):
    grads = jax.grad(loss)(params, batch, op)
    return sync_gradients(AXIS, op).update(grads, optax.EmptyState())[0]


def assert_single_device(found, op):
    expected = jax.grad(loss)(PARAMS, DATA, op)
    # The order of the sums over 24 examples differs: a few units in the last place.
    for key in PARAMS:
        np.testing.assert_allclose(found[key], expected[key], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("mode", "replicas"), [*itertools.product(MODES, REPLICAS)])
@pytest.mark.parametrize("op", REDUCE)
def test_each_replica_has_its_own_parameters(mode, replicas, op):
    batches = DATA.reshape(replicas, -1, 5)
    copies = jax.tree.map(lambda x: jnp.stack([x] * replicas), PARAMS)
    found = mapped(mode, lambda p, b: synced(p, b, op), replicas)(copies, batches)
    for replica in range(replicas):
        assert_single_device(jax.tree.map(lambda x, i=replica: x[i], found), op)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("op", REDUCE)
@pytest.mark.parametrize("own", [True, False])
def test_parameters_that_are_equal_by_their_specification(checked, op, own):
    # Without `vary` and with checking, autodiff itself has summed what comes in.
    def step(params, batch):
        return synced(vary(params, AXIS) if own else params, batch, op)

    run = jax.shard_map(
        step, mesh=mesh(4), in_specs=(jax.P(), jax.P(AXIS)), out_specs=jax.P(), check_vma=checked
    )
    assert_single_device(jax.jit(run)(PARAMS, DATA), op)


def test_two_axes_of_which_one_is_summed_by_autodiff():
    two = jax.make_mesh((2, 2), ("host", "device"), (jax.sharding.AxisType.Auto,) * 2)

    def step(params, batch):
        grads = jax.grad(loss)(vary(params, "device"), batch, "mean")
        return sync_gradients(("host", "device")).update(grads, optax.EmptyState())[0]

    run = jax.shard_map(
        step, mesh=two, in_specs=(jax.P(), jax.P(("host", "device"))), out_specs=jax.P()
    )
    assert_single_device(jax.jit(run)(PARAMS, DATA), "mean")


def test_bad_input():
    with pytest.raises(ValueError, match=r"op must be one of .*'average'"):
        sync_gradients(AXIS, "average")  # pyright: ignore
    with pytest.raises(ValueError, match="axis 'replica' is not bound"):
        sync_gradients(AXIS).update(PARAMS, optax.EmptyState())
    integer = jax.vmap(
        lambda g: sync_gradients(AXIS).update({"w": g}, optax.EmptyState())[0], axis_name=AXIS
    )
    with pytest.raises(TypeError, match="'w' has dtype int32"):
        integer(jnp.ones(2, jnp.int32))


def two_levels(fn, kind, hosts, devices):
    """Returns `fn` over arrays of shape (hosts, devices, ...)."""
    if kind == "vmap":
        return jax.vmap(jax.vmap(fn, axis_name="device"), axis_name="host")
    two = jax.make_mesh((hosts, devices), ("host", "device"), (jax.sharding.AxisType.Auto,) * 2)
    spec = jax.P("host", "device")

    def one(tree):
        return jax.tree.map(lambda x: x[None, None], fn(jax.tree.map(lambda x: x[0, 0], tree)))

    return jax.shard_map(one, mesh=two, in_specs=spec, out_specs=spec, check_vma=kind == "checked")


@pytest.mark.parametrize("kind", ["vmap", "checked", "unchecked"])
@pytest.mark.parametrize(("hosts", "devices"), [(1, 1), (2, 3), (4, 2)])
def test_two_levels_give_the_flat_mean(kind, hosts, devices):
    rng = np.random.default_rng(1)
    grads = {
        "a": jnp.asarray(rng.normal(size=(hosts, devices, 3, 5)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(hosts, devices, 2)), jnp.bfloat16),
    }
    tx = hierarchical_mean(sync_gradients("host"), "device")
    found = jax.jit(two_levels(lambda g: tx.update(g, tx.init(g))[0], kind, hosts, devices))(grads)
    for key, values in grads.items():
        expected = np.mean(np.asarray(values, np.float64), axis=(0, 1))
        assert found[key].dtype == values.dtype
        tolerance = 1e-6 if key == "a" else 2**-8  # sums in float32, then the leaf's own rounding
        for host, device in np.ndindex(hosts, devices):
            np.testing.assert_allclose(
                np.asarray(found[key][host, device], np.float64), expected,
                rtol=tolerance, atol=tolerance,
            )  # fmt: skip


def test_two_levels_give_the_mean_over_all_tokens():
    tx = hierarchical_mean(sync_gradients("host"), "device")
    grads = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    tokens = np.array([[1.0, 0.0, 2.0], [5.0, 3.0, 0.0]], np.float32)

    def mean(g, weight):
        return tx.update(g, tx.init(g), weight=weight)[0]

    both: Any = jax.vmap(jax.vmap(mean, axis_name="device"), axis_name="host")
    wanted = np.einsum("hd,hdk->k", tokens, grads) / tokens.sum()
    np.testing.assert_allclose(both(grads, tokens), np.broadcast_to(wanted, (2, 3, 5)), rtol=1e-5)


def test_the_slow_level_sends_a_part():
    from jaxopt_lab.distributed import wire_bytes

    tx = hierarchical_mean(sync_gradients("host"), "device")
    sizes = {"host": 2, "device": 4}
    sent = wire_bytes(
        lambda g: tx.update(g, tx.init(g))[0], jnp.zeros(1000), axis_sizes=sizes
    ).always
    by_axis = {(c.kind, c.axes): c.sent_bytes for c in sent}
    assert by_axis == {
        ("reduce-scatter", ("device",)): 3 / 4 * 4000,
        ("all-reduce", ("host",)): 2 * (1 / 2) * 1000,
        ("all-gather", ("device",)): 3 * 1000,
    }


def test_hierarchical_mean_refuses_summed_gradients():
    two = jax.make_mesh((2, 2), ("host", "device"), (jax.sharding.AxisType.Auto,) * 2)
    tx = hierarchical_mean(sync_gradients("host"), "device")

    def step(params, batch):
        return tx.update(jax.grad(loss)(params, batch, "mean"), tx.init(params))[0]

    run = jax.shard_map(step, mesh=two, in_specs=(jax.P(), jax.P("host")), out_specs=jax.P())
    with pytest.raises(ValueError, match=r"gradient of 'b' is the same .*vary"):
        jax.eval_shape(run, PARAMS, DATA)


@pytest.mark.parametrize("slow_axis", ["device", ("host", "device")])
def test_hierarchical_mean_refuses_an_exchange_over_its_own_axis(slow_axis):
    for slow in (sync_gradients(slow_axis), error_feedback(top_k(0.5), slow_axis)):
        tx = hierarchical_mean(slow, "device")

        def mean(g, tx=tx):
            return tx.update(g, tx.init(g))[0]

        both = jax.vmap(jax.vmap(mean, axis_name="device"), axis_name="host")
        with pytest.raises(ValueError, match="axis 'device' is the mean's around this exchange"):
            both(jnp.ones((2, 2, 4)))
