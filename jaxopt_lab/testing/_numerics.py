"""Extreme values, derivatives through a step, and bit-exact resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.testing._registry import NotApplicableError, check
from jaxopt_lab.testing._subject import Run, Subject, training_step
from jaxopt_lab.testing._values import (
    expect,
    expect_equal,
    expect_finite,
    full_like,
    kernel_and_bias,
    normal_like,
)

_FINITE = {
    "float16": (0.0, 1e-8, 1e-5, 1.0, 6e4),
    "bfloat16": (0.0, 1e-8, 1e-5, 1.0, 6e4),
    "float32": (0.0, 1e-45, 1e-30, 1e19),
}
_MAX_INT32 = np.iinfo(np.int32).max


def _runs(subject: Subject, dtype: str, value: float) -> Iterator[Run]:
    """Each step of three: a gradient of this value, one of it but at most 1, and one of 1."""
    # Compiled, a fused chain of operations may round only once; eager, it rounds at each.
    for step in (subject.step, training_step(subject.transform)):
        params = kernel_and_bias(dtype)
        state = subject.transform.init(params)
        for size in (value, min(value, 1.0), 1.0):
            params, state, updates = step(params, state, full_like(params, size))
            yield Run(params, state, updates)


def _add_finite(dtype: str, value: float) -> None:
    promise = f"Finite updates and state in {dtype} after gradients of {value:g}"

    # What float16 can hold, and squares that leave float32, are promises of this library.
    level = "library" if dtype == "float16" or value > 1e10 else "must"

    @check("numerics", name=f"{dtype}_gradient_{value:g}", promise=promise, level=level)
    def _(subject: Subject) -> None:
        for run in _runs(subject, dtype, value):
            expect_finite(run.updates, "updates")
            expect_finite(run.state, "state")


for _dtype, _values in _FINITE.items():
    for _value in _values:
        _add_finite(_dtype, _value)


@check("numerics", name="float32_gradient_1e+25_updates")
def _huge_updates(subject: Subject) -> None:
    """Finite updates in float32 after a gradient of 1e25."""
    for run in _runs(subject, "float32", 1e25):
        expect_finite(run.updates, "updates")


@check("numerics", name="float32_gradient_1e+25_state", level="library")
def _huge_state(subject: Subject) -> None:
    """Finite state in float32 after a gradient of 1e25 (whose square overflows)."""
    for run in _runs(subject, "float32", 1e25):
        expect_finite(run.state, "state")


@check("numerics")
def zero_weights(subject: Subject) -> None:
    """Finite updates and state with zero weights and zero gradients."""
    zeros = full_like(kernel_and_bias(), 0.0)
    run = subject.run(zeros, zeros, zeros)
    expect_finite(run.updates, "updates")
    expect_finite(run.state, "state")


def _is_counter(leaf: Any) -> bool:
    return np.shape(leaf) == () and jnp.result_type(leaf) == np.int32


@check("numerics")
def counter_at_maximum(subject: Subject) -> None:
    """A counter at the int32 maximum does not wrap, and updates stay finite."""
    params = kernel_and_bias()
    state = subject.transform.init(params)
    if not any(_is_counter(leaf) for leaf in jax.tree.leaves(state)):
        raise NotApplicableError("keeps no int32 counter")
    state = jax.tree.map(
        lambda leaf: jnp.asarray(_MAX_INT32, jnp.int32) if _is_counter(leaf) else leaf, state
    )
    for _ in range(2):
        _, state, updates = subject.step(params, state, normal_like(params))
        expect_finite(updates, "updates")
        for leaf in jax.tree.leaves(state):
            expect(not _is_counter(leaf) or int(leaf) >= 0, f"a counter wrapped to {leaf}")


@check("numerics", level="library")
def nan_stays_in_its_leaf(subject: Subject) -> None:
    """NaN in the gradient of one leaf leaves the updates of the others finite."""
    params = kernel_and_bias()
    gradient = normal_like(params)
    gradient["bias"] = jnp.full_like(gradient["bias"], jnp.nan)
    run = subject.run(params, gradient, gradient)
    expect_finite(run.updates["kernel"], "updates['kernel']")


def _has_nan(tree: Any) -> bool:
    return any(bool(jnp.any(jnp.isnan(leaf))) for leaf in jax.tree.leaves(tree))


@check("numerics")
def nan_propagates(subject: Subject) -> None:
    """NaN in one entry of a gradient reaches the updates of that leaf, so that it can be seen."""
    params = kernel_and_bias()
    tried = []
    for name in params:
        # After two steps, for rules that only watch at first; two, as some are a step behind.
        poisoned = normal_like(params, 30)
        poisoned[name] = poisoned[name].at[(0,) * poisoned[name].ndim].set(jnp.nan)
        histories = []
        for third in (normal_like(params, 30), poisoned):
            weights, state, history = params, subject.transform.init(params), []
            gradients = [normal_like(params, seed) for seed in (10, 20)]
            for gradient in (*gradients, third, normal_like(params, 40)):
                _, state, updates = subject.step(weights, state, gradient)
                history.append(updates[name])
            histories.append(history[2:])
        finite, found = histories
        if not any(bool(jnp.any(leaf != 0)) for leaf in finite):
            continue  # another part of the weights has its turn
        tried.append(name)
        expect(_has_nan(found), f"NaN in gradients[{name!r}] does not reach updates[{name!r}]")
    expect(tried, "no update moves a weight")


# Three sizes of step that a quadratic of curvatures from 0.5 to 2 may need.
_SHRINK = (1.0, 0.1, 0.01)
_DESCENT_STEPS = 20


@check("numerics")
def descends(subject: Subject) -> None:
    """Twenty steps on a convex quadratic lower the loss, if they are small enough."""
    subject.require_ready_made("descends")
    start = kernel_and_bias()
    curvature = jax.tree.map(
        lambda leaf: jnp.reshape(jnp.linspace(0.5, 2.0, leaf.size), leaf.shape), start
    )
    target = normal_like(start, 50)

    def loss(params: Any) -> jax.Array:
        terms = jax.tree.map(
            lambda c, p, t: jnp.sum(c * (p - t) ** 2) / 2, curvature, params, target
        )
        return sum(jax.tree.leaves(terms), jnp.zeros(()))

    @jax.jit
    def final_loss(shrink: jax.Array) -> jax.Array:
        def body(carry: Any, _: Any) -> tuple[Any, None]:
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            update = optax.with_extra_args_support(subject.transform).update
            extra = {"value": value, "grad": gradient, "value_fn": loss}
            updates, state = update(gradient, state, params, **extra)
            updates = jax.tree.map(lambda leaf: shrink * leaf, updates)
            return (optax.apply_updates(params, updates), state), None

        carry = start, subject.transform.init(start)
        (params, _), _ = jax.lax.scan(body, carry, length=_DESCENT_STEPS)
        return loss(params)

    before = float(loss(start))
    after = [float(final_loss(jnp.float32(shrink))) for shrink in _SHRINK]
    ends = ", ".join(f"{value:.7g}" for value in after)
    expect(
        min(after) < before,
        f"the loss of a convex quadratic goes from {before:.7g} to {ends} in {_DESCENT_STEPS} "
        f"steps of 1, 0.1 and 0.01 times their size; expected a lower one",
    )


@check("numerics")
def nonfinite_gradients_accepted(subject: Subject) -> None:
    """NaN and infinite gradients raise nothing, eager or compiled."""
    params = kernel_and_bias()
    for value in (np.nan, np.inf, -np.inf):
        gradient = normal_like(params)
        gradient["bias"] = gradient["bias"].at[0].set(value)
        for jit in (True, False):
            subject.run(params, gradient, jit=jit)


def _slope(subject: Subject, scale: float, steps: int) -> jax.Array:
    """The derivative of the weights' squared norm by the size of the gradients before it."""
    params, step = kernel_and_bias(), training_step(subject.transform)

    @jax.jit
    @jax.grad
    def slope(scale: jax.Array) -> Any:
        weights, state = params, subject.transform.init(params)
        for _ in range(steps):
            gradient = jax.tree.map(lambda leaf: scale * leaf, weights)
            weights, state, _ = step(weights, state, gradient)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(weights))

    return slope(jnp.float32(scale))


@check("numerics")
def differentiable(subject: Subject) -> None:
    """The derivative through three steps exists and is finite."""
    expect_finite(_slope(subject, 0.5, 3), "the derivative")


@check("numerics", level="library")
def differentiable_at_zero_gradient(subject: Subject) -> None:
    """The derivative through three steps is finite where the gradients are zero."""
    expect_finite(_slope(subject, 0.0, 3), "the derivative")


@check("numerics")
def resume_bit_exact(subject: Subject) -> None:
    """Resumed from NumPy copies of the state at steps 1, 7 and 19 of 20, the end is bit-equal."""
    params = kernel_and_bias()
    gradients = [normal_like(params, 100 + 2 * index) for index in range(20)]

    def finish(params: Any, state: Any, start: int) -> tuple[Any, list[Any]]:
        path = [(params, state)]
        for gradient in gradients[start:]:
            params, state, _ = subject.step(params, state, gradient)
            path.append((params, state))
        return (params, state), path

    expected, path = finish(params, subject.transform.init(params), 0)
    for index in (1, 7, 19):
        # NumPy holds no typed random keys: a state with one raises here, and cannot be saved so.
        saved = jax.tree.map(np.array, path[index])
        weights, state = jax.tree.map(jnp.asarray, saved)
        expect_equal(finish(weights, state, index)[0], expected, f"resumed at step {index}: ")
