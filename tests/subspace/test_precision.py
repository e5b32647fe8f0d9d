"""Dtypes of updates, and that nothing small is lost between a gradient and its update."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import jaxopt_lab
from jaxopt_lab import subspace

RULES: dict[str, Any] = {
    "frugal_adamw": functools.partial(jaxopt_lab.frugal_adamw, density=0.5),
    "galore_adamw": functools.partial(jaxopt_lab.galore_adamw, rank=4),
    "dct_adamw": functools.partial(jaxopt_lab.dct_adamw, rank=4),
    "badam": jaxopt_lab.badam,
}
WEIGHTS = {"w": 0.02 * jax.random.normal(jax.random.key(0), (16, 12))}
NARROW = {"w": jax.random.normal(jax.random.key(1), (16, 12)).astype(jnp.bfloat16)}


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("rate", [1e-3, 1e-7])
def test_narrow_gradients_of_wide_weights_keep_decay_and_small_rates(name, rate):
    def update(weight_decay: float, grads: Any) -> np.ndarray:
        tx = RULES[name](rate, weight_decay=weight_decay)
        return tx.update(grads, tx.init(WEIGHTS), WEIGHTS)[0]["w"]

    decayed, plain = update(0.01, NARROW), update(0.0, NARROW)
    assert decayed.dtype == jnp.float32
    assert np.mean(decayed != plain) > 0.9
    wide = update(0.01, jax.tree.map(lambda x: x.astype(jnp.float32), NARROW))
    np.testing.assert_array_equal(decayed, wide)


@pytest.mark.slow
def test_frugal_itself_gives_the_wider_dtype():
    tx: Any = subspace.frugal(density=0.5)
    for params, grads, dtype in (
        (WEIGHTS, NARROW, jnp.float32),
        (NARROW, WEIGHTS, jnp.float32),
        (NARROW, NARROW, jnp.bfloat16),
    ):
        for own in (params, None):
            updates, state = tx.update(grads, tx.init(params), own)
            assert updates["w"].dtype == dtype
            assert state.selected[0].mu["w"].dtype == params["w"].dtype


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_a_schedule_of_the_weight_decay(name):
    schedule = optax.piecewise_constant_schedule(0.1, {1: 0.0})
    tx, plain, decayed = (RULES[name](0.1, weight_decay=decay) for decay in (schedule, 0.0, 0.1))
    state = tx.init(WEIGHTS)
    first, state = tx.update(WEIGHTS, state, WEIGHTS)
    expected, _ = decayed.update(WEIGHTS, decayed.init(WEIGHTS), WEIGHTS)
    np.testing.assert_allclose(first["w"], expected["w"], rtol=1e-6)
    second, _ = tx.update(WEIGHTS, state, WEIGHTS)
    _, other = plain.update(WEIGHTS, plain.init(WEIGHTS), WEIGHTS)
    expected, _ = plain.update(WEIGHTS, other, WEIGHTS)
    np.testing.assert_allclose(second["w"], expected["w"], rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_the_tree_of_the_state_does_not_depend_on_a_decay_of_zero(name):
    found = [
        jax.tree.structure(jax.eval_shape(RULES[name](0.1, weight_decay=decay).init, WEIGHTS))
        for decay in (0.0, 0.1)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "static"),
    [
        ("badam", ()),
        ("galore_adamw", ("rank", "stagger")),
        ("dct_adamw", ("rank", "stagger", "rotate", "error_feedback")),
        ("frugal_adamw", ("density", "stagger")),
    ],
)
def test_inject_hyperparams_works_or_says_what_to_list(name, static):
    rule, options = getattr(jaxopt_lab, name), RULES[name].keywords if static else {}
    injected = optax.inject_hyperparams(rule, static_args=static)(0.1, **options)
    plain = rule(0.1, **options)
    updates, _ = jax.jit(injected.update)(WEIGHTS, injected.init(WEIGHTS), WEIGHTS)
    expected, _ = jax.jit(plain.update)(WEIGHTS, plain.init(WEIGHTS), WEIGHTS)
    # Decay rates that are arrays have their logarithms taken in float32.
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=5e-5, atol=1e-7)
    if static:
        with pytest.raises(ValueError, match=f"{static[0]}.* list it in static_args"):
            optax.inject_hyperparams(rule)(0.1, **options).init(WEIGHTS)


def test_sam_keeps_the_dtypes_of_a_state_it_blends():
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    params = {f"layer{i}": jnp.ones((4, 6)) for i in range(2)}
    tx = optax.contrib.sam(jaxopt_lab.badam(0.01), adversary)
    state = tx.init(params)
    _, new = tx.update(params, state, params)
    dtypes = [[x.dtype for x in jax.tree.leaves(s)] for s in (state, new)]
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("shape", [(3, 0), (0, 3)])
@pytest.mark.parametrize(
    "projection",
    [subspace.svd("larger"), subspace.svd("both"), subspace.dct(), subspace.entries()],
    ids=["larger", "both", "dct", "entries"],
)
def test_leaves_without_elements(shape, projection):
    params = {"empty": jnp.ones(shape), "w": jnp.ones((4, 4))}
    tx: Any = subspace.frugal(projection=projection)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["empty"].shape == shape


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    [
        subspace.frugal(density=0.5, update_gap=2),
        subspace.frugal(projection=subspace.blocks(), density=0.5, update_gap=2),
        subspace.frugal(projection=subspace.svd(), density=0.5, update_gap=2, stagger=2),
        subspace.frugal(projection=subspace.dct(), density=0.5, error_feedback=True),
    ],
    ids=["columns", "blocks", "svd", "dct"],
)
def test_gradients_of_each_device(tx):
    """Under `shard_map` gradients vary, counts and constants do not; `vmap` is the simulation."""
    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 4)), "bias": jnp.ones(4)}

    def run(grads: Any) -> Any:
        state, found = tx.init(params), []
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
            found.append(updates)
        return found

    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), (2, *x.shape)), params)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("replica",), axis_types=auto, devices=jax.devices()[:2])
    spec = PartitionSpec("replica")
    alone = lambda g: jax.tree.map(lambda x: x[None], run(jax.tree.map(lambda x: x[0], g)))  # noqa: E731
    devices = jax.jit(jax.shard_map(alone, mesh=mesh, in_specs=spec, out_specs=spec))(grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        devices,
        jax.jit(jax.vmap(run))(grads),
    )
