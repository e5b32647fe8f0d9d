"""Weights in few bits: what they are, what they are multiplied to, and what reading them costs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import QuantizedWeight, quantize_weight, targets, weight_only_dot_general
from tests.pallas_kernels.matmul import oracle
from tests.pallas_kernels.matmul.test_quantized import DENSE, FORMATS, draw
from tests.pallas_kernels.targets import needs

# Shapes, what is contracted and batch, and the axis of the weight's scales.
CALLS = {
    "dense": ((5, 12), (12, 3), DENSE, -2),
    "tokens": ((2, 3, 8), (8, 4), (((2,), (0,)), ((), ())), 0),
    "tied embedding": ((3, 8), (6, 8), (((1,), (1,)), ((), ())), 1),
    "experts": ((3, 2, 8), (3, 8, 5), (((2,), (1,)), ((0,), (0,))), -2),
    "two axes of outputs": ((2, 8), (8, 3, 4), (((1,), (0,)), ((), ())), 0),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("granularity", [*oracle.GRANULARITIES, 1])
@pytest.mark.parametrize("format", FORMATS)
def test_is_the_product_of_the_rounded_weight(format, granularity, call):
    *shapes, dimensions, axis = CALLS[call]
    x, kernel = draw(*shapes)
    rounded = oracle.rounded(kernel, format, granularity, (axis % kernel.ndim,))
    want = oracle.product(x, rounded, dimensions, None)
    with jax.enable_x64(True):
        weight = quantize_weight(kernel, format, granularity, axis=axis)
        found = weight_only_dot_general(jnp.asarray(x), weight, dimensions)
        np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-12)
    assert str(weight.values.dtype) == format
    assert weight.shape == kernel.shape


@pytest.mark.parametrize("granularity", oracle.GRANULARITIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_sums_are_wide_and_the_result_has_the_dtype_of_the_tokens(dtype, granularity):
    x, kernel = draw((4, 64), (64, 8), dtype=np.float32)
    x = jnp.asarray(x, dtype)
    weight = quantize_weight(kernel, "int8", granularity)
    product = functools.partial(weight_only_dot_general, dimension_numbers=DENSE)
    found = jax.jit(product)(x, weight)
    assert found.dtype == dtype
    of_x = np.asarray(x, np.float64)
    rounded = oracle.rounded(kernel.astype(np.float64), "int8", granularity, (0,))
    # Of the result, and with blocks of the widened weight; sums of 64 terms are in float32.
    eps = (1 if isinstance(granularity, str) else 2) * float(jnp.finfo(dtype).eps)
    eps += 64 * float(jnp.finfo(jnp.float32).eps)
    limit = eps * (np.abs(of_x) @ np.abs(rounded))
    assert (np.abs(np.asarray(found, np.float64) - of_x @ rounded) <= limit).all()
    wide = jax.jit(functools.partial(product, preferred_element_type=jnp.float32))(x, weight)
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide.astype(dtype), found)


@pytest.mark.parametrize("format", ["int8", "float8_e5m2"])
def test_scales_below_16_bits_are_kept(format):
    """Weights of 1e-3 have scales that float16 has few bits for."""
    x, kernel = draw((4, 64), (64, 8), dtype=np.float32)
    kernel *= 1e-3
    weight = quantize_weight(kernel, format, 16)
    found = weight_only_dot_general(jnp.asarray(x, jnp.float16), weight, DENSE)
    of_x = np.asarray(x, np.float16).astype(np.float64)
    rounded = oracle.rounded(kernel.astype(np.float64), format, 16, (0,))
    limit = 2 * float(jnp.finfo(jnp.float16).eps) * (np.abs(of_x) @ np.abs(rounded))
    # Entries of the widened weight below the normal numbers of float16 lose more.
    limit += float(jnp.finfo(jnp.float16).smallest_subnormal) * np.abs(of_x).sum(1, keepdims=True)
    assert (np.abs(np.asarray(found, np.float64) - of_x @ rounded) <= limit).all()


def test_a_stack_is_scanned_over():
    x, kernels = draw((4, 8), (3, 8, 8), dtype=np.float32)

    def step(x: jax.Array, weight: QuantizedWeight) -> tuple[jax.Array, None]:
        return weight_only_dot_general(x, weight, DENSE), None

    found, _ = jax.jit(lambda x, w: jax.lax.scan(step, x, w))(x, quantize_weight(kernels))
    want = x.astype(np.float64)
    for kernel in kernels.astype(np.float64):
        want = want @ oracle.rounded(kernel, "int8", "row", (0,))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_derivatives_are_those_of_the_rounded_weight():
    x, kernel, t = draw((4, 8), (8, 5), (4, 8))
    rounded = oracle.rounded(kernel, "int8", "row", (0,))
    with jax.enable_x64(True):
        weight = quantize_weight(kernel)
        product = functools.partial(weight_only_dot_general, rhs=weight, dimension_numbers=DENSE)
        _, tangent = jax.jvp(product, (jnp.asarray(x),), (jnp.asarray(t),))
        slope = jax.grad(lambda x: product(x).sum())(jnp.asarray(x))
        np.testing.assert_allclose(tangent, t @ rounded, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(slope, np.ones((4, 5)) @ rounded.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_stays_so(format):
    x, kernel = draw((3, 8), (8, 4), dtype=np.float32)
    kernel[2, 1], kernel[3, 2], kernel[:, 3] = np.nan, np.inf, 0
    found = np.asarray(weight_only_dot_general(x, quantize_weight(kernel, format), DENSE))
    assert np.isfinite(found[:, [0, 3]]).all()
    assert np.isnan(found[:, [1, 2]]).all()
    np.testing.assert_array_equal(found[:, 3], 0)


@pytest.mark.parametrize("granularity", oracle.GRANULARITIES)
def test_scales_along_an_axis_of_outputs(granularity):
    x, kernel = draw((4, 8), (8, 12))
    want = x @ oracle.rounded(kernel, "int8", granularity, (1,))
    with jax.enable_x64(True):
        weight = quantize_weight(kernel, "int8", granularity, axis=1)
        found = weight_only_dot_general(jnp.asarray(x), weight, DENSE)
        np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-12)


WIDTH = 4096


def decode(tokens: int, format: str | None) -> Any:
    x = jax.ShapeDtypeStruct((tokens, WIDTH), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)
    if format is None:
        return lambda x, w: jax.lax.dot_general(x, w, DENSE), (x, kernel), ()
    weight = jax.eval_shape(functools.partial(quantize_weight, format=format), kernel)
    return lambda x, w: weight_only_dot_general(x, w, DENSE), (x, weight), ()


def plain() -> Any:
    return decode(8, None)


def of_int8() -> Any:
    return decode(8, "int8")


def of_int4() -> Any:
    return decode(8, "int4")


@pytest.mark.parametrize("chip", [needs.on("h200"), needs.on("v5e")])
def test_a_weight_is_read_as_it_is_kept(chip):
    def moved(name: str) -> int:
        report = targets.compile_in_child(f"{__name__}:{name}", chip)
        return report["traffic"]["total_bytes"]

    whole = moved("plain")
    assert moved("of_int8") <= 0.55 * whole
    assert moved("of_int4") <= 0.31 * whole  # a quarter, and the tokens
