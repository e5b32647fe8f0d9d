"""Dtypes: what comes in goes out, and the state's never moves."""

from __future__ import annotations

import contextlib
from typing import Any

import jax

from jaxopt_lab.testing._registry import check
from jaxopt_lab.testing._subject import Subject
from jaxopt_lab.testing._values import (
    expect_finite,
    expect_same_types,
    kernel_and_bias,
    normal,
    normal_like,
)

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_GRADIENT_AND_WEIGHTS = (
    ("float32", "bfloat16"),
    ("float32", "float16"),
    ("float32", "float64"),
)


def _mixed() -> dict[str, jax.Array]:
    return {
        "bfloat16": normal((4, 3), "bfloat16"),
        "float16": normal((3,), "float16"),
        "float32": normal((3,), "float32"),
    }


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

    @check("dtypes", name=f"{gradient_dtype}_gradients_{dtype}_weights", promise=promise)
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
    run = subject.run_with_stable_types(_mixed())
    expect_finite(run.updates, "updates")


for _pair in _GRADIENT_AND_WEIGHTS:
    _add_wider_gradient(*_pair)


def _trace(subject: Subject, params: Any) -> None:
    state = jax.eval_shape(subject.transform.init, params)
    jax.eval_shape(subject.transform.update, params, state, params)


def _add_strict_dtypes(name: str) -> None:
    promise = f'No implicit dtype promotion ("strict") with {name} leaves'

    @check("dtypes", name=f"strict_dtype_promotion_{name}", promise=promise)
    def _(subject: Subject) -> None:
        params = _mixed() if name == "mixed" else kernel_and_bias(name)
        with jax.numpy_dtype_promotion("strict"):
            _trace(subject, params)


for _name in ("float32", "bfloat16", "mixed"):
    _add_strict_dtypes(_name)


@check("dtypes")
def strict_rank_promotion(subject: Subject) -> None:
    """No implicit rank promotion ("raise")."""
    params = {**kernel_and_bias(), "scale": normal(()), "tensor": normal((2, 3, 4))}
    with jax.numpy_rank_promotion("raise"):
        _trace(subject, params)
