"""Inputs at the edge: nothing to count, one class, block borders, infinities, dtypes of labels."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import _compat
from tests.pallas_kernels.loss import cases, oracle

PLANS = [{}, {"gradient_in_forward": True}]
HIDDEN, WEIGHT, LABELS, *_ = cases.Case(("plain",)).arrays()


def slopes(labels: Any, hidden: Any = HIDDEN, weight: Any = WEIGHT, bias: Any = None, **options):
    """Returns loss and gradients, by blocks of 8."""
    fn = functools.partial(pallas_kernels.cross_entropy, block_vocabulary=8, **options)
    moving = (0, 1) if bias is None else (0, 1, 3)
    return jax.jit(jax.value_and_grad(fn, moving))(hidden, weight, labels, bias)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_where_nothing_counts_all_is_zero(plan, reduction):
    found = slopes(np.full_like(LABELS, -100), reduction=reduction, z_loss=0.1, **plan)
    for x in jax.tree.leaves(found):
        np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_without_tokens_all_is_zero(plan):
    loss, (d_hidden, d_weight) = slopes(LABELS[:0], HIDDEN[:0], **plan)
    assert loss == 0
    assert d_hidden.shape == (0, 11, 6)
    np.testing.assert_array_equal(d_weight, 0)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_ignored_may_be_anything(plan, value):
    ignored = np.arange(LABELS.size).reshape(LABELS.shape) % 3 == 0
    labels = np.where(ignored, -100, LABELS)
    hidden = np.where(ignored[..., None], np.float32(value), HIDDEN)
    found = slopes(labels, hidden, label_smoothing=0.1, z_loss=0.1, **plan)
    wanted = slopes(labels, label_smoothing=0.1, z_loss=0.1, **plan)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(found[1][0][ignored], 0)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("label", [-1, 37, 2**31 - 1, -(2**31)])
def test_a_label_that_names_no_class_is_told_by_nan(plan, label):
    labels = LABELS.copy()
    labels[1, 2] = label
    loss, gradients = slopes(labels, **plan)
    assert np.isnan(loss)
    assert all(np.isnan(x).any() for x in gradients)
    if not plan:
        each = pallas_kernels.cross_entropy(HIDDEN, WEIGHT, labels, reduction="none")
        np.testing.assert_array_equal(np.isnan(each), labels == label)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64", "uint64"])
def test_integers_of_any_size(dtype):
    labels = LABELS.astype(dtype)
    wanted = oracle.cross_entropy(HIDDEN, WEIGHT, LABELS)
    with jax.enable_x64("64" in dtype):
        np.testing.assert_allclose(slopes(labels)[0], wanted, rtol=1e-5)
        if dtype == "int64":  # whose lower half would be a class
            assert np.isnan(slopes(labels + 2**32)[0])
        if dtype in ("int8", "int64"):
            labels[0] = -100
            wanted = oracle.cross_entropy(HIDDEN, WEIGHT, labels)
            np.testing.assert_allclose(slopes(labels)[0], wanted, rtol=1e-5)


def test_an_index_ignored_that_is_a_class():
    wanted = oracle.cross_entropy(HIDDEN, WEIGHT, LABELS, ignore_index=int(LABELS[0, 0]))
    found = slopes(LABELS, ignore_index=int(LABELS[0, 0]))[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_one_class_costs_nothing(plan):
    loss, gradients = slopes(np.zeros_like(LABELS), HIDDEN, WEIGHT[:, :1], **plan)
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    for x in gradients:
        np.testing.assert_allclose(x, 0, atol=1e-6)


@pytest.mark.parametrize("label", [0, 7, 8, 31, 32, 36])
def test_labels_at_the_borders_of_blocks(label):
    labels = np.full_like(LABELS, label)
    wanted = oracle.cross_entropy(HIDDEN, WEIGHT, labels)
    np.testing.assert_allclose(slopes(labels)[0], wanted, rtol=1e-5)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_bias_of_minus_infinity_takes_a_class_away(plan, cap):
    bias = np.zeros(37, np.float32)
    bias[:9] = -np.inf  # a whole block, and one more
    labels = np.maximum(LABELS, 9)
    loss, (d_hidden, d_weight, d_bias) = slopes(labels, bias=bias, logits_soft_cap=cap, **plan)
    fewer, (d_hidden_9, d_weight_9) = slopes(
        labels - 9, weight=WEIGHT[:, 9:], logits_soft_cap=cap, **plan
    )
    np.testing.assert_allclose(loss, fewer, rtol=1e-6)
    np.testing.assert_allclose(d_hidden, d_hidden_9, atol=1e-6)
    np.testing.assert_allclose(d_weight[:, 9:], d_weight_9, atol=1e-6)
    np.testing.assert_array_equal(d_weight[:, :9], 0)
    np.testing.assert_array_equal(d_bias[:9], 0)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits(plan, scale):
    hidden = HIDDEN * np.float32(scale)
    loss, gradients = slopes(LABELS, hidden, **plan)
    np.testing.assert_allclose(loss, oracle.cross_entropy(hidden, WEIGHT, LABELS), rtol=1e-5)
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("chip", ["h200", "v5e"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_in_the_dtype_of_hidden_are_as_exact_as_its_digits(chip, dtype, plan):
    hidden, weight = jnp.asarray(HIDDEN, dtype), jnp.asarray(WEIGHT, dtype)
    wanted = slopes(LABELS, hidden, weight, **plan)
    with _compat.as_if_on(chip):
        fn = functools.partial(pallas_kernels.cross_entropy, block_vocabulary=8, **plan)
        found = jax.jit(jax.value_and_grad(fn, (0, 1)))(hidden, weight, LABELS)
    eps = float(jnp.finfo(dtype).eps)
    # The gradient of each logit is rounded once, then each result.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=3 * eps, atol=eps / 20)


def test_a_class_of_small_share_has_a_gradient_in_float16():
    hidden = jnp.ones((64, 4), jnp.float16)
    weight, labels = jnp.zeros((4, 60000), jnp.float16), jnp.zeros(64, int)
    with _compat.as_if_on("h200"):
        fn = functools.partial(pallas_kernels.cross_entropy, reduction="mean")
        d_weight = jax.jit(jax.grad(fn, 1))(hidden, weight, labels)
    # One 60000th of the mean of 64 ones; a 64th of that is 0 in float16.
    np.testing.assert_allclose(d_weight[:, 1:].astype(np.float32), 1 / 60000, rtol=0.01)
