"""Values and gradients of every feature and every pair of them, against float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests.pallas_kernels.loss import cases, oracle

FORWARD = {"gradient_in_forward": True}


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_values_and_gradients(case):
    cases.check(pallas_kernels.cross_entropy, case)


SIMPLE = [c for c in cases.CASES if "gradient in forward" not in c.features]


@pytest.mark.parametrize("case", SIMPLE, ids=str)
def test_the_definition_is_the_formula_token_by_token(case):
    hidden, weight, labels, bias, weights = case.arrays(np.float64)
    options = case.options()
    with jax.enable_x64(True):
        found = pallas_kernels.cross_entropy(
            hidden, weight, labels, bias,
            class_weights=weights, implementation="reference", **options,
        )  # fmt: skip
    wanted = oracle.cross_entropy(hidden, weight, labels, bias, class_weights=weights, **options)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


# Logits (2, 1, 0, -1), label 0: numbers worked out by hand and to ten places.
NUMBERS: list[tuple[dict[str, Any], float, tuple[float, ...] | None]] = [
    ({}, 0.4401896986, (-0.3560857401, 0.2368828181, 0.0871443187, 0.0320586033)),
    ({"label_smoothing": 0.1}, 0.5901896986, None),
    ({"z_loss": 0.01}, 0.4997349562, None),
    ({"logits_soft_cap": 3.0}, 0.5289024221,
     (-0.2712436280, 0.2412731645, 0.1025657464, 0.0350527240)),
    ({"label_smoothing": 0.1, "z_loss": 0.01, "logits_soft_cap": 3.0}, 0.7118873178, None),
]  # fmt: skip


@pytest.mark.parametrize("more", [{}, FORWARD, {"implementation": "reference"}], ids=str)
@pytest.mark.parametrize(("options", "loss", "gradient"), NUMBERS, ids=str)
def test_numbers(options, loss, gradient, more):
    with jax.enable_x64(True):
        hidden, labels = jnp.array([[2.0, 1.0, 0.0, -1.0]]), jnp.array([0])

        def fn(hidden: jax.Array) -> jax.Array:
            return pallas_kernels.cross_entropy(
                hidden, jnp.eye(4), labels, block_vocabulary=2, **options, **more
            )

        found, slope = jax.value_and_grad(fn)(hidden)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, loss, atol=1e-10)
        if gradient is not None:
            np.testing.assert_allclose(slope[0], gradient, atol=1e-10)
        if "z_loss" in options and "logits_soft_cap" not in options:
            np.testing.assert_allclose(slope.sum(), 0.0488037940, atol=1e-10)


@pytest.mark.parametrize("more", [{}, FORWARD | {"block_tokens": 1}], ids=str)
def test_numbers_with_an_ignored_token(more):
    with jax.enable_x64(True):
        hidden = jnp.array([[1.0, 2.0], [0.0, 1.0]])
        weight = jnp.array([[1.0, 0.0, 0.5], [0.0, 1.0, -1.0]])
        fn = functools.partial(pallas_kernels.cross_entropy, block_vocabulary=2, **more)
        loss, slope = jax.value_and_grad(fn)(hidden, weight, jnp.array([2, -100]))
    np.testing.assert_allclose(loss, 3.8350975955, atol=1e-10)
    np.testing.assert_allclose(slope[0], (-0.2260678912, 1.6936690456), atol=1e-10)
    np.testing.assert_array_equal(slope[1], 0)


BLOCKS = [1, 2, 5, 36, 37, 100]


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_any_block_gives_the_same(block, in_forward):
    features = ("bias", "class weights", "label smoothing", "soft cap")
    case = cases.Case((*features, "gradient in forward") if in_forward else features)
    more = {"block_vocabulary": block}
    if in_forward:
        more["block_tokens"] = block
    found = cases.results(pallas_kernels.cross_entropy, case, case.arrays(), **more)
    for a, b in zip(found, cases.expected(cases.Case(features)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_are_as_exact_as_their_digits(dtype, in_forward):
    case = cases.Case(("plain", "gradient in forward") if in_forward else ("plain",))
    hidden, weight, labels, *_ = case.arrays()
    narrow = jnp.asarray(hidden, dtype), jnp.asarray(weight, dtype), labels, None, None
    rounded = [np.asarray(x, np.float32) for x in narrow[:2]]
    found = cases.results(pallas_kernels.cross_entropy, case, narrow, **cases.BLOCKS)
    exact = cases.results(pallas_kernels.cross_entropy, case, (*rounded, *narrow[2:]))
    assert [str(x.dtype) for x in found] == ["float32", dtype, dtype]
    # The sums are those of float32, so a result is off by its own rounding and once more.
    for a, b in zip(found, exact, strict=True):
        eps = float(jnp.finfo(str(a.dtype)).eps)
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=2 * eps, atol=eps / 20)


@pytest.mark.parametrize("in_forward", [False, True])
def test_a_weight_in_float32_has_its_gradient_there(in_forward):
    case = cases.Case(("plain", "gradient in forward") if in_forward else ("plain",))
    hidden, weight, labels, *_ = case.arrays()
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    found = cases.results(
        pallas_kernels.cross_entropy, case, (hidden, weight, labels, None, None), **cases.BLOCKS
    )
    assert [str(x.dtype) for x in found] == ["float32", "bfloat16", "float32"]
    narrow = np.asarray(jnp.asarray(weight, jnp.bfloat16), np.float32)
    same = cases.results(
        pallas_kernels.cross_entropy,
        case,
        (np.asarray(hidden, np.float32), narrow, labels, None, None),
    )
    np.testing.assert_allclose(found[2], same[2], rtol=1e-5, atol=1e-6)
