"""The product of a matrix with its transpose, against the plain one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_lab
from pallas_kernels import gram

SHAPES = [(8, 5), (7, 9), (2, 3), (3, 11, 4), (2, 3, 6, 6), (1, 4), (5, 0), (0, 4)]


@pytest.fixture(autouse=True)
def strict():
    """No array gets axes or a wider dtype silently."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def draw(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape):
    x, t = draw(shape), draw((*shape, 1))[..., 0]
    z = np.random.default_rng(1).normal(size=(*shape[:-1], shape[-2]))
    with jax.enable_x64(True):
        split = functools.partial(gram, least_side=2)
        found, pull = jax.vjp(split, jnp.asarray(x))
        (dx,) = pull(jnp.asarray(z))
        moved = jax.jvp(split, (jnp.asarray(x),), (jnp.asarray(t),))[1]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    transposed = lambda a: np.swapaxes(a, -2, -1)  # noqa: E731
    close(found, x @ transposed(x))
    close(dx, (z + transposed(z)) @ x)
    close(moved, t @ transposed(x) + x @ transposed(t))


def test_five_eighths_of_the_arithmetic():
    x = jax.ShapeDtypeStruct((512, 64), jnp.float32)

    def products(least_side: int) -> int:
        jaxpr = jax.make_jaxpr(functools.partial(gram, least_side=least_side))(x)
        dots = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
        return sum(e.outvars[0].aval.size for e in dots)

    assert products(513) == 512 * 512
    assert products(512) == 5 / 8 * 512 * 512


def test_dtypes_of_sums_and_result():
    x = jnp.asarray(draw((64, 32)), jnp.bfloat16)
    assert gram(x).dtype == jnp.bfloat16
    found = gram(x, least_side=2, preferred_element_type=jnp.float32, precision="highest")
    assert found.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    # Products of 16 bits are exact in float32, and sums of 32 of them nearly.
    np.testing.assert_allclose(found, exact @ exact.T, rtol=1e-5, atol=1e-5)


def test_muon_takes_it():
    params = {"a": {"kernel": draw((12, 20))}, "b": {"kernel": draw((20, 12))}}
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        sides = []

        def counted(x: jax.Array, **options: object) -> jax.Array:
            sides.append(x.shape[-2:])
            return gram(x, least_side=2, **options)  # pyright: ignore[reportArgumentType]

        updates = []
        for tx in (jaxopt_lab.muon(0.02), jaxopt_lab.muon(0.02, gram=counted)):
            updates.append(jax.jit(tx.update)(params, tx.init(params), params)[0])
    # Of the matrix, and of its Gram matrix.
    assert set(sides) == {(12, 20), (12, 12)}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), *updates)
