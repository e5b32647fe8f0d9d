"""BlockFFN's router and layer against their definitions in float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_ffn, relu_rms_router

TOKENS, WIDTH, EXPERTS, HIDDEN = 12, 6, 10, 3


def draw(active: float = 0.3) -> list[np.ndarray]:
    """Tokens, activations of which so many are not 0, and both stacks of matrices."""
    rng = np.random.default_rng(0)
    shapes = (TOKENS, WIDTH), (TOKENS, EXPERTS), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    x, a, up, down = (rng.normal(size=shape) for shape in shapes)
    a = np.abs(a) * (rng.random(a.shape) < active)
    a[4:8, 3:] = 0  # a chunk with three experts at most
    a[5] = 0
    return [x, a, up, down]


def definition(x: np.ndarray, a: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    y = np.zeros_like(x)
    for i in range(EXPERTS):
        z = x @ up[i]
        y += a[:, i : i + 1] * ((z / (1 + np.exp(-z))) @ down[i])
    return y


def test_numbers_of_the_specification():
    with jax.enable_x64(True):
        found = relu_rms_router(jnp.array([1.0, -1.0, 0.5, -2.0]), epsilon=1e-12)
        np.testing.assert_allclose(found, (1.7888543820, 0, 0.8944271910, 0), atol=1e-9)
        found = relu_rms_router(jnp.array([1.0, -1.0, 0.5, -2.0]))
        np.testing.assert_allclose(found, (1.7888515, 0, 0.8944258, 0), atol=1e-7)


def test_router_is_its_formula():
    rng = np.random.default_rng(1)
    scores, gain = rng.normal(size=(2, 5, 7)), rng.normal(size=7)
    scores[0, 0] = -1
    active = np.maximum(scores, 0)
    want = gain * active / np.sqrt((active**2).mean(-1, keepdims=True) + 1e-6)
    with jax.enable_x64(True):
        found = relu_rms_router(jnp.asarray(scores), jnp.asarray(gain))
    np.testing.assert_allclose(found, want, rtol=1e-12)
    np.testing.assert_array_equal(found[0, 0], 0)
    narrow = relu_rms_router(jnp.asarray(scores, jnp.bfloat16), jnp.asarray(gain, jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16


PLANS = {"all": {}, "few": {"chunk": 4, "capacity": 3}, "most": {"chunk": 3, "capacity": 9}}
PLANS["one token"] = {"chunk": 1, "capacity": 5}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("active", [0.0, 0.3, 1.0])
def test_layer_and_gradients_are_those_of_the_definition(plan, active):
    arrays = draw(active)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(array) for array in arrays]
        weight = jnp.cos(jnp.arange(TOKENS * WIDTH).reshape(TOKENS, WIDTH))

        def loss(options: Any, *arrays: jax.Array) -> jax.Array:
            return jnp.vdot(block_ffn(*arrays, **options), weight)

        found = jax.jit(functools.partial(block_ffn, **PLANS[plan]))(*arrays)
        np.testing.assert_allclose(found, definition(*map(np.asarray, arrays)), atol=1e-12)
        slopes = [
            jax.jit(jax.grad(functools.partial(loss, options), (0, 1, 2, 3)))(*arrays)
            for options in (PLANS[plan], {})
        ]
    x, a, up, down = slopes[0]
    used = np.asarray(arrays[1]) != 0
    for one, whole in zip((x, up, down), (slopes[1][0], *slopes[1][2:]), strict=True):
        np.testing.assert_allclose(one, whole, atol=1e-12)
    # Experts that a chunk leaves out have no gradient of their activations, as behind the ReLU.
    np.testing.assert_allclose(np.asarray(a)[used], np.asarray(slopes[1][1])[used], atol=1e-12)


def test_a_chunk_reads_the_experts_it_uses():
    x, a, up, down = draw(1.0)
    a[:, 2:] = 0
    up[2:], down[2:] = np.nan, np.nan
    found = block_ffn(*(jnp.asarray(t, jnp.float32) for t in (x, a, up, down)), chunk=4, capacity=2)
    assert np.isfinite(found).all()


def test_what_is_not_finite_is_not_lost():
    arrays = draw(0.3)
    arrays[0][0, 0], arrays[1][0, 0] = np.nan, 1
    x, a, up, down = (jnp.asarray(t, jnp.float32) for t in arrays)
    found = np.asarray(block_ffn(x, a, up, down, chunk=4, capacity=5))
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1:]).all()


@pytest.mark.parametrize("options", PLANS.values(), ids=list(PLANS))
def test_sixteen_bits_are_summed_in_float32(options):
    arrays = [jnp.asarray(t, jnp.bfloat16) for t in draw(0.3)]
    found = block_ffn(*arrays, **options)
    assert found.dtype == jnp.bfloat16
    want = definition(*(np.asarray(t, np.float64) for t in arrays))
    # Rounded twice, to 8 bits: the hidden numbers and the result.
    np.testing.assert_allclose(np.asarray(found, np.float64), want, rtol=2**-6, atol=2**-6)


def test_a_stack_is_its_entries():
    x, a, up, down = (jnp.asarray(t, jnp.float32) for t in draw(0.3))
    layer = functools.partial(block_ffn, chunk=4, capacity=3)
    found = jax.vmap(layer, (0, 0, None, None))(jnp.stack([x, -x]), jnp.stack([a, a]), up, down)
    np.testing.assert_allclose(found[1], layer(-x, a, up, down), rtol=1e-5, atol=1e-5)
