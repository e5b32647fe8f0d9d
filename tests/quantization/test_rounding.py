"""Stochastic and compensated rounding to bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxopt_lab import quantization

KEY = jax.random.key(3)


def bits(x):
    return np.asarray(jax.lax.bitcast_convert_type(x, jnp.uint16))


def test_mean_is_the_value():
    x = jax.random.normal(KEY, (64,)) * 10.0 ** jnp.linspace(-30, 30, 64)
    draws = 4000
    keys = jax.random.split(jax.random.key(1), draws)
    rounded = jax.jit(jax.vmap(lambda key: quantization.stochastic_round(x, key)))(keys)
    rounded = np.asarray(rounded, np.float64)
    exact = np.asarray(x, np.float64)
    gap = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    # A draw deviates by at most half a gap in standard deviation; five of the mean's.
    assert np.all(np.abs(rounded.mean(0) - exact) < 5 * gap / 2 / np.sqrt(draws))
    assert np.all(np.abs(rounded - exact) < gap)


def test_entries_of_one_array_round_independently():
    size = 512
    x = jnp.full((size, size), 1 + 2.0**-8)  # halfway
    up = np.asarray(quantization.stochastic_round(x, KEY), np.float64) > 1
    signs = 2.0 * up - 1
    # Of each mean over n independent signs the deviation is n**-0.5; five of them.
    assert abs(signs.mean()) < 5 / size
    for shift in ((0, 1), (1, 0), (1, 1), (0, 16), (8, 0)):
        product = signs * np.roll(signs, shift, (0, 1))
        assert abs(product.mean()) < 5 / size, shift
    again = 2.0 * (np.asarray(quantization.stochastic_round(x, jax.random.key(4))) > 1) - 1
    assert abs((signs * again).mean()) < 5 / size


def test_bfloat16_values_keep_their_bits():
    every = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), jnp.bfloat16)
    for seed in range(3):
        found = quantization.stochastic_round(every.astype(jnp.float32), jax.random.key(seed))
        number = ~np.isnan(np.asarray(every, np.float32))
        np.testing.assert_array_equal(bits(found)[number], bits(every)[number])
        assert np.isnan(np.asarray(found, np.float32)[~number]).all()


def test_overflows_where_rounding_to_nearest_does():
    largest = float(jnp.finfo(jnp.bfloat16).max)
    x = jnp.array([largest * (1 + 2.0**-12), float(jnp.finfo(jnp.float32).max)])
    x = jnp.tile(jnp.concatenate([x, -x])[:, None], (1, 1000))
    found = quantization.stochastic_round(x, KEY)
    np.testing.assert_array_equal(bits(found), bits(x.astype(jnp.bfloat16)))


def test_other_dtypes():
    half = jnp.array([1.5, 3.0], jnp.bfloat16)
    assert quantization.stochastic_round(half, KEY) is half
    assert quantization.stochastic_round(jnp.ones(2, jnp.float16), KEY).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        x = jnp.full(4096, 1 + 2.0**-9, jnp.float64)
        mean = float(quantization.stochastic_round(x, KEY).astype(jnp.float64).mean())
    # 5 standard deviations of a mean of 4096 steps of 2**-7 taken with probability 1/4.
    assert abs(mean - 1 - 2.0**-9) < 5 * 2.0**-7 * np.sqrt(3 / 16 / 4096)
    with pytest.raises(TypeError, match="x has dtype int32"):
        quantization.stochastic_round(jnp.ones(2, jnp.int32), KEY)


def test_derivative_is_the_identity():
    slope = jax.grad(lambda x: quantization.stochastic_round(x, KEY).astype(jnp.float32))(0.3)
    assert slope == 1


def test_key_decides():
    x = jax.random.normal(KEY, (1000,))
    first = quantization.stochastic_round(x, jax.random.key(0))
    same = jax.jit(quantization.stochastic_round)(x, jax.random.PRNGKey(0))
    np.testing.assert_array_equal(bits(first), bits(same))
    assert (bits(first) != bits(quantization.stochastic_round(x, jax.random.key(1)))).any()


@pytest.mark.parametrize(
    "key", [jnp.zeros((3,), jnp.uint32), jax.random.split(KEY, 2), 0, jnp.zeros((2,))]
)
def test_wrong_key_is_refused(key):
    with pytest.raises(ValueError, match="key must be one random key"):
        quantization.apply_updates_stochastic(jnp.ones(2), jnp.ones(2), key)


def test_small_steps_arrive_in_the_mean():
    size, step, draws = 20_000, 3e-5, 400
    weights = (0.02 * jax.random.normal(KEY, (size,))).astype(jnp.bfloat16)
    updates = jnp.full((size,), step)
    stuck = np.mean(np.asarray(optax.apply_updates(weights, updates) == weights))
    assert stuck > 0.6  # with rounding to nearest most entries do not move

    @jax.jit
    @jax.vmap
    def displacement(key):
        new = quantization.apply_updates_stochastic(weights, updates, key)
        return new.astype(jnp.float32) - weights.astype(jnp.float32)

    moved = np.asarray(displacement(jax.random.split(KEY, draws)), np.float64)
    gap = np.maximum(np.abs(np.asarray(weights, np.float64)), step) * 2.0**-7
    deviation = np.maximum(gap, step) / 2 / np.sqrt(draws)
    # Of 20000 means none is expected beyond 6 deviations.
    assert np.all(np.abs(moved.mean(0) - step) < 6 * deviation)
    assert abs(moved.mean() - step) < 5 * deviation.mean() / np.sqrt(size)


def test_apply_updates_on_a_tree():
    params = {"a": jnp.ones(300, jnp.bfloat16), "b": jnp.ones(3), "c": None}
    params["d"] = params["a"]
    updates = {"a": jnp.full(300, 2.0**-8), "b": jnp.full(3, 0.1), "c": None}
    updates["d"] = updates["a"]
    eager = quantization.apply_updates_stochastic(params, updates, KEY)
    compiled = jax.jit(quantization.apply_updates_stochastic)(params, updates, KEY)
    for new in (eager, compiled):
        assert new["c"] is None
        assert new["a"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(new["b"], optax.apply_updates(params["b"], updates["b"]))
        assert (bits(new["a"]) != bits(new["d"])).any(), "leaves share their noise"
    np.testing.assert_array_equal(bits(eager["a"]), bits(compiled["a"]))
    with pytest.raises(ValueError, match="'b' has shape"):
        quantization.apply_updates_stochastic(params, dict(updates, b=jnp.ones(4)), KEY)


def test_same_bits_on_four_devices():
    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,))
    weights = jax.random.normal(KEY, (8, 6)).astype(jnp.bfloat16)
    updates = jnp.full((8, 6), 1e-3)
    place = NamedSharding(mesh, PartitionSpec("x"))
    apply = jax.jit(quantization.apply_updates_stochastic)
    found = apply(jax.device_put(weights, place), jax.device_put(updates, place), KEY)
    np.testing.assert_array_equal(bits(found), bits(apply(weights, updates, KEY)))
    assert found.sharding.is_equivalent_to(place, 2)


@pytest.mark.parametrize("jit", [True, False])
def test_compensation_carries_small_steps(jit):
    steps, step = 1000 if jit else 50, 3e-5
    weights = jnp.full((8,), 0.02, jnp.bfloat16)
    updates = jnp.full((8,), step)

    def advance(carry, _):
        plain, new, kept = carry
        new, kept = quantization.apply_updates_compensated(new, updates, kept)
        return (optax.apply_updates(plain, updates), new, kept), None

    carry = weights, weights, quantization.init_compensation(weights)
    if jit:
        carry, _ = jax.lax.scan(advance, carry, length=steps)
    else:
        for _ in range(steps):
            carry, _ = advance(carry, None)
    plain, new, kept = carry
    np.testing.assert_array_equal(bits(plain), bits(weights))
    total = np.asarray(new, np.float64) + np.asarray(kept, np.float64)
    start = np.asarray(weights, np.float64)
    # Each step rounds the compensation once: 2**-9 of at most half a bfloat16 gap of the weight,
    # which stays below 0.0625 (gap 2**-12).
    assert np.all(np.abs(total - start - steps * step) < steps * 2.0**-22)
    assert np.all(np.abs(total - start) > 0.9 * steps * step)


def test_compensation_of_a_tree():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3), "c": None}
    updates = {"a": jnp.full(3, 1e-3), "b": jnp.full(3, 0.1), "c": None}
    kept = quantization.init_compensation(params)
    new, kept = quantization.apply_updates_compensated(params, updates, kept)
    assert kept["b"] is None
    assert kept["c"] is None
    assert kept["a"].dtype == new["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(new["b"], optax.apply_updates(params["b"], updates["b"]))
    with pytest.raises(ValueError, match="compensation has leaves of shapes"):
        quantization.apply_updates_compensated(params, updates, {"a": jnp.ones(4)})


def test_compensation_survives_overflow():
    weights = jnp.array([jnp.finfo(jnp.bfloat16).max, 1], jnp.bfloat16)
    updates = jnp.array([3e38, 1e-3])
    kept = quantization.init_compensation(weights)
    weights, kept = quantization.apply_updates_compensated(weights, updates, kept)
    assert float(weights[0]) == np.inf
    assert np.isfinite(np.asarray(kept, np.float32)).all()
