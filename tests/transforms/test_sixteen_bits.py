"""Gradients of 16 bits: nothing is rounded between the links, and once at the end."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxopt_lab
from tests.transforms.rules import OPTIMIZERS

OURS = [r for r in OPTIMIZERS if r.make.__module__.startswith("jaxopt_lab.transforms.")]
WIDE = {"w": 0.02 * jax.random.normal(jax.random.key(0), (16, 24)), "b": jnp.full(24, 0.02)}
NARROW = {
    name: jax.random.normal(jax.random.key(1), x.shape).astype(jnp.bfloat16)
    for name, x in WIDE.items()
}

each_optimizer = pytest.mark.parametrize("rule", OURS, ids=str)


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def step(tx: Any, grads: Any, params: Any) -> Any:
    return tx.update(grads, tx.init(params), params)[0]


def assert_equal(found: Any, expected: Any) -> None:
    dtypes = [[x.dtype for x in jax.tree.leaves(tree)] for tree in (found, expected)]
    assert dtypes[0] == dtypes[1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@each_optimizer
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rate", [1e-2, 1e-6])
def test_wide_weights_get_the_update_of_wide_gradients(rule, dtype, rate):
    tx, narrow = rule(learning_rate=rate), cast(NARROW, dtype)
    found = step(tx, narrow, WIDE)
    assert all(u.dtype == jnp.float32 for u in jax.tree.leaves(found))
    assert_equal(found, step(tx, cast(narrow, jnp.float32), WIDE))


@each_optimizer
def test_decay_reaches_almost_every_entry(rule):
    # 0.01 * 0.02 beside 1 is below the last of bfloat16's 8 bits, and a thousand of float32's.
    found, without = (
        step(rule(learning_rate=1e-3, weight_decay=decay), NARROW, WIDE) for decay in (0.01, 0.0)
    )
    assert float(jnp.mean(found["w"] != without["w"])) >= 0.99


@each_optimizer
def test_narrow_trees_get_narrow_updates_rounded_once(rule):
    # Both states start at zero, so that the first step differs by rounding alone.
    weights = cast(WIDE, jnp.bfloat16)
    exact = step(rule(), cast(NARROW, jnp.float32), cast(weights, jnp.float32))
    assert_equal(step(rule(), NARROW, weights), cast(exact, jnp.bfloat16))


@each_optimizer
def test_no_dtype_is_promoted_implicitly(rule):
    with jax.numpy_dtype_promotion("strict"):
        for params in (WIDE, cast(WIDE, jnp.bfloat16), cast(WIDE, jnp.float16)):
            state = jax.eval_shape(rule().init, params)
            jax.eval_shape(rule().update, NARROW, state, params)


@pytest.mark.parametrize("make", [jaxopt_lab.lion, jaxopt_lab.adabelief, jaxopt_lab.diffgrad])
def test_without_parameters_the_state_knows_their_dtype(make):
    tx = make(1e-3)
    found, _ = tx.update(NARROW, tx.init(WIDE))
    assert_equal(found, step(tx, NARROW, WIDE))
    narrow_state = tx.init(cast(WIDE, jnp.bfloat16))
    assert tx.update(NARROW, narrow_state)[0]["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "bare",
    [
        jaxopt_lab.scale_by_lion,
        jaxopt_lab.scale_by_adabelief,
        jaxopt_lab.scale_by_adamp,
        jaxopt_lab.scale_by_sgdp,
        jaxopt_lab.scale_by_exadam,
        jaxopt_lab.scale_by_diffgrad,
    ],
)
def test_bare_rules_in_a_chain_of_optax(bare):
    tx = optax.chain(bare(), optax.add_decayed_weights(0.01), optax.scale_by_learning_rate(1e-6))
    assert_equal(step(tx, NARROW, WIDE), step(tx, cast(NARROW, jnp.float32), WIDE))


@each_optimizer
def test_accumulated_over_two_steps(rule):
    tx = optax.MultiSteps(rule(learning_rate=1e-6), 2)
    update = jax.jit(tx.update)
    first, state = update(NARROW, tx.init(WIDE), WIDE)
    second, _ = update(NARROW, state, WIDE)
    assert not any(bool(jnp.any(u)) for u in jax.tree.leaves(first))
    expected = jax.jit(rule(learning_rate=1e-6).update)
    expected, _ = expected(NARROW, rule().init(WIDE), WIDE)
    jax.tree.map(
        # Two programs: the order of operations differs by a rounding of float32.
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-12),
        second,
        expected,
    )


@each_optimizer
def test_nnx_optimizer_with_narrow_gradients(rule):
    model = nnx.Linear(16, 24, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, rule(learning_rate=1e-5), wrt=nnx.Param)
    before = model.kernel[...]
    grads = jax.tree.map(lambda p: jnp.ones_like(p, jnp.bfloat16), nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    assert model.kernel.dtype == jnp.float32
    assert float(jnp.mean(model.kernel[...] != before)) > 0.9


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_clipping_and_masking_see_no_parameters_and_keep_the_gradients_dtype(dtype):
    grads = cast(NARROW, dtype)
    clip: Any = jaxopt_lab.clip_coordinates(0.25)
    assert step(clip, grads, WIDE)["w"].dtype == dtype
