"""The rules inside Flax's two training loops, and their state through orbax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state
from orbax.checkpoint import v1 as ocp

from tests.transforms.rules import OPTIMIZERS

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4)), jnp.float32)
Y = jnp.sum(X, 1, keepdims=True)

each_optimizer = pytest.mark.parametrize("rule", OPTIMIZERS, ids=str)


@each_optimizer
def test_nnx_optimizer(rule):
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.hidden = nnx.Linear(4, 5, rngs=rngs)
            self.out = nnx.Linear(5, 1, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.out(jnp.tanh(self.hidden(x)))

    def loss(net: Net) -> jax.Array:
        return jnp.mean(jnp.square(net(X) - Y))

    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, rule(), wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer):
        value, grads = nnx.value_and_grad(loss)(net)
        optimizer.update(net, grads)
        return value

    losses = [float(step(net, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]


@each_optimizer
def test_linen_train_state(rule):
    net = linen.Sequential([linen.Dense(5), jnp.tanh, linen.Dense(1)])
    params = net.init(jax.random.key(0), X)["params"]
    state = train_state.TrainState.create(apply_fn=net.apply, params=params, tx=rule())

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean(jnp.square(state.apply_fn({"params": params}, X) - Y))

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(10):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < losses[0]


@each_optimizer
def test_orbax_restores_every_bit(rule, tmp_path):
    tx = rule(learning_rate=optax.linear_schedule(0.1, 0.0, 10))
    params = {"kernel": X, "bias": X[0]}
    update = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(3):
        updates, state = update(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
    ocp.save(tmp_path / "step3", {"params": params, "state": state})

    # The target's structure comes from abstract values: nothing is allocated to restore into.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(lambda p: {"params": p, "state": tx.init(p)}, params),
    )
    restored = ocp.load(tmp_path / "step3", abstract)
    assert jax.tree.structure(restored["state"]) == jax.tree.structure(state)
    grads = jax.tree.map(jnp.sin, params)
    continued = update(grads, state, params)
    resumed = update(grads, restored["state"], restored["params"])
    jax.tree.map(np.testing.assert_array_equal, continued, resumed)
