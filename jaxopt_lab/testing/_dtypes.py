"""Dtypes: what comes in goes out, and the state's never moves."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab.testing._registry import check
from jaxopt_lab.testing._subject import Subject, training_step
from jaxopt_lab.testing._values import (
    expect,
    expect_close,
    expect_finite,
    expect_same_types,
    kernel_and_bias,
    mixed_dtypes_tree,
    normal_like,
)

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_GRADIENT_AND_WEIGHTS = (
    ("float32", "bfloat16"),
    ("float32", "float16"),
    ("float32", "float64"),
)


def _x64(*dtypes: str) -> contextlib.AbstractContextManager[Any]:
    return jax.enable_x64(True) if "float64" in dtypes else contextlib.nullcontext()


def _add_dtype(dtype: str) -> None:
    promise = f"{dtype} weights and gradients give {dtype} updates; the state keeps its dtypes"

    @check("dtypes", name=f"{dtype}_updates", promise=promise)
    def _(subject: Subject) -> None:
        with _x64(dtype):
            run = subject.run_with_stable_types(kernel_and_bias(dtype))
            expect_finite(run.updates, "updates")


def _add_wider_gradient(gradient_dtype: str, dtype: str) -> None:
    promise = f"{gradient_dtype} gradients with {dtype} weights leave the state's dtypes"

    @check(
        "dtypes",
        name=f"{gradient_dtype}_gradients_{dtype}_weights",
        promise=promise,
        level="library",
    )
    def _(subject: Subject) -> None:
        with _x64(dtype):
            params = kernel_and_bias(dtype)
            gradients = [normal_like(params, seed, gradient_dtype) for seed in (10, 20)]
            run = subject.run(params, *gradients)
            expect_same_types(run.state, subject.transform.init(params), "state")
            expect_same_types(run.params, params, "params")
            expect_finite(run.params, "params")


for _dtype in _DTYPES:
    _add_dtype(_dtype)


@check("dtypes")
def mixed_dtypes(subject: Subject) -> None:
    """A tree of bfloat16, float16 and float32 leaves keeps the dtype of each."""
    run = subject.run_with_stable_types(mixed_dtypes_tree())
    expect_finite(run.updates, "updates")


for _pair in _GRADIENT_AND_WEIGHTS:
    _add_wider_gradient(*_pair)


_NARROW = ("bfloat16", "float16")


def _equals_wide(
    subject: Subject, transform: Any, dtype: str, params: Any, steps: int = 3
) -> tuple[Any, Any]:
    """Steps with gradients of `dtype` are those with the same gradients in float32."""
    narrow = [normal_like(params, 10 * (index + 1), dtype) for index in range(steps)]
    wide = [optax.tree.cast(gradient, jnp.float32) for gradient in narrow]
    step = subject.step if transform is subject.transform else jax.jit(training_step(transform))

    def last(gradients: Any) -> tuple[Any, Any]:
        weights, state, updates = params, transform.init(params), None
        for gradient in gradients:
            weights, state, updates = step(weights, state, gradient)
        return updates, state

    found, state = last(narrow)
    expected, _ = last(wide)
    expect_same_types(state, transform.init(params), "state")
    expect_same_types(found, params, "updates")
    expect_close(found, expected, "updates")
    return found, expected


def _add_narrow_gradients(dtype: str) -> None:
    promise = f"{dtype} gradients with float32 weights: the float32 updates of the same gradients"

    @check("dtypes", name=f"{dtype}_gradients_float32_weights", promise=promise, level="library")
    def _(subject: Subject) -> None:
        _equals_wide(subject, subject.transform, dtype, kernel_and_bias())


for _dtype in _NARROW:
    _add_narrow_gradients(_dtype)


@check("dtypes", level="library")
def small_rate_with_narrow_gradients(subject: Subject) -> None:
    """16-bit gradients, float32 weights: a learning rate of 1e-8 is not lost."""
    constructor, arguments, _ = subject.require_argument("learning_rate")
    # Below the smallest number of float16, where it would be 0.
    small = constructor(**dict(arguments, learning_rate=1e-8))
    for dtype in _NARROW:
        updates, _ = _equals_wide(subject, small, dtype, kernel_and_bias(), steps=1)
        moved = any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(updates))
        expect(moved, f"no weight moves with {dtype} gradients and a learning_rate of 1e-8")


@check("dtypes", level="library")
def weight_decay_with_narrow_gradients(subject: Subject) -> None:
    """16-bit gradients, float32 weights: a weight decay of 1e-2 shows in the updates."""
    constructor, arguments, _ = subject.require_argument("weight_decay")
    everywhere = dict(arguments, mask=None) if "mask" in arguments else arguments
    params = jax.tree.map(lambda leaf: 0.02 * leaf, kernel_and_bias())
    decayed, plain = (constructor(**dict(everywhere, weight_decay=decay)) for decay in (1e-2, 0.0))
    for dtype in _NARROW:
        with_decay, _ = _equals_wide(subject, decayed, dtype, params, steps=1)
        without, _ = _equals_wide(subject, plain, dtype, params, steps=1)
        pairs = list(zip(jax.tree.leaves(with_decay), jax.tree.leaves(without)))
        changed = sum(int(jnp.sum(a != b)) for a, b in pairs)
        moved = sum(int(jnp.sum((a != 0) | (b != 0))) for a, b in pairs)
        # A decay of 2e-4 beside 1 is some 1,000 roundings of float32; a rule may spare vectors.
        expect(
            0 < moved <= changed / 0.75,
            f"{dtype} gradients: weight decay changes {changed} of {moved} entries that move",
        )
