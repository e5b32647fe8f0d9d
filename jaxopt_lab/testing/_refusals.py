"""Malformed input: refused with an error that names the leaf, never used silently."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_lab.testing._causes import describe
from jaxopt_lab.testing._registry import BreachError, NotApplicableError, check
from jaxopt_lab.testing._subject import Subject
from jaxopt_lab.testing._values import (
    expect,
    expect_close,
    expect_finite,
    expect_refusal,
    kernel_and_bias,
    normal,
    normal_like,
)


@check("refusals", level="library", traced=False)
def gradient_shape_refused(subject: Subject) -> None:
    """A gradient of another shape is a ValueError with the leaf's path and both shapes."""
    params = kernel_and_bias()
    state = subject.require_state_per_parameter(params)
    for shape in ((4, 1), (5, 4)):
        gradient = dict(normal_like(params), kernel=normal(shape))
        expect_refusal(
            lambda: subject.transform.update(gradient, state, params),  # noqa: B023
            ValueError,
            ("kernel", f"{shape[0]},{shape[1]}", "4,5"),
            f"gradient of shape {shape} for a weight of shape (4, 5)",
        )


def _tree_refused(subject: Subject, gradient: Any, name: str, what: str) -> None:
    params = kernel_and_bias()
    state = subject.require_state_per_parameter(params)
    expect_refusal(
        lambda: subject.transform.update(gradient, state, params), ValueError, (name,), what
    )


@check("refusals", level="library", traced=False)
def missing_leaf_refused(subject: Subject) -> None:
    """A gradient tree that lacks a leaf is a ValueError with its path."""
    gradient = {"kernel": kernel_and_bias()["kernel"]}
    _tree_refused(subject, gradient, "bias", "gradients without 'bias'")


@check("refusals", level="library", traced=False)
def extra_leaf_refused(subject: Subject) -> None:
    """A gradient tree with one leaf more is a ValueError with its path."""
    gradient = {**kernel_and_bias(), "surplus": normal((5,))}
    _tree_refused(subject, gradient, "surplus", "gradients with an extra leaf 'surplus'")


@check("refusals", level="library", traced=False)
def integer_gradient_refused(subject: Subject) -> None:
    """An integer gradient is a TypeError with the leaf's path."""
    params = kernel_and_bias()
    state = subject.transform.init(params)
    gradient = dict(normal_like(params), kernel=jnp.ones((4, 5), jnp.int32))
    expect_refusal(
        lambda: subject.transform.update(gradient, state, params),
        TypeError,
        ("kernel",),
        "int32 gradient",
    )


def _weights_refused(subject: Subject, dtype: str) -> None:
    params = dict(kernel_and_bias(), kernel=jnp.ones((4, 5), dtype))
    expect_refusal(
        lambda: subject.transform.init(params), TypeError, ("kernel",), f"init on {dtype} weights"
    )


@check("refusals", level="library", traced=False)
def integer_weights_refused(subject: Subject) -> None:
    """Integer weights are a TypeError at init with the leaf's path."""
    _weights_refused(subject, "int32")


@check("refusals", level="library", traced=False)
def bool_weights_refused(subject: Subject) -> None:
    """Boolean weights are a TypeError at init with the leaf's path."""
    _weights_refused(subject, "bool")


@check("refusals", level="library")
def complex_weights(subject: Subject) -> None:
    """Complex weights work in their dtype, or are a TypeError at init with the leaf's path."""
    params = {"kernel": normal((4, 5)) + 1j * normal((4, 5), seed=1)}
    try:
        subject.transform.init(params)
    except TypeError as error:
        expect("kernel" in str(error), f"the refusal names no leaf: {describe(error)}")
        return
    run = subject.run_with_stable_types(params)
    expect_finite(run.updates, "updates")


@check("refusals", traced=False)
def missing_params(subject: Subject) -> None:
    """Without `params`, `update` gives the same or is a ValueError that says `params`."""
    params = kernel_and_bias()
    state, gradient = subject.transform.init(params), normal_like(params)
    try:
        updates, _ = subject.transform.update(gradient, state)
    except ValueError as error:
        expect("params" in str(error), f"the error does not say params: {describe(error)}")
        return
    except Exception as error:
        raise BreachError(
            f"raised {describe(error)}; expected ValueError that says params"
        ) from error
    expected, _ = subject.transform.update(gradient, state, params)
    expect_close(updates, expected, "updates without params")


class _ForeignState(NamedTuple):
    foreign_count: Any
    foreign_momentum: Any


def _foreign(state: Any, params: Any) -> tuple[Any, int]:
    """`state` with each named part that holds arrays replaced by one of another kind."""
    if type(state) is tuple:
        parts = [_foreign(part, params) for part in state]
        return tuple(part for part, _ in parts), sum(count for _, count in parts)
    if not jax.tree.leaves(state):
        return state, 0
    return _ForeignState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)), 1


@check("refusals", level="library", traced=False)
def foreign_state_refused(subject: Subject) -> None:
    """The state of another transformation is an error, not used silently."""
    params = kernel_and_bias()
    foreign, replaced = _foreign(subject.transform.init(params), params)
    if not replaced:
        raise NotApplicableError("keeps no state")
    try:
        subject.transform.update(normal_like(params), foreign, params)
    except Exception:
        return
    raise BreachError("accepted the state of another transformation")
