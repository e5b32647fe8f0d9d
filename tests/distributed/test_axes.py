"""Several mesh axes are one axis of as many replicas, for every function of an axis."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import distributed
from tests.distributed import modes

AXES, N, STEPS = ("host", "device"), 4, 2
GRADS = np.random.default_rng(0).normal(size=(N, STEPS, 8)).astype(np.float32)
METHODS = {
    "sync_gradients": lambda axis: distributed.sync_gradients(axis),
    "compressed_mean": lambda axis: distributed.compressed_mean(
        distributed.stochastic_int8(), axis
    ),
    "random_k": lambda axis: distributed.compressed_mean(
        distributed.random_k(0.5, unbiased=True), axis
    ),
    "error_feedback": lambda axis: distributed.error_feedback(distributed.top_k(0.25), axis),
    "two phases": lambda axis: distributed.error_feedback(
        distributed.sign(), axis, two_phase=True
    ),
    "ef21": lambda axis: distributed.ef21(distributed.top_k(0.25), axis, weights=[1, 2, 3, 4]),
    "econtrol": lambda axis: distributed.econtrol(distributed.top_k(0.25), axis),
    "powersgd": lambda axis: distributed.powersgd(1, axis, min_compression_rate=0.5),
    "one_bit_adam": lambda axis: distributed.one_bit_adam(0.1, 1, axis),
    "diloco": lambda axis: distributed.diloco(optax.sgd(0.1), sync_every=2, axis_name=axis),
    "noloco": lambda axis: distributed.noloco(optax.sgd(0.1), sync_every=2, axis_name=axis),
    "co2": lambda axis: distributed.co2(optax.sgd(0.1), sync_every=1, axis_name=axis),
    **{
        f"gossip {graph}": lambda axis, graph=graph: distributed.gossip(
            optax.sgd(0.1), axis_name=axis, graph=cast(Any, graph)
        )
        for graph in ("pairs", "ring", "torus", "exponential")
    },
    "hierarchical_mean": lambda axis: distributed.hierarchical_mean(optax.identity(), axis),
    "apply_if_finite": lambda axis: distributed.apply_if_finite(
        distributed.sync_gradients(axis), axis, 1
    ),
}  # fmt: skip


def run(tx, gradients):
    """The parameters after each step of one replica."""
    params: Any = {"w": jnp.ones((4, 2))}
    state, found = tx.init(params), []
    for gradient in gradients:
        gradient = {"w": gradient.reshape(4, 2)}
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params["w"])
    return jnp.stack(found)


def several(kind, fn):
    if kind == "simulated":
        return jax.vmap(jax.vmap(fn, axis_name="device"), axis_name="host")
    mesh = jax.make_mesh((2, 2), AXES, (jax.sharding.AxisType.Auto,) * 2)
    spec = jax.P(*AXES)

    def one(x):
        return fn(x[0, 0])[None, None]

    return jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=kind == "checked")


UNCHECKED = ("two phases", "one_bit_adam", "noloco", "hierarchical_mean")


@pytest.mark.parametrize(
    ("method", "kind"),
    [(method, kind) for method in METHODS for kind in ("checked", "simulated")]
    + [(method, "unchecked") for method in UNCHECKED],
)
def test_two_axes_of_two_are_one_of_four(method, kind):
    one = modes.mapped("vmap", lambda g: run(METHODS[method](modes.AXIS), g), N)(GRADS)
    two = jax.jit(several(kind, lambda g: run(METHODS[method](AXES), g)))(
        GRADS.reshape(2, 2, STEPS, 8)
    )
    # The order of a sum over four replicas.
    np.testing.assert_allclose(two.reshape(one.shape), one, rtol=1e-5, atol=1e-6)


def test_gradients_that_autodiff_has_summed_over_one_of_the_axes_are_refused():
    mesh = jax.make_mesh((2, 2), AXES, (jax.sharding.AxisType.Auto,) * 2)
    tx = distributed.error_feedback(distributed.identity(), AXES)

    def step(own, w, x):
        gradient = jax.grad(lambda w: jnp.sum(w * x))(distributed.vary(w, own))
        return tx.update(gradient, tx.init(w))[0]

    def mapped(own):
        return jax.jit(
            jax.shard_map(
                lambda w, x: step(own, w, x),
                mesh=mesh,
                in_specs=(jax.P(), jax.P(AXES)),
                out_specs=jax.P(),
            )
        )

    x = np.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(mapped(AXES)(jnp.ones(3), x), [4.5, 5.5, 6.5])
    with pytest.raises(ValueError, match="same on all replicas of axis 'host', because"):
        mapped("device")(jnp.ones(3), x)


def test_bytes_of_several_axes_are_those_of_one():
    def sent(axis, sizes):
        tx = distributed.noloco(optax.sgd(0.1), sync_every=1, axis_name=axis)
        params = jnp.zeros(1000)
        return distributed.wire_bytes(
            lambda g: tx.update(g, tx.init(params), params)[0], params, axis_sizes=sizes
        )

    two = sent(AXES, {"host": 2, "device": 4})
    assert two.by_kind() == sent("r", {"r": 8}).by_kind() == {"permute": 4000.0}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_axis_is_refused_by_name(method):
    for wrong in (None, {"a"}, ("a", None)):
        with pytest.raises(TypeError, match="axis"):
            METHODS[method](wrong)
    for wrong in ((), ("a", "a")):
        with pytest.raises(ValueError, match="axis"):
            METHODS[method](wrong)


def test_a_tuple_of_one_and_a_list_are_axes():
    def mean(axis):
        tx = distributed.compressed_mean(distributed.identity(), axis)
        return modes.mapped("shard_map", lambda g: tx.update(g, tx.init(g))[0], 2)(jnp.arange(2.0))

    np.testing.assert_array_equal(mean((modes.AXIS,)), [0.5, 0.5])
    np.testing.assert_array_equal(mean([modes.AXIS]), [0.5, 0.5])
