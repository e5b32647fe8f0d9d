"""Optimizers whose state is kept encoded."""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab
from jaxopt_lab import quantization, testing

CODECS = {
    "linear": quantization.int8(16, "linear"),
    "dynamic": quantization.int8(16),
    "bfloat16": quantization.bfloat16(),
}


def quantize(inner, codec, **options) -> Any:
    """Typed loosely: states are looked into here."""
    return quantization.quantize_state(inner, codec, **options)


def quantized(learning_rate, weight_decay=0.1, codec="dynamic"):
    inner = jaxopt_lab.adabelief(learning_rate, weight_decay=weight_decay)
    return quantization.quantize_state(inner, CODECS[codec], min_size=4)


# The linear code differs from the dynamic one in its levels only, which `test_codecs` is about.
@pytest.mark.slow
@pytest.mark.parametrize("codec", ["dynamic", "bfloat16"])
def test_contract(codec):
    exceptions = dict(sys.modules[jaxopt_lab.adabelief.__module__].CONTRACT_EXCEPTIONS)
    if codec == "bfloat16":
        exceptions |= sys.modules[quantization.quantize_state.__module__].CONTRACT_EXCEPTIONS
    report = testing.check_transform(
        quantized, learning_rate=0.01, codec=codec, exceptions=exceptions, raise_on_failure=False
    )
    assert report.ok, str(report)


def run(tx, params, steps, state=None, start=0):
    target = jax.random.normal(jax.random.key(7), params["kernel"].shape)
    inputs = jax.random.normal(jax.random.key(8), (64, target.shape[0]))

    def loss(params):
        return jnp.mean((inputs @ (params["kernel"] - target) + params["bias"]) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params) if state is None else state
    path = [(params, state)]
    for _ in range(start, steps):
        params, state = step(params, state)
        path.append((params, state))
    return float(loss(params)), path


def weights():
    return {"kernel": jnp.zeros((32, 16)), "bias": jnp.zeros(16)}


def test_bytes_of_int8_adam():
    params = jnp.zeros((1024, 1024))
    tx = quantize(optax.adamw(1e-3), quantization.int8())
    state = jax.jit(tx.init)(params)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) <= 2.1 * params.size


@pytest.mark.parametrize("codec", CODECS)
def test_trains_like_the_exact_optimizer(codec):
    start, _ = run(optax.adamw(0.05), weights(), 0)
    exact, _ = run(optax.adamw(0.05), weights(), 60)
    tx = quantize(optax.adamw(0.05), CODECS[codec], min_size=100)
    found, _ = run(tx, weights(), 60)
    assert exact < 0.1 * start
    # Levels are at most 1% of the largest entry of a block of 16: the path differs by noise of
    # that relative size, and the loss, quadratic, by a tenth at most of what is left.
    assert abs(found - exact) < 0.1 * exact


def test_exact_if_all_leaves_are_small():
    tx = quantize(optax.adamw(0.05), quantization.int8(), min_size=1000)
    _, found = run(tx, weights(), 5)
    _, expected = run(optax.adamw(0.05), weights(), 5)
    for (params, state), (wanted, inner) in zip(found, expected):
        jax.tree.map(np.testing.assert_array_equal, (params, state.inner_state), (wanted, inner))


@pytest.mark.parametrize("codec", CODECS)
def test_resumes_with_the_same_bits(codec):
    tx = quantize(optax.adamw(0.05), CODECS[codec], min_size=1)
    _, path = run(tx, weights(), 6)
    params, state = jax.tree.map(jnp.asarray, jax.tree.map(np.array, path[3]))
    _, resumed = run(tx, params, 6, state, start=3)
    jax.tree.map(np.testing.assert_array_equal, resumed[-1], path[-1])


def test_first_moments_are_signed_and_second_are_not():
    params = {"nu": jnp.ones(8), "mu": jnp.ones(8)}
    inner = optax.chain(optax.clip(1.0), optax.adamw(0.1))
    state = quantize(inner, quantization.int8(4, "linear"), min_size=8).init(params)
    moments = state.inner_state[1][0]
    for name in params:
        assert moments.mu[name].dtype == jnp.int8
        assert moments.nu[name].dtype == jnp.uint8
    signed = [encoding.codec.signed for encoding in state.encoding if encoding is not None]
    assert signed == [True, True, False, False]


def test_count_gives_the_step_its_random_bits():
    tx = quantize(optax.sgd(1.0, momentum=0.5), quantization.bfloat16(), min_size=8, seed=3)
    params = {"a": jnp.zeros(256), "b": jnp.zeros(256)}
    grads = {name: jnp.full(256, 1.001) for name in params}
    state = tx.init(params)
    assert state.count == 0
    _, first = tx.update(grads, state, params)
    assert first.count == 1
    moments = first.inner_state[0].trace
    assert (moments["a"] != moments["b"]).any()
    _, later = tx.update(grads, state._replace(count=jnp.int32(1)), params)
    assert (later.inner_state[0].trace["a"] != moments["a"]).any()
    other = quantize(optax.sgd(1.0, momentum=0.5), quantization.bfloat16(), min_size=8)
    _, seeded = other.update(grads, state, params)
    assert (seeded.inner_state[0].trace["a"] != moments["a"]).any()


def test_smallest_encoded_leaf():
    tx = quantize(optax.sgd(1.0, momentum=0.5), quantization.int8(), min_size=8)
    trace = tx.init({"small": jnp.zeros(7), "large": jnp.zeros(8)}).inner_state[0].trace
    assert trace["small"].dtype == jnp.float32
    assert trace["large"].dtype == jnp.uint8


@pytest.mark.parametrize("shape", [(256, 384), (3, 3, 64, 8), (4096, 1)])
def test_bytes_with_short_and_odd_last_axes(shape):
    params = jnp.zeros(shape)
    state = jax.eval_shape(quantize(optax.adamw(1e-3), quantization.int8()).init, params)
    found = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert found <= 2.1 * params.size


def test_codec_by_path():
    seen = []

    def choose(path, leaf):
        seen.append((path, leaf.shape))
        return quantization.int8(8) if "mu" in path else None

    tx = quantize(optax.adamw(0.1), choose, min_size=100)
    state = tx.init(weights())
    assert seen == [("0/mu/kernel", (32, 16)), ("0/nu/kernel", (32, 16))]
    assert state.inner_state[0].mu["kernel"].dtype == jnp.uint8
    assert state.inner_state[0].nu["kernel"].dtype == jnp.float32


def test_bfloat16_leaves_16_bits_alone():
    tx = quantize(optax.lion(0.1), quantization.bfloat16(), min_size=1)
    state = tx.init({"w": jnp.ones(4, jnp.float16)})
    assert state.inner_state[0].mu["w"].dtype == jnp.float16
    assert state.encoding == (None,) * len(state.encoding)


def test_bad_arguments():
    make = functools.partial(quantize, optax.adamw(0.1))
    with pytest.raises(TypeError, match="codec must be a codec"):
        make("int8")
    with pytest.raises(ValueError, match="min_size must be a positive integer"):
        make(quantization.int8(), min_size=0)
    with pytest.raises(TypeError, match="seed must be an integer"):
        make(quantization.int8(), seed=0.5)
    integers = optax.sgd(0.1)._replace(init=lambda params: {"index": jnp.zeros(8, jnp.int32)})
    with pytest.raises(TypeError, match="'index' has dtype int32"):
        quantize(integers, lambda path, leaf: quantization.int8(), min_size=1).init(jnp.ones(8))
    exact = quantize(integers, quantization.int8(), min_size=1)
    assert exact.init(jnp.ones(8)).inner_state["index"].dtype == jnp.int32
    with pytest.raises(TypeError, match="complex64"):
        make(quantization.int8(), min_size=1).init(jnp.ones(8, jnp.complex64))
    with pytest.raises(TypeError, match="expected a state of type QuantizedState"):
        make(quantization.int8()).update(jnp.ones(8), optax.EmptyState(), jnp.ones(8))
