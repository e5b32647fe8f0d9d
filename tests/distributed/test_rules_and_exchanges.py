"""What works in the simulation works on devices: every rule with every way to exchange."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab
from jaxopt_lab import distributed, quantization
from tests.distributed import modes
from tests.distributed.modes import AXIS
from tests.transforms.rules import OPTIMIZERS
from tests.transforms.rules import RULES as ALL

TITLE = "every rule with every exchange: devices give what the simulation gives"
REPLICAS, STEPS, RATE = 2, 3, 0.01
PARAMS = {
    "layers": {
        str(layer): {
            "kernel": jnp.asarray(np.random.default_rng(layer).normal(size=(6, 4)), jnp.float32),
            "bias": jnp.zeros(4),
        }
        for layer in range(1)
    }
}
BATCHES = np.random.default_rng(7).normal(size=(STEPS, REPLICAS, 5, 6)).astype(np.float32)


def every_second(step: Any, **extra_args: Any) -> Any:
    return step % 2 == 0


RULES = {str(rule): lambda rule=rule: rule(learning_rate=RATE) for rule in OPTIMIZERS} | {
    "optax.adamw": lambda: optax.adamw(RATE),
    "int8 state": lambda: jaxopt_lab.quantize_state(
        optax.adamw(RATE), quantization.int8(), min_size=1
    ),
    "bfloat16 state": lambda: jaxopt_lab.quantize_state(
        optax.adamw(RATE), quantization.bfloat16()
    ),
    "clip_coordinates": lambda: optax.chain(
        jaxopt_lab.clip_coordinates(0.25), jaxopt_lab.adabelief(RATE)
    ),
    "frugal_adamw-blocks": lambda: jaxopt_lab.frugal_adamw(
        RATE, density=0.5, projection=jaxopt_lab.subspace.blocks(), update_gap=2
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(RATE), 2),
    "conditionally_transform": lambda: optax.chain(
        optax.transforms.conditionally_transform(optax.scale_by_adam(), every_second),
        optax.scale_by_learning_rate(RATE),
    ),
    "MultiSteps": lambda: optax.MultiSteps(
        optax.adam(RATE), 2
    ).gradient_transformation(),
    "reduce_on_plateau": lambda: optax.chain(
        optax.adam(RATE), optax.contrib.reduce_on_plateau(patience=1)
    ),
}  # fmt: skip
EXCHANGES = {
    "none": lambda rule: rule,
    "sync": lambda rule: optax.chain(distributed.sync_gradients(AXIS), rule),
    "error feedback": lambda rule: optax.chain(
        distributed.error_feedback(distributed.top_k(0.25), AXIS), rule
    ),
    "int8": lambda rule: optax.chain(
        distributed.compressed_mean(distributed.stochastic_int8(), AXIS), rule
    ),
    "one-bit": lambda rule: optax.chain(
        distributed.error_feedback(distributed.sign(), AXIS, two_phase=True), rule
    ),
    "DiLoCo": lambda rule: distributed.diloco(rule, sync_every=2, axis_name=AXIS),
    "NoLoCo": lambda rule: distributed.noloco(rule, sync_every=2, axis_name=AXIS),
}
# Around everything, exchanges inside.
AROUND = {
    "one_bit_adam": lambda: distributed.one_bit_adam(RATE, 1, AXIS),
    "powersgd": lambda: optax.chain(
        distributed.powersgd(1, AXIS, min_compression_rate=1), optax.sgd(RATE)
    ),
    "ef21": lambda: optax.chain(distributed.ef21(distributed.top_k(0.25), AXIS), optax.adam(RATE)),
    "co2": lambda: distributed.co2(optax.adam(RATE), sync_every=2, axis_name=AXIS),
    "gossip": lambda: distributed.gossip(optax.adam(RATE), sync_every=2, axis_name=AXIS),
}
WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "conditionally_mask": lambda tx: optax.transforms.conditionally_mask(tx, every_second),
    "conditionally_transform": lambda tx: optax.transforms.conditionally_transform(
        tx, every_second
    ),
    "distributed.apply_if_finite": lambda tx: distributed.apply_if_finite(tx, AXIS, 2),
}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def loss(params: Any, x: jax.Array) -> jax.Array:
    for layer in params["layers"].values():
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean((x - 0.5) ** 2)


def trained(replicas: distributed.Replicas, tx: Any) -> tuple[Any, float]:
    """Returns the last state, and how far a parameter has been from its start at most."""
    state, step = replicas.init(tx, PARAMS), replicas.train_step(loss, tx)
    furthest = 0.0
    for batch in BATCHES:
        state, _ = step(state, replicas.shard(batch))
        moved = jax.tree.map(lambda p, q: np.abs(p - q).max(), state.params, PARAMS)
        furthest = max(furthest, *jax.tree.leaves(moved))
    return state, furthest


def assert_devices_give_what_the_simulation_gives(tx: Any) -> None:
    simulated, _ = trained(distributed.simulated_replicas(REPLICAS), tx)
    on_devices = distributed.device_replicas(devices=jax.devices()[:REPLICAS])
    found, furthest = trained(on_devices, tx)
    # The steps are of the size of the rate; a product under vmap may add in another order.
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(simulated.params)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * RATE)
    assert jax.tree.structure(found) == jax.tree.structure(simulated)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(simulated)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert furthest > RATE / 10


# Each rule and each exchange with some of the others quickly, all pairs in the slow part.
PAIRS = [
    pytest.param(rule, exchange, marks=[pytest.mark.slow] if (i + j) % 3 else [])
    for i, rule in enumerate(RULES)
    for j, exchange in enumerate(EXCHANGES)
]


@pytest.mark.parametrize(("rule", "exchange"), PAIRS)
def test_every_rule_with_every_exchange(rule, exchange, record_property):
    record_property("cell", (TITLE, rule, exchange))
    assert_devices_give_what_the_simulation_gives(EXCHANGES[exchange](RULES[rule]()))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("method", AROUND)
def test_every_exchange_in_every_wrapper(method, wrapper, record_property):
    record_property("cell", ("exchanges inside wrappers", method, wrapper))
    assert_devices_give_what_the_simulation_gives(WRAPPERS[wrapper](AROUND[method]()))


# Optax's own wrappers have branches that `shard_map` with its checks refuses.
OWN = [*(name for name in RULES if name not in
         ("apply_if_finite", "conditionally_transform", "MultiSteps", "reduce_on_plateau")),
       "randomized"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("rule", OWN)
def test_every_rule_under_a_shard_map_that_checks_what_varies(rule):
    """On gradients that vary, with parameters and first states that do not."""
    make = RULES.get(rule, lambda: next(r for r in ALL if r.note == rule)(learning_rate=RATE))
    tx = optax.with_extra_args_support(make())

    def two_steps(batch):
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(2):
            grads = jax.grad(loss)(distributed.vary(params, AXIS), batch)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    found, expected = (
        modes.mapped(mode, two_steps, REPLICAS)(BATCHES[0]) for mode in ("shard_map", "vmap")
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * RATE)
