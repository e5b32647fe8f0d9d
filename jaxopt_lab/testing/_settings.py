"""Settings of JAX that other people's code runs under: each changes nothing."""

from __future__ import annotations

import contextlib
from typing import Any

import jax

from jaxopt_lab.testing._registry import check
from jaxopt_lab.testing._subject import Subject
from jaxopt_lab.testing._values import (
    expect_close,
    expect_finite,
    full_like,
    kernel_and_bias,
    mixed_dtypes_tree,
    normal,
    normal_like,
)


def _trace(subject: Subject, params: Any) -> None:
    state = jax.eval_shape(subject.transform.init, params)
    jax.eval_shape(subject.transform.update, params, state, params)


def _add_strict_dtypes(name: str) -> None:
    promise = f'No implicit dtype promotion ("strict") with {name} leaves'

    @check("settings", name=f"strict_dtype_promotion_{name}", promise=promise, level="library")
    def _(subject: Subject) -> None:
        params = mixed_dtypes_tree() if name == "mixed" else kernel_and_bias(name)
        with jax.numpy_dtype_promotion("strict"):
            _trace(subject, params)


for _name in ("float32", "bfloat16", "mixed"):
    _add_strict_dtypes(_name)


@check("settings")
def strict_rank_promotion(subject: Subject) -> None:
    """No implicit rank promotion ("raise")."""
    params = {**kernel_and_bias(), "scale": normal(()), "tensor": normal((2, 3, 4))}
    with jax.numpy_rank_promotion("raise"):
        _trace(subject, params)


@check("settings")
def disable_jit(subject: Subject) -> None:
    """Under `jax.disable_jit()`, where loops run in Python: the same."""
    params = kernel_and_bias()
    gradients = [normal_like(params, seed) for seed in (10, 20)]
    expected = subject.run(params, *gradients).params
    with jax.disable_jit():
        found = subject.run(params, *gradients, jit=False).params
    expect_close(found, expected, "params")


@check("settings")
def x64(subject: Subject) -> None:
    """With x64 enabled, float32 and bfloat16 weights, gradients and state keep their dtypes."""
    with jax.enable_x64(True):
        for dtype in ("float32", "bfloat16"):
            params = kernel_and_bias(dtype)
            expect_finite(subject.run_with_stable_types(params).updates, "updates")


def _finite_cases(subject: Subject, setting: contextlib.AbstractContextManager[Any]) -> None:
    """Init and two steps, compiled and eager, on values that are and stay finite."""
    params = kernel_and_bias()
    zeros = full_like(params, 0.0)
    gradients = (normal_like(params, 10), normal_like(params, 20))
    with setting:
        for jit in (True, False):
            subject.run(params, *gradients, jit=jit)
            subject.run(params, zeros, gradients[0], jit=jit)
        subject.run(zeros, zeros, gradients[0])


@check("settings")
def debug_nans(subject: Subject) -> None:
    """Under `jax.debug_nans(True)` finite gradients, zero ones and zero weights raise nothing."""
    _finite_cases(subject, jax.debug_nans(True))


@check("settings", level="library")
def debug_infs(subject: Subject) -> None:
    """Under `jax.debug_infs(True)` finite gradients, zero ones and zero weights raise nothing."""
    _finite_cases(subject, jax.debug_infs(True))
